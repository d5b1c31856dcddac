"""The plan: complete, readable, and refused before any training where it could not be delivered after it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy_models import LINEAR, OTHER, gemma, gpt2, llama, mixtral, qwen2, qwen2_moe, tied_llama
from transformers import PreTrainedModel

import hestia
from hestia import recipes
from hestia.curvature import Sensitivity, TensorSensitivity, hestia_scores
from hestia.curvature.show import damage_per_megabit
from hestia.errors import CalibrationError, ConfigError, PlanError
from hestia.mixed import candidates
from hestia.targets import TARGETS


def smollm() -> PreTrainedModel:
    """The widths of SmolLM-135M (576 and 1536) without its weights."""
    with torch.device("meta"):
        return tied_llama(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_attention_heads=9,
            num_key_value_heads=3,
        )


def wide() -> PreTrainedModel:
    """Rows that 256 divides."""
    with torch.device("meta"):
        return llama(hidden_size=256, intermediate_size=512)


def measured(plan: hestia.Plan) -> Sensitivity:
    """A sensitivity of exactly the plan's tensors: the k-th has the trace 10^k."""
    tensors = {
        path: TensorSensitivity.of(path, layer.weights, [0.5 * 10.0**k, 2.0 * 10.0**k])
        for k, (path, layer) in enumerate(plan.layers.items())
    }
    return Sensitivity(estimator="gnb", seed=0, sequences=2, scored_positions=14, tensors=tensors)


# --- what a plan says ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*LINEAR, "mixtral", "qwen2_moe"])
def test_the_plan_accounts_for_every_parameter_once(name: str) -> None:
    model = {**LINEAR, **OTHER}[name]()
    plan = hestia.plan(model, allow_partial=True)
    names = [f"{path}.weight" for path in plan.layers] + list(plan.kept)
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    total = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    assert plan.quantized_weights + plan.kept_weights == total
    for path, layer in plan.layers.items():
        assert layer.shape == tuple(model.get_parameter(f"{path}.weight").shape)
        assert plan.recipe["name"] == "hearth" and layer.temperature_factor == 1.0
    assert all(kept.reason for kept in plan.kept.values())


def test_a_plan_needs_no_weights() -> None:
    with torch.device("meta"):
        model = qwen2()
    assert hestia.plan(model) == hestia.plan(qwen2())


def test_the_same_model_has_the_same_plan() -> None:
    assert json.dumps(hestia.plan(gemma()).to_json()) == json.dumps(hestia.plan(gemma()).to_json())


def test_the_table_names_every_tensor_and_every_reason_and_adds_up() -> None:
    model = mixtral()
    plan = hestia.plan(model, target=["hf", "gguf:q4_0"], allow_partial=True)
    table = plan.table()
    for path, layer in plan.layers.items():
        row = next(line for line in table.splitlines() if line.startswith(path + " "))
        assert f"{layer.shape[0]} x {layer.shape[1]}" in row and "ternary" in row and "Q4_0" in row
    for reason in {kept.reason for kept in plan.kept.values()}:
        found = re.search(rf"kept: {re.escape(reason)} +(\d+) tensors +([\d,]+) weights", table)
        assert found is not None, reason
        same = [kept.weights for kept in plan.kept.values() if kept.reason == reason]
        assert (int(found[1]), int(found[2].replace(",", ""))) == (len(same), sum(same))
    assert f"quantized: {plan.quantized_weights:,} of {sum(p.numel() for p in model.parameters()):,} weights" in table
    assert "gguf:q4_0: 4.5000 bits per quantized weight" in table
    assert "WARNING: 49,152 weights are kept: MixtralExperts: not an nn.Linear" in table


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    model = qwen2()
    plan = hestia.plan(model, target=["hf", "gguf:q4_0"], skip=["*.k_proj"], group_size=32)
    plan = plan.with_factors({path: 1.0 + k / 7.0 for k, path in enumerate(plan.layers)})
    plan.save(tmp_path / "plan.json")
    again = hestia.Plan.load(tmp_path / "plan.json")
    assert again == plan and again.table() == plan.table()
    assert list(again.layers) == list(plan.layers) and list(again.kept) == list(plan.kept)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda r: r["layers"]["model.layers.1.mlp.up_proj"].update(shape=[1]), r"layers\.1\.mlp\.up_proj: "),
        (lambda r: r["layers"]["model.layers.1.mlp.up_proj"].pop("scale"), r"up_proj: missing key 'scale'"),
        (
            lambda r: r["layers"]["model.layers.1.mlp.up_proj"].update(temperature_factor=-1),
            "temperature_factor must be positive",
        ),
        (
            lambda r: r["layers"]["model.layers.1.mlp.up_proj"].update(estimator={"name": "sofmax"}),
            r"up_proj: unknown estimator 'sofmax': did you mean 'softmax'\?",
        ),
        (lambda r: r.pop("kept"), "missing key 'kept'"),
        (lambda r: r["targets"].append("gguf:tq3_0"), "unknown target 'gguf:tq3_0'"),
    ],
)
def test_a_damaged_plan_file_says_where(tmp_path: Path, spoil: Callable[[dict], object], message: str) -> None:
    record = hestia.plan(qwen2()).to_json()
    spoil(record)
    (tmp_path / "plan.json").write_text(json.dumps(record))
    with pytest.raises(PlanError, match=message):
        hestia.Plan.load(tmp_path / "plan.json")


# --- what a target cannot hold -------------------------------------------------------------------------------------


def test_rows_that_a_block_does_not_divide_are_refused_with_what_would_hold_them() -> None:
    with pytest.raises(PlanError) as caught:
        hestia.plan(smollm(), target="gguf:tq2_0")
    text = str(caught.value)
    assert "TQ2_0 stores rows in blocks of 256, which do not divide in_features=576" in text
    assert (
        "--fallback stores it as Q2_0" in text
        and "--target hf or hf:int4 or gguf:q2_0 or gguf:q4_0 or mlx would hold it" in text
    )
    assert "in model.layers.0.self_attn.q_proj, " in text and "and 8 more" in text
    assert "down_proj" not in text, "rows of 1536 are not the problem"


def test_what_was_suggested_is_accepted() -> None:
    for other in ("hf", "gguf:q2_0", "gguf:q4_0"):
        plan = hestia.plan(smollm(), target=other)
        assert {layer.stored[other] for layer in plan.layers.values()} == {TARGETS[other].types[0].name}
    assert hestia.plan(smollm(), target="gguf:q2_0").bits_per_weight("gguf:q2_0") == pytest.approx(2.25)
    plan = hestia.plan(smollm(), target="gguf:tq2_0", fallback=True)
    stored = {path.rpartition(".")[2]: layer.stored["gguf:tq2_0"] for path, layer in plan.layers.items()}
    assert stored.pop("down_proj") == "TQ2_0" and set(stored.values()) == {"Q2_0"}
    wide_rows, all_rows = 2 * 576 * 1536, plan.quantized_weights
    bits = (2.0625 * wide_rows + 2.25 * (all_rows - wide_rows)) / all_rows
    assert plan.bits_per_weight("gguf:tq2_0") == pytest.approx(bits)


def test_a_row_of_whole_blocks_needs_no_fallback() -> None:
    plan = hestia.plan(wide(), target=["gguf:tq2_0", "hf"])
    assert {layer.stored["gguf:tq2_0"] for layer in plan.layers.values()} == {"TQ2_0"}
    assert plan.bits_per_weight("gguf:tq2_0") == pytest.approx(2.0625)


def test_groups_finer_than_the_target_s_block_are_refused() -> None:
    with pytest.raises(PlanError, match=r"TQ2_0 has one scale for 256 weights, finer groups of 64 do not fit"):
        hestia.plan(wide(), target="gguf:tq2_0", group_size=64)


def test_levels_that_the_target_lacks_are_refused() -> None:
    with pytest.raises(
        PlanError,
        match=r"TQ2_0 cannot express the levels int2.*--target hf or hf:int4 or gguf:q2_0 or .* or mlx would hold",
    ):
        hestia.plan(wide(), target="gguf:tq2_0", bits=2.0)


@pytest.mark.parametrize(("group_size", "fitting"), [(128, "64, 32, 16 and 'row'"), (40, "64, 32, 16 and 'row'")])
def test_a_group_that_does_not_divide_names_tensors_and_groups_that_fit(group_size: int, fitting: str) -> None:
    with pytest.raises(PlanError) as caught:
        hestia.plan(smollm(), group_size=group_size)
    text = str(caught.value)
    assert f"group_size={group_size} does not divide in_features=576. Groups that do: {fitting}" in text
    assert "model.layers.0.self_attn.q_proj" in text
    assert hestia.plan(smollm(), group_size=64).quantized_weights > 0


@pytest.mark.parametrize("group_size", [0, -1, "column", 1.5])
def test_an_impossible_group_size_is_refused(group_size: object) -> None:
    with pytest.raises(ConfigError, match="group_size must be 'row', 'tensor' or a positive integer"):
        hestia.plan(qwen2(), group_size=group_size)  # type: ignore[arg-type]


def test_what_is_unknown_or_nothing_is_named() -> None:
    with pytest.raises(ConfigError, match=r"unknown recipe 'hestla': did you mean 'hestia'"):
        hestia.plan(qwen2(), "hestla")
    with pytest.raises(ConfigError, match=r"unknown target 'gguf:tq2': did you mean 'gguf:tq2_0'"):
        hestia.plan(qwen2(), target="gguf:tq2")
    with pytest.raises(ConfigError, match=r"has no option 'alpa': did you mean 'alpha'"):
        hestia.plan(qwen2(), "hestia", options={"alpa": 1.0})
    with pytest.raises(ConfigError, match="no file format is given; name one"):
        hestia.plan(qwen2(), target=[])
    with pytest.raises(ConfigError, match="bits must be a number, got '2'"):
        hestia.plan(qwen2(), bits="2")  # type: ignore[arg-type]


def test_options_beside_a_recipe_object_are_refused() -> None:
    recipe = recipes.get("hestia", alpha=0.1)
    with pytest.raises(
        ConfigError, match=r"options \{'alpha': -0\.4\} beside a recipe .*recipes\.get\('hestia', \.\.\.\)"
    ):
        hestia.plan(qwen2(), recipe, options={"alpha": -0.4})
    assert hestia.plan(qwen2(), recipe, options={}) == hestia.plan(qwen2(), recipe)


# --- coverage ------------------------------------------------------------------------------------------------------


def test_gpt2_is_refused_because_of_conv1d_whatever_is_allowed() -> None:
    for allowed in (False, True):
        with pytest.raises(PlanError, match=r"hestia quantizes nn\.Linear layers \(24,576 weights kept: Conv1D: not"):
            hestia.plan(gpt2(), allow_partial=allowed)


def test_under_half_is_refused_unless_allowed() -> None:
    with pytest.raises(PlanError, match=r"only 11 % .*49,152 weights kept: MixtralExperts: not an.*--allow-partial"):
        hestia.plan(mixtral())
    plan = hestia.plan(mixtral(), allow_partial=True)
    assert len(plan.layers) == 8 and len(plan.warnings) == 2
    assert len(hestia.plan(qwen2_moe()).warnings) == 2, "over half: allowed, but not silently"


def test_skipping_too_much_is_refused_and_says_what_was_skipped() -> None:
    with pytest.raises(PlanError, match=r"only 33 % .*12,288 weights kept: skipped by '\*\.mlp\.\*'"):
        hestia.plan(llama(), skip=["*.mlp.*"])
    assert len(hestia.plan(llama(), skip=["*.mlp.*"], allow_partial=True).layers) == 8
    with pytest.raises(PlanError, match="skipped by"):
        hestia.plan(llama(), skip=["*.layers.1.*"])  # one of two layers and the norms: a hair under half
    assert hestia.plan(llama(), skip=["*.layers.1.mlp.*"]).layers
    with pytest.raises(PlanError, match=r"skip pattern 'lm_haed' matches no linear layer"):
        hestia.plan(llama(), skip=["lm_haed"])


# --- curvature -----------------------------------------------------------------------------------------------------


def test_a_sensitivity_heats_the_sensitive_and_alpha_s_sign_turns_it_round() -> None:
    model = qwen2()
    table = measured(hestia.plan(model))
    scores = hestia_scores(table.values)
    for alpha in (0.4, -0.4, 0.0):
        plan = hestia.plan(model, "hestia", sensitivity=table, options={"alpha": alpha})
        for path, layer in plan.layers.items():
            assert layer.temperature_factor == pytest.approx(math.exp(alpha * scores[path]), rel=1e-12)
    factors = [layer.temperature_factor for layer in hestia.plan(model, "hestia", sensitivity=table).layers.values()]
    assert factors == sorted(factors) and factors[0] < factors[-1], "traces grow from tensor to tensor"


def test_centred_factors_have_geometric_mean_one() -> None:
    model = qwen2()
    table = measured(hestia.plan(model))
    plan = hestia.plan(model, "hestia", sensitivity=table, options={"centred": True})
    logs = [math.log(layer.temperature_factor) for layer in plan.layers.values()]
    assert sum(logs) == pytest.approx(0.0, abs=1e-12) and max(logs) > 0.05
    assert plan.recipe == {**recipes.get("hestia").to_json(), "centred": True}


def test_a_sensitivity_may_be_a_file_an_object_or_numbers(tmp_path: Path) -> None:
    model = qwen2()
    table = measured(hestia.plan(model))
    table.save(tmp_path / "sensitivity.json")
    plans = [
        hestia.plan(model, "hestia", sensitivity=given)
        for given in (tmp_path / "sensitivity.json", str(tmp_path / "sensitivity.json"), table, table.values)
    ]
    assert all(plan == plans[0] for plan in plans[1:]) and plans[0] != hestia.plan(model, "hestia")


def test_a_recipe_without_temperatures_ignores_curvature() -> None:
    model = qwen2()
    plan = hestia.plan(model, "bitnet_ste", sensitivity=measured(hestia.plan(model)))
    assert plan == hestia.plan(model, "bitnet_ste")


def test_a_skipped_tensor_may_have_been_measured_and_does_not_count() -> None:
    model = qwen2()
    table = measured(hestia.plan(model))
    plan = hestia.plan(model, "hestia", sensitivity=table, skip=["*.v_proj"])
    left = {path: trace for path, trace in table.values.items() if path in plan.layers}
    assert len(left) == 12 and plan == hestia.plan(model, "hestia", sensitivity=left, skip=["*.v_proj"])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: qwen2(num_hidden_layers=1),
            r"lacks 7 of 14 tensors, the first is model\.layers\.1\.self_attn\.q_proj",
        ),
        (lambda: qwen2(num_hidden_layers=3), r"7 tensors that the model has not, the first is model\.layers\.2\.self_"),
        (
            lambda: qwen2(intermediate_size=96),
            r"measured 3,072 weights in model\.layers\.0\.mlp\.gate_proj, the model has 2,048",
        ),
    ],
)
def test_the_sensitivity_of_another_model_is_refused(other: Callable[[], PreTrainedModel], message: str) -> None:
    with pytest.raises(PlanError, match=message + r".*: was it calibrated on another model\?"):
        hestia.plan(qwen2(), "hestia", sensitivity=measured(hestia.plan(other())))


def test_a_table_that_says_of_which_model_it_is_is_held_to_it() -> None:
    table = replace(measured(hestia.plan(qwen2())), model={"hidden_size": 4096, "name": "elsewhere"})
    with pytest.raises(PlanError, match=f"hidden_size 4096, this one has {qwen2().config.hidden_size}"):
        hestia.plan(qwen2(), sensitivity=table)
    renamed = replace(table, model={"name": "elsewhere", "commit": "abc"})
    assert hestia.plan(qwen2(), sensitivity=renamed).layers, "a copy under another name is the same model"


def test_a_damage_is_no_curvature() -> None:
    model = qwen2()
    damage = replace(measured(hestia.plan(model)), estimator="kl", primary="kl:ternary")
    with pytest.raises(
        PlanError, match=r"'hestia' paces its temperatures by curvature, .* 'kl:ternary'.* gnb, or choo"
    ):
        hestia.plan(model, "hestia", sensitivity=damage)
    assert hestia.plan(model, "hearth", sensitivity=damage) == hestia.plan(model, "hearth")
    eigenvalues = replace(damage, estimator="eigen", primary="eigenvalue")
    assert hestia.plan(model, "hestia", sensitivity=eigenvalues).layers


def test_a_sensitivity_that_is_not_positive_is_refused() -> None:
    model = qwen2()
    traces = dict.fromkeys(hestia.plan(model).layers, 1.0)
    path = list(traces)[5]
    with pytest.raises(CalibrationError, match=re.escape(path)):
        hestia.plan(model, "hestia", sensitivity={**traces, path: 0.0})
    with pytest.raises(ConfigError, match=r"no\.json"):
        hestia.plan(model, "hestia", sensitivity="no.json")


def test_factors_of_a_plan_can_be_replaced() -> None:
    plan = hestia.plan(qwen2())
    first, *rest = plan.layers
    changed = plan.with_factors({first: 1.5})
    assert changed.layers[first] == replace(plan.layers[first], temperature_factor=1.5)
    assert all(changed.layers[path] == plan.layers[path] for path in rest)


# --- several widths ------------------------------------------------------------------------------------------------


def candidates_of(plan: hestia.Plan, group_size: object = "row") -> Sensitivity:
    """A sensitivity with a damage for every width: later tensors hurt more, and each bit less hurts fourfold."""
    grids = {grid.name: (width, grid) for width, grid in recipes.GRIDS.items()}
    spec = {"scale": {"name": "gaussian"}, "estimator": {"name": "ste"}, "group_size": group_size}
    tensors = {}
    for k, (path, layer) in enumerate(plan.layers.items()):
        others = {f"quadratic:{n}": [2.0 ** (k + 1 - 2 * w) * x for x in (0.5, 1.5)] for n, (w, _) in grids.items()}
        tensors[path] = TensorSensitivity.of(path, layer.weights, [1.0 + k, 2.0 + k], others=others)
    return Sensitivity(
        estimator="gnb",
        seed=0,
        sequences=2,
        scored_positions=14,
        tensors=tensors,
        candidates={name: {"levels": list(grid.values), **spec} for name, (_, grid) in grids.items()},
    )


def test_a_number_of_bits_that_is_no_width_is_a_budget_spent_where_it_hurts() -> None:
    model = wide()
    table = candidates_of(hestia.plan(model))
    plan = hestia.plan(model, target="gguf:mixed", bits=1.9, sensitivity=table)
    spending = plan.spending
    assert spending is not None and spending.asked_bits == 1.9 and spending.bits <= 1.9
    assert plan.bits_per_weight("gguf:mixed") == pytest.approx(spending.bits), "nothing is kept at this budget"
    damages = [layer.damage for layer in plan.layers.values()]
    assert None not in damages and spending.predicted_kl == pytest.approx(sum(d for d in damages if d is not None))
    for path, layer in plan.layers.items():
        width = next(w for w, grid in recipes.GRIDS.items() if grid == layer.spec.grid)
        assert layer.damage == pytest.approx(0.5 * table.means(f"quadratic:{layer.spec.grid.name}")[path])
        assert layer.spec == recipes.get("hearth").mixed_spec(width, "row")
        narrow = TARGETS["gguf:mixed"].storage(layer.spec.grid, "row", layer.shape, fallback=False)
        assert layer.stored == {"gguf:mixed": narrow.name}
    assert len({layer.spec.grid.name for layer in plan.layers.values()}) > 1
    for layer in range(2):
        for tied in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            chosen = [plan.layers[f"model.layers.{layer}.{name}"] for name in tied]
            assert len({(c.spec.grid, c.stored["gguf:mixed"]) for c in chosen}) == 1, "fused kernels have one type"
    uniform = 0.5 * sum(table.means("quadratic:ternary").values())
    assert spending.predicted_kl < uniform
    bits = [point[0] for point in spending.curve]
    assert bits == sorted(bits) and bits[0] <= spending.bits <= bits[-1]


def test_the_same_sensitivity_gives_the_same_mixed_plan_and_it_survives_its_file(tmp_path: Path) -> None:
    model = wide()
    table = candidates_of(hestia.plan(model))
    turned = replace(table, tensors=dict(reversed(table.tensors.items())))
    plans = [hestia.plan(model, target="gguf:mixed", bits=1.9, sensitivity=given) for given in (table, table, turned)]
    assert plans[0] == plans[1]
    assert {p: layer.spec for p, layer in plans[2].layers.items()} == {p: x.spec for p, x in plans[0].layers.items()}
    plans[0].save(tmp_path / "plan.json")
    again = hestia.Plan.load(tmp_path / "plan.json")
    assert again == plans[0] and again.table() == plans[0].table()
    assert "asked for at most 1.9 bits" in again.table() and "half of dW' G dW (gnb, 2 sequences)" in again.table()
    record = json.loads((tmp_path / "plan.json").read_text())
    del record["spending"]["source"]
    with pytest.raises(PlanError, match="missing key 'source'"):
        hestia.Plan.from_json(record)


def test_what_the_allocation_keeps_says_so_and_every_weight_is_still_accounted_for() -> None:
    model = wide()
    table = candidates_of(hestia.plan(model))
    plan = hestia.plan(model, target="hf", bits=4.0, widths=(1.58, 2.0, 16.0), sensitivity=table, allow_partial=True)
    kept = {name for name, why in plan.kept.items() if why.reason.startswith("kept by the allocation: ")}
    assert kept and plan.spending is not None and plan.spending.bits <= 4.0
    names = [f"{path}.weight" for path in plan.layers] + list(plan.kept)
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    with pytest.raises(PlanError, match=r"only \d+ % of the non-embedding weights"):
        hestia.plan(model, target="hf", bits=29.0, widths=(1.58, 16.0), sensitivity=table)


def test_widths_that_the_target_cannot_hold_are_left_out_by_name() -> None:
    model = wide()
    table = candidates_of(hestia.plan(model))
    plan = hestia.plan(model, target="hf", bits=2.5, sensitivity=table)
    assert plan.spending is not None and set(plan.spending.left_out) == {"3", "4"}
    assert "4 bits left out: pack-quantized 2-bit cannot express the levels int4" in plan.table()
    with pytest.raises(PlanError, match="pack-quantized 2-bit cannot express the levels int4"):
        hestia.plan(model, target="hf", bits=4.5, widths=(4.0,), sensitivity=table)


@pytest.mark.parametrize(("name", "dtype", "least"), [("hf", torch.bfloat16, 2.25), ("mlx", torch.float32, 3.0)])
def test_a_budget_is_held_by_the_file(name: str, dtype: torch.dtype, least: float) -> None:
    """Rows of 576 and 1536 share groups of 64; with the wide rows alone they would be longer."""
    model = smollm()
    model.config.dtype = dtype
    table = candidates_of(hestia.plan(model))
    with pytest.raises(PlanError, match=rf"ask for --bits {least:.2f}\d\d or more"):
        hestia.plan(model, target=name, bits=least - 0.1, sensitivity=table)
    plan = hestia.plan(model, target=name, bits=least + 2.0, widths=(2.0, 16.0), sensitivity=table)
    kept = sum(why.weights for why in plan.kept.values() if why.reason.startswith("kept by the allocation"))
    stored = plan.bits_per_weight(name) * plan.quantized_weights + 8 * dtype.itemsize * kept
    assert kept and plan.spending is not None
    assert (
        plan.spending.bits == pytest.approx(stored / (plan.quantized_weights + kept))
        and plan.spending.bits <= least + 2
    )


def test_a_budget_is_held_whichever_tensor_is_kept() -> None:
    """Without its rows of 344 the file has two scales per row of 512, not one."""
    with torch.device("meta"):
        model = llama(hidden_size=512, intermediate_size=344)
    whole = hestia.plan(model)
    narrow = {path for path, layer in whole.layers.items() if layer.shape[1] == 344}
    stored = whole.stored_bytes("hf") | {path: 4 * whole.layers[path].weights for path in narrow}
    budget = 8 * sum(stored.values()) / whole.quantized_weights
    damages = {path: {2.0: float(path in narrow)} for path in whole.layers}
    spent = hestia.plan(model, bits=budget, widths=(2.0, 16.0), damages=damages).spending
    assert spent is not None and spent.bits <= budget


def test_a_bound_on_the_damage_finds_the_cheapest_plan() -> None:
    model = wide()
    table = candidates_of(hestia.plan(model))
    reference = hestia.plan(model, target="gguf:mixed", bits=1.9, sensitivity=table).spending
    assert reference is not None
    found = hestia.plan(model, target="gguf:mixed", max_kl=reference.predicted_kl, sensitivity=table).spending
    assert found is not None and found.predicted_kl <= reference.predicted_kl and found.bits <= reference.bits


def test_a_mixed_plan_that_cannot_be_made_says_what_to_do() -> None:
    model = wide()
    table = candidates_of(hestia.plan(model))
    with pytest.raises(PlanError, match=r"needs a sensitivity: run `hestia calibrate MODEL --data TEXT"):
        hestia.plan(model, target="gguf:mixed", bits=1.9)
    with pytest.raises(PlanError, match=r"measured no damage of binary, ternary.*calibrate again"):
        hestia.plan(model, target="gguf:mixed", bits=1.9, sensitivity=measured(hestia.plan(model)))
    with pytest.raises(PlanError, match=r"in groups of row, the plan wants 128: calibrate again with --group-size 128"):
        hestia.plan(model, target="gguf:mixed", bits=5.1, group_size=128, sensitivity=table)
    with pytest.raises(PlanError, match=r"0\.3 bits per weight cannot be reached: .* ask for --bits \d\.\d+ or more"):
        hestia.plan(model, target="gguf:mixed", bits=0.3, sensitivity=table)
    with pytest.raises(PlanError, match=r"0\.3 bits .* ask for --bits \d\.\d+ or more, or try --target gguf:mixed$"):
        hestia.plan(model, target="gguf:q4_0", bits=0.3, sensitivity=table)
    with pytest.raises(PlanError, match="was it calibrated on another model"):
        hestia.plan(qwen2(), target="gguf:mixed", bits=2.5, sensitivity=table)


@pytest.mark.parametrize("bits", [0.0, -1.0, 33.0, math.nan])
def test_a_budget_that_no_file_has_is_refused(bits: float) -> None:
    model = wide()
    with pytest.raises((PlanError, ConfigError), match="bits must be a positive number"):
        hestia.plan(model, bits=bits, widths=(1.58, 4.0), sensitivity=candidates_of(hestia.plan(model)))


def test_the_damage_of_another_grid_is_taken_only_where_the_plan_says_so() -> None:
    """Sherry's 3:4 ternary hurts more than the plain one, and `hestia calibrate` measures the plain one."""
    model = wide()
    plain = candidates_of(hestia.plan(model))
    first = next(iter(plain.tensors))
    plan = hestia.plan(model, "sherry", bits=4.0, sensitivity=plain)
    assert plan.spending is not None and "; other grids measured: ternary, not ternary 3:4" in plan.spending.source
    assert plan.layers[first].damage == pytest.approx(0.5 * plain.means("quadratic:ternary")[first])

    own = candidates(recipes.get("sherry"), "row", None)
    assert list(own) == ["ternary 3:4"], "what a run calibrates with"
    tensors = {p: replace(t, others=t.others | {"quadratic:ternary 3:4": (6.0, 8.0)}) for p, t in plain.tensors.items()}
    measured_too = {**plain.candidates, **{label: spec.to_json() for label, spec in own.items()}}
    both = replace(plain, tensors=tensors, candidates=measured_too)
    plan = hestia.plan(model, "sherry", bits=4.0, sensitivity=both)
    assert plan.spending is not None and "other grids" not in plan.spending.source
    assert plan.layers[first].damage == 3.5


def test_measured_kl_goes_before_the_prediction_in_plan_and_table() -> None:
    model = wide()
    table = candidates_of(hestia.plan(model))
    tensors = {p: replace(t, others=t.others | {"kl:ternary": (1.0, 3.0)}) for p, t in table.tensors.items()}
    table = replace(table, tensors=tensors)
    plan = hestia.plan(model, target="gguf:mixed", bits=1.9, widths=(1.58, 4.0), sensitivity=table)
    assert plan.spending is not None and plan.spending.source.startswith("measured KL and half of dW' G dW")
    assert {x.damage for x in plan.layers.values() if x.spec.grid.name == "ternary"} == {2.0}
    assert damage_per_megabit(table, "ternary") == pytest.approx(
        {p: 2e6 / t.weights / (16 - math.log2(3)) for p, t in table.tensors.items()}
    )
    with pytest.raises(CalibrationError, match="no damage of 'int5' was measured, only trace, quadratic:binary"):
        damage_per_megabit(table, "int5")


@pytest.mark.parametrize("widths", [[5.0], [2.0, 1.5]])
def test_a_width_that_nobody_does_is_refused_by_name(widths: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"'hearth' does not do \d\.?\d? bits; it does 1, 1\.58, 2, 3, 4"):
        hestia.plan(wide(), bits=2.5, widths=widths)


def test_a_block_that_does_not_divide_a_row_is_refused_in_a_mixed_plan_too() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 66), torch.nn.Linear(66, 64))
    with pytest.raises(ConfigError, match=r"^1: grid ternary 3:4 counts its zeros in blocks of 4, .* in_features=66"):
        hestia.plan(model, "sherry", bits=9.0, widths=(1.58, 16.0), damages={p: {1.58: 1.0} for p in "01"})


def test_damages_may_be_the_caller_s_own() -> None:
    model = wide()
    damages = {path: {w: 4.0**-w for w in recipes.GRIDS} for path in hestia.plan(model).layers}
    plan = hestia.plan(model, "bitnet_ste", target="gguf:mixed", bits=2.0, widths=(1.58, 4.0), damages=damages)
    assert plan.spending is not None and plan.spending.source == "the caller's numbers"
    assert {layer.spec.grid.name for layer in plan.layers.values()} == {"ternary", "int4"}


def test_a_mixed_hestia_plan_keeps_the_paper_s_ternary_and_takes_the_measured_rule_from_two_bits() -> None:
    recipe = recipes.get("hestia")
    alone = {w: recipe.spec_for(w, "row").scale.name for w in recipe.widths}
    assert alone == {1.0: "absmean", 1.58: "absmean", 2.0: "absmean", 3.0: "gaussian", 4.0: "gaussian"}
    mixed = {w: recipe.mixed_spec(w, "row").scale.name for w in recipe.widths}
    assert mixed == {**alone, 2.0: "gaussian"}
    assert recipes.get("hestia", scale="gaussian").spec_for(1.58, "row").scale.name == "gaussian"


def test_a_level_fitted_to_soft_values_rounds_as_the_rule_that_was_measured() -> None:
    """``hearth`` trains with soft levels; its frozen weights are those that calibration rounded."""
    model = wide()
    plan = hestia.plan(model)
    table = candidates_of(plan)
    recipe = recipes.get("hearth")
    frozen = {
        name: {**spec, "scale": {**recipe.mixed_spec(width, "row").scale.to_json(), "soft": False}}
        for name, spec in table.candidates.items()
        for width, grid in recipes.GRIDS.items()
        if grid.name == name
    }
    made = hestia.plan(model, target="gguf:mixed", bits=1.9, sensitivity=replace(table, candidates=frozen))
    assert made.spending is not None and "other scale rules" not in made.spending.source
    other = {name: {**spec, "scale": {"name": "absmax"}} for name, spec in frozen.items()}
    made = hestia.plan(model, target="gguf:mixed", bits=1.9, sensitivity=replace(table, candidates=other))
    assert made.spending is not None and "binary (absmax, not twn), ternary (absmax, not twn)" in made.spending.source
