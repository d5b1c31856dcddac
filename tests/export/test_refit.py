"""refit.py: coarser scales only on request, as good as least squares, and never without saying so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from frozen_runs import freeze, llama
from hypothesis import given, settings
from hypothesis import strategies as st

from hestia.errors import PlanError
from hestia.export import refit as refit_module
from hestia.export.frozen import FrozenModel
from hestia.export.huggingface import load, logits
from hestia.export.refit import refit, refit_tensor
from hestia.quant import INT3, INT4, TERNARY, Grid, QuantizedTensor, Quantizer, QuantSpec, snap
from hestia.targets import target


def fine(rows: int = 6, columns: int = 128, group: int = 32, seed: int = 0) -> QuantizedTensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight *= torch.linspace(0.5, 1.5, columns)
    return Quantizer(QuantSpec(group_size=group)).codes(weight)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_no_other_scale_is_better_for_the_codes_it_chose(seed: int) -> None:
    before = fine(seed=seed)
    after = refit_tensor(before, TERNARY, 128)
    assert after.group_size == 128 and after.scales.shape == (6, 1)
    assert set(after.codes.unique().tolist()) <= {-1, 0, 1}
    assert torch.equal(snap(after.scales), after.scales)
    best = (after.dense() - before.dense()).square().sum(dim=1)
    for factor in (0.9, 0.97, 1.03, 1.1):
        moved = QuantizedTensor(after.codes, after.scales * factor, 128)
        assert ((moved.dense() - before.dense()).square().sum(dim=1) > best * 0.999).all()
    for mean in (before.scales.mean(dim=1, keepdim=True), before.scales.amax(dim=1, keepdim=True)):
        naive = QuantizedTensor(before.codes, mean, 128)
        snapping = 2.0**-16 * after.dense().square().sum(dim=1)  # moves a scale by 2**-8 of it at most
        assert (best <= (naive.dense() - before.dense()).square().sum(dim=1) + snapping + 1e-6).all()


def test_codes_and_scales_are_chosen_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fine()

    def lost() -> float:
        return float((refit_tensor(before, TERNARY, 128).dense() - before.dense()).square().sum())

    in_turns = lost()
    monkeypatch.setattr(refit_module, "_ROUNDS", 0)
    assert in_turns < 0.99 * lost()


def test_equal_scales_are_refitted_without_any_loss() -> None:
    before = fine()
    before = QuantizedTensor(before.codes, torch.full_like(before.scales, 0.25), 32)
    after = refit_tensor(before, TERNARY, 128)
    assert torch.equal(after.dense(), before.dense())
    zero = QuantizedTensor(torch.zeros(2, 128, dtype=torch.int8), torch.ones(2, 4), 32)
    assert not refit_tensor(zero, TERNARY, 128).dense().any()


@pytest.mark.parametrize("grid", [INT3, INT4])
def test_refitted_weights_of_wider_grids_are_exact_in_bf16(grid: Grid) -> None:
    weight = torch.randn(16, 512, generator=torch.Generator().manual_seed(0))
    after = refit_tensor(Quantizer(QuantSpec(group_size=32, grid=grid)).codes(weight), grid, 256)
    assert torch.equal(after.dense(torch.bfloat16).float(), after.dense())
    assert torch.equal(after.dense(torch.float16).float(), after.dense())


def test_a_run_whose_groups_are_too_fine(tmp_path: Path) -> None:
    frozen = freeze(llama(), tmp_path / "run", QuantSpec(group_size=32), torch.bfloat16)
    before = {name: frozen.codes(name).dense() for name in frozen.quantized}
    chosen = target("gguf:q2_0")  # blocks of 64
    text = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])
    traces = dict.fromkeys(frozen.quantized, 100.0)
    found = refit(frozen, chosen, traces, text)
    assert found is not None
    assert found.folder == frozen.run / "refits" / "gguf-q2_0"
    assert (found.tensors, found.group_size) == (14, 64)
    new = FrozenModel(found.folder)
    errors = [(new.codes(n).dense() - before[n]).double().square() for n in frozen.quantized]
    lost, power = sum(e.sum() for e in errors), sum(w.double().square().sum() for w in before.values())
    assert found.relative_error == pytest.approx(float((lost / power) ** 0.5))
    assert found.expected_loss == pytest.approx(sum(50.0 * float(e.mean()) for e in errors))
    moved = sum(int((new.codes(n).codes != frozen.codes(n).codes).sum()) for n in frozen.quantized)
    assert found.codes_changed == pytest.approx(moved / sum(w.numel() for w in before.values()))
    for name in frozen.quantized:
        assert chosen.types[0].refusal(TERNARY, new.codes(name).group_size, new.codes(name).shape) is None
        assert torch.equal(new.tensor(f"{name}.weight"), new.codes(name).dense(torch.bfloat16))
    assert torch.equal(new.tensor("model.norm.weight"), frozen.tensor("model.norm.weight"))

    def nll(folder: Path) -> float:
        p = logits(load(folder), text)[:, :-1].log_softmax(-1)
        return -float(p.gather(-1, text[:, 1:].unsqueeze(-1)).mean())

    assert found.nll_change == pytest.approx(nll(new.folder) - nll(frozen.folder), abs=1e-5)
    assert found.to_json()["folder"] == "gguf-q2_0"


def test_nothing_is_refitted_where_all_fits_or_where_it_would_not_help(tmp_path: Path) -> None:
    frozen = freeze(llama(172), tmp_path / "run")
    assert refit(frozen, target("hf")) is None
    with pytest.raises(PlanError, match="coarser scales do not help: TQ2_0 stores rows in blocks of 256"):
        refit(frozen, target("gguf:tq2_0"))
    fine_groups = freeze(llama(), tmp_path / "fine", QuantSpec(group_size=32))
    assert refit(fine_groups, target("gguf:mixed")) is None
    assert not (frozen.run / "refits").exists() and not (fine_groups.run / "refits").exists()
