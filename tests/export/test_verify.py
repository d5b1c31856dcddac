"""Verification finds every change of a written file and names the tensor or file it is in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from frozen_runs import freeze, llama, qwen2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hestia.errors import VerifyError
from hestia.export import engines
from hestia.export.engines import compare_logits
from hestia.export.frozen import FrozenModel
from hestia.export.huggingface import export_hf, load
from hestia.export.huggingface_check import check_hf, json_differences
from hestia.export.verify import PROBE_FILE, Verification, detect_target, require_ok, run_of, verify


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[FrozenModel, Path]:
    """A frozen run with rows of 64 and 172 (so packed rows end in padding) and its exported folder."""
    root = tmp_path_factory.mktemp("made")
    frozen = freeze(llama(172), root / "run", dtype=torch.bfloat16)
    export_hf(frozen, root / "out")
    return frozen, root / "out"


@pytest.fixture
def copy(made: tuple[FrozenModel, Path], tmp_path: Path) -> tuple[FrozenModel, Path]:
    """The same run and a folder that a test may damage."""
    shutil.copytree(made[1], tmp_path / "out")
    return made[0], tmp_path / "out"


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Load model.safetensors, change it, write it back."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


# --- a good file ---------------------------------------------------------------------------------------------------


def test_good_file_passes_with_equal_logits(made: tuple[FrozenModel, Path]) -> None:
    frozen, out = made
    result = verify(out, frozen.run)
    assert result.ok and result.codes_equal and result.differences == ()
    assert (result.target, result.max_abs_logit_diff, result.kl) == ("hf", 0.0, 0.0)
    assert result.engine is not None and result.engine.startswith("transformers ")
    require_ok(result)
    record = json.loads(json.dumps(result.to_json()))
    assert record["codes_equal"] is True and {"max_abs_logit_diff", "kl", "engine"} <= record.keys()
    assert not verify(out, frozen.run, token_ids=torch.tensor([[1, 2, 3], [4, 5, 6]])).differences


def test_shards_untied_heads_and_biases_pass(tmp_path: Path) -> None:
    frozen = freeze(qwen2(), tmp_path / "run")
    export_hf(frozen, tmp_path / "out", max_shard_bytes=30_000)
    assert check_hf(tmp_path / "out", frozen) == []
    index = tmp_path / "out" / "model.safetensors.index.json"
    record = json.loads(index.read_text())
    first, second = sorted(set(record["weight_map"].values()))[:2]
    name = next(k for k, v in record["weight_map"].items() if v == first)
    record["weight_map"][name] = second
    index.write_text(json.dumps(record))
    assert check_hf(tmp_path / "out", frozen) == [
        f'model.safetensors.index.json: weight_map.{name} is "{second}", expected "{first}"'
    ]


def test_without_engine_only_bytes_are_compared(made: tuple[FrozenModel, Path]) -> None:
    result = verify(made[1], made[0].run, engine=False)
    assert result.ok and result.engine is None and result.max_abs_logit_diff is None and result.notes


# --- flipped bits --------------------------------------------------------------------------------------------------


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_any_flipped_bit_of_any_tensor_is_found_and_named(made: tuple[FrozenModel, Path], data: st.DataObject) -> None:
    frozen, out = made
    file = out / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    del header["__metadata__"]
    name = data.draw(st.sampled_from(sorted(header)))
    begin, end = header[name]["data_offsets"]
    position = data.draw(st.integers(begin, end - 1)) + 8 + length
    flipped = bytearray(raw)
    flipped[position] ^= 1 << data.draw(st.integers(0, 7))
    try:
        file.write_bytes(flipped)
        lines = check_hf(out, frozen)
    finally:
        file.write_bytes(raw)
    assert lines and all(line.startswith(f"{name}: ") for line in lines)


def test_flip_in_the_header_never_passes(copy: tuple[FrozenModel, Path]) -> None:
    frozen, out = copy
    raw = (out / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    for position in range(0, 8 + length, 331):
        flipped = bytearray(raw)
        flipped[position] ^= 1
        (out / "model.safetensors").write_bytes(flipped)
        try:
            lines = check_hf(out, frozen)
        except VerifyError:
            continue
        assert lines, f"byte {position} of the header: {raw[position : position + 1]!r}"


def test_index_of_the_first_difference(copy: tuple[FrozenModel, Path]) -> None:
    frozen, out = copy
    up, down = (f"model.layers.1.mlp.{part}_proj" for part in ("up", "down"))
    truth = frozen.codes(up).codes

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{up}.weight_packed"][3, 1] ^= 1 << 4  # input 16 + 2 of row 3
        tensors[f"{down}.weight_scale"][5, 0] *= 2
        tensors["model.norm.weight"][7] = 0.5

    rewrite(out, change)
    scale = frozen.codes(down).scales[5, 0].item()
    code = int(truth[3, 18])
    assert sorted(check_hf(out, frozen)) == [
        f"{down}.weight_scale: the scale of weight [5, 0] is {2 * scale:g}, the frozen model has {scale:g} "
        "(172 of 11008 weights)",
        f"{up}.weight_packed: code [3, 18] is {((code + 2) ^ 1) - 2}, the frozen model has {code} (1 of 11008 weights)",
        "model.norm.weight: element [7] is 0.5, the frozen model has 1",
    ]


def test_padding_must_stay_zero(copy: tuple[FrozenModel, Path]) -> None:
    frozen, out = copy
    name = "model.layers.0.mlp.down_proj.weight_packed"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][2, -1] |= 1 << 30  # 172 = 10 * 16 + 12

    rewrite(out, change)
    assert check_hf(out, frozen) == [f"{name}: row 2 has bits set after its last code"]


# --- tensors, files, configuration ---------------------------------------------------------------------------------


def test_missing_and_unexpected_tensors(copy: tuple[FrozenModel, Path]) -> None:
    frozen, out = copy

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]
        del tensors["model.layers.0.mlp.up_proj.weight_scale"]
        tensors["lm_head.weight"] = torch.zeros(2)
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].float()

    rewrite(out, change)
    assert check_hf(out, frozen) == [
        "model.layers.0.mlp.up_proj.weight_scale: missing",
        "model.norm.weight: missing",
        "lm_head.weight: unexpected tensor",
        "model.embed_tokens.weight: torch.float32 [96, 64], expected torch.bfloat16 [96, 64]",
    ]


def test_changed_configuration_and_files(copy: tuple[FrozenModel, Path]) -> None:
    frozen, out = copy
    config = json.loads((out / "config.json").read_text())
    config["rms_norm_eps"] = 1e-5
    config["quantization_config"]["ignore"] = []
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 4
    config["auto_map"] = {}
    (out / "config.json").write_text(json.dumps(config))
    (out / "tokenizer.json").write_text('{"version": "1.1"}\n')
    (out / "chat_template.jinja").unlink()
    (out / "modeling.py").write_text("")
    assert check_hf(out, frozen) == [
        "config.json: rms_norm_eps is 1e-05, expected 1e-06",
        "config.json: quantization_config.config_groups.group_0.weights.num_bits is 4, expected 2",
        'config.json: quantization_config.ignore is [], expected ["lm_head"]',
        "config.json: auto_map is unexpected",
        "chat_template.jinja: file missing",
        "modeling.py: unexpected file",
        "tokenizer.json: byte 15 differs from the frozen model's file (19 against 19 bytes)",
    ]


def test_what_no_loader_reads_is_a_note(copy: tuple[FrozenModel, Path]) -> None:
    """As a folder looks that was published and downloaded again."""
    frozen, out = copy
    (frozen.folder / "LICENSE").write_text("as the parent's")
    names = ("README.md", "LICENSE", "LICENSE-MODEL.txt", ".gitattributes", ".DS_Store", "figure.png")
    try:
        for name in (*names, ".cache/huggingface/download/config.json.metadata"):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text("x")
        result = verify(out, frozen.run, engine=False)
        assert result.ok and result.codes_equal and result.differences == ()
        assert result.notes[0].startswith("not as in the frozen model, but read by no loader: .DS_Store, .cache/")
        assert result.notes[0].endswith(" and 2 more")
        (out / "LICENSE").unlink()
        assert verify(out, frozen.run, engine=False).ok
        for name in ("adapter_config.json", "modeling.py", "notice.json", "tokenizer.model", "pytorch_model.bin"):
            (out / name).write_text("{}")
            assert check_hf(out, frozen) == [f"{name}: unexpected file"]
            (out / name).unlink()
        (out / "tokenizer_config.json").write_text("{}")
        result = verify(out, frozen.run, engine=False)
        assert not result.codes_equal and "tokenizer_config.json: byte 1 differs" in result.differences[0]
    finally:
        (frozen.folder / "LICENSE").unlink()


def test_failed_check_is_not_run_and_exits_three(copy: tuple[FrozenModel, Path]) -> None:
    frozen, out = copy
    name = "model.layers.0.self_attn.q_proj.weight_packed"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][0, 0] ^= 2

    rewrite(out, change)
    result = verify(out, frozen.run)
    assert not result.ok and not result.codes_equal and result.engine is None
    with pytest.raises(VerifyError, match=rf"{name}: code \[0, 0\]") as caught:
        require_ok(result)
    assert caught.value.exit_status == 3


# --- files that cannot be read -------------------------------------------------------------------------------------


def test_unreadable_files_are_one_clear_line(copy: tuple[FrozenModel, Path]) -> None:
    frozen, out = copy
    weights = out / "model.safetensors"
    raw = weights.read_bytes()

    def refused(match: str) -> None:
        with pytest.raises(VerifyError, match=match) as caught:
            verify(out, frozen.run)
        assert "\n" not in str(caught.value)

    for length in (0, 7, 300, len(raw) // 2, len(raw) - 1):
        weights.write_bytes(raw[:length])
        refused("model.safetensors: damaged or cut short")
    weights.unlink()
    refused("no .safetensors file")
    weights.write_bytes(raw)
    (out / "config.json").write_text("{")
    refused("not a readable JSON file")
    (out / "config.json").unlink()
    refused("no config.json")
    with pytest.raises(VerifyError, match="no such file"):
        verify(out / "nowhere", frozen.run)
    with pytest.raises(VerifyError, match="neither an exported folder nor"):
        verify(weights, frozen.run)
    with pytest.raises(VerifyError, match="folder cannot be gguf:tq2_0"):
        verify(out, frozen.run, target="gguf:tq2_0")
    with pytest.raises(VerifyError, match="transformers cannot load"):
        load(out)


# --- engines -------------------------------------------------------------------------------------------------------


def test_logits_that_differ_fail_and_nan_fails(made: tuple[FrozenModel, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    frozen, out = made
    true_logits = engines.logits
    for shift in (2e-5, float("nan")):
        calls: list[int] = []

        def shifted(model: Any, ids: torch.Tensor, shift: float = shift, calls: list[int] = calls) -> torch.Tensor:
            values = true_logits(model, ids)
            values[0, 3, 5] += shift if calls else 0.0  # the second of the two is the file
            calls.append(1)
            return values

        monkeypatch.setattr(engines, "logits", shifted)
        result = verify(out, frozen.run)
        assert result.codes_equal and not result.ok and "logits: differ by" in result.differences[0]


def test_the_text_that_a_run_keeps_gives_a_perplexity(made: tuple[FrozenModel, Path]) -> None:
    frozen, out = made
    result = verify(out, frozen.run)
    assert not {"nll", "head_nll_change"} & set(result.details)
    assert any("no perplexity" in note for note in result.notes)
    (frozen.run / PROBE_FILE).write_text(json.dumps({"schema": 1, "input_ids": [[1, 2, 3, 4], [5, 6, 7, 8]]}))
    try:
        result = verify(out, frozen.run)
    finally:
        (frozen.run / PROBE_FILE).unlink()
    assert result.details["tokens"] == 6, "of eight tokens two have no one to predict them"
    assert result.details["nll"]["frozen"] == result.details["nll"]["engine"] > 0


def test_a_file_inside_a_run_finds_it(made: tuple[FrozenModel, Path], tmp_path: Path) -> None:
    frozen, _ = made
    inside = frozen.run / "exports" / "gguf-tq2_0" / "a.gguf"
    assert run_of(inside) == frozen.run.resolve()
    assert run_of(tmp_path / "a.gguf") is None


def test_compare_logits_against_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 5, 11, generator=generator) for _ in range(2))
    largest, kl = compare_logits(a, b)
    p, q = a.double().softmax(-1), b.double().softmax(-1)
    assert largest == pytest.approx(float((a - b).abs().max()))
    assert kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-9)
    with pytest.raises(VerifyError, match="11"):
        compare_logits(a, b[..., :10])


@pytest.mark.parametrize("head", ["q8_0", "bf16"])
def test_gguf_is_held_to_what_its_rounding_explains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: str) -> None:
    """Without llama.cpp: the engine is played by the emulation, with noise on top that it does not explain."""
    from test_gguf import WIDE, make_run

    from hestia.export import tokenizer_check
    from hestia.export.gguf import export_gguf
    from hestia.targets import target

    frozen = make_run(tmp_path / "run", **WIDE)
    file = tmp_path / "model.gguf"
    record = export_gguf(frozen, target("gguf:tq2_0"), file, head=head)
    assert record["head"]["exact"] is False
    assert 1e-4 < record["head"]["tensors"]["token_embd.weight"]["relative_error"] < 0.02
    ids = torch.arange(40).reshape(2, 20) % 300
    seen: list[torch.Tensor] = []
    true_logits = engines.logits

    def remembered(model: Any, token_ids: torch.Tensor) -> torch.Tensor:
        seen.append(true_logits(model, token_ids))
        return seen[-1]

    monkeypatch.setattr(engines, "logits", remembered)
    monkeypatch.setattr(engines, "version", lambda package: "0.3")
    monkeypatch.setattr(engines.llama_cpp, "available", lambda: True)
    monkeypatch.setattr(tokenizer_check, "compare_tokenizers", lambda path, folder: tokenizer_check.Tokens(3, 3))
    monkeypatch.setattr(engines.llama_cpp, "logits_all", lambda path, ids: np.zeros((2, 20, 384), np.float32))
    assert not verify(file, frozen.run, token_ids=ids).ok
    exact, rounded, emulated = seen
    for noise, good in ((0.0, True), (0.3, False)):
        engine = (emulated + noise * torch.randn_like(emulated)).numpy()
        monkeypatch.setattr(engines.llama_cpp, "logits_all", lambda path, ids, engine=engine: engine)
        result = verify(file, frozen.run, token_ids=ids)
        assert result.ok is good and result.codes_equal and result.engine == "llama-cpp-python 0.3"
        assert result.kl is not None and (result.kl <= result.details["kl_bound"]) is good
    assert "its rounding of activations explains" in result.differences[0]
    assert result.details["kl_emulated"] == pytest.approx(compare_logits(exact, emulated)[1])
    change = engines.token_nll(rounded, ids).mean() - engines.token_nll(exact, ids).mean()
    assert result.details["head_nll_change"] == pytest.approx(float(change))
    monkeypatch.setattr(engines.llama_cpp, "available", lambda: False)
    result = verify(file, frozen.run, token_ids=ids)
    assert result.ok and result.engine is None
    skipped, rounds = result.notes
    assert rounds.startswith(f"token_embd.weight is stored as {head.upper()}, which rounds it (relative error 0.0")
    assert skipped == "llama-cpp-python not installed: engine check skipped"
    assert rounds in verify(file, frozen.run, engine=False).notes


def test_an_exact_head_costs_nothing_and_is_not_said_to_be_rounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_gguf import make_run

    from hestia.export import tokenizer_check
    from hestia.export.gguf import export_gguf
    from hestia.targets import target

    frozen = make_run(tmp_path / "run", dtype=torch.bfloat16)
    export_gguf(frozen, target("gguf:q2_0"), tmp_path / "a.gguf", head="bf16")
    ids = torch.arange(20).reshape(1, 20)
    engine = engines.logits(load(frozen.folder), ids).numpy()
    monkeypatch.setattr(engines, "version", lambda package: "0.3")
    monkeypatch.setattr(engines.llama_cpp, "available", lambda: True)
    monkeypatch.setattr(tokenizer_check, "compare_tokenizers", lambda path, folder: tokenizer_check.Tokens(3, 3))
    monkeypatch.setattr(engines.llama_cpp, "logits_all", lambda path, ids: engine)
    assert "head_nll_change" not in verify(tmp_path / "a.gguf", frozen.run, token_ids=ids).details


def test_target_of_a_gguf_file_comes_from_the_report_then_from_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hestia.export import gguf_check

    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(VerifyError, match=r"model\.gguf"):
        detect_target(file, tmp_path)
    monkeypatch.setattr(gguf_check, "file_target", lambda path: "gguf:q2_0")
    assert detect_target(file, tmp_path) == "gguf:q2_0"
    record = {"exports": [{"target": "hf", "path": "exports/hf"}, {"target": "gguf:q4_0", "path": str(file)}]}
    (tmp_path / "report.json").write_text(json.dumps(record))
    assert detect_target(file, tmp_path) == "gguf:q4_0"


def test_require_ok_counts_the_rest() -> None:
    bad = Verification("hf", False, ("a.weight: x", "b: y", "c: z"), None, None, None, ())
    with pytest.raises(VerifyError, match=r"hf is not the frozen model: a\.weight: x \(and 2 more\)"):
        require_ok(bad)


@pytest.mark.parametrize(("got", "want"), [(True, 1), (1, 1.0), (0, False)])
def test_numbers_and_flags_of_a_configuration_are_not_one_another(got: object, want: object) -> None:
    assert list(json_differences("config.json", {"a": got}, {"a": want}))
    assert not list(json_differences("config.json", {"a": got}, {"a": got}))
