import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hestia.errors import ConfigError, PlanError
from hestia.plans import Kept, LayerPlan, Plan
from hestia.quant import BINARY, INT2, TERNARY, TWN, AbsMean, QuantSpec, Softmax
from hestia.schedules import KnobSchedule

HYBRID = {"hf": "pack-quantized 2-bit", "gguf:tq2_0": "TQ2_0"}
HEAD = "output head"


def small() -> Plan:
    return Plan(
        recipe={"name": "hestia", "alpha": 0.4},
        trains=True,
        targets=("hf", "gguf:tq2_0"),
        schedule=KnobSchedule(),
        layers={
            "a.q": LayerPlan(
                spec=QuantSpec(estimator=Softmax()), shape=(256, 256), temperature_factor=1.2, stored=HYBRID
            ),
            "a.up": LayerPlan(spec=QuantSpec(), shape=(64, 512), stored={**HYBRID, "gguf:tq2_0": "Q2_0"}),
        },
        kept={"embed": Kept(reason="embedding", weights=1000), "head": Kept(reason=HEAD, weights=500)},
        warnings=("experts are not nn.Linear",),
    )


def changed(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """The plan's JSON with one entry replaced, or removed if the value is ``...``."""
    record: dict[str, Any] = json.loads(json.dumps(small().to_json()))
    place = record
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return record


def test_through_a_file_and_back(tmp_path: Path) -> None:
    small().save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == small()


THIRD_PARTY = """
from dataclasses import dataclass
from typing import ClassVar

from hestia.quant import STE, AbsMean, QuantSpec
from hestia.recipes import Recipe
from hestia.schedules import KnobSchedule


@dataclass(frozen=True)
class Quiet(STE):
    name: ClassVar[str] = "quiet"


@dataclass(frozen=True)
class Loud(AbsMean):
    name: ClassVar[str] = "loud"


@dataclass(frozen=True, kw_only=True)
class Theirs(Recipe):
    name: ClassVar[str] = "theirs"

    def _spec(self, grid, group_size):
        return QuantSpec(grid=grid, group_size=group_size, scale=Loud(), estimator=Quiet())

    def schedule(self):
        return KnobSchedule()
"""


def test_a_plan_with_parts_of_another_package_is_read_by_a_process_that_asked_for_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "their_method.py").write_text(THIRD_PARTY)
    info = tmp_path / "their_method-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-method\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hestia.recipes]\ntheirs = their_method\n")
    record = small().to_json()
    record["layers"]["a.q"] |= {"estimator": {"name": "quiet"}, "scale": {"name": "loud", "eps": 1e-5}}
    (tmp_path / "plan.json").write_text(json.dumps(record))
    path = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"

    def run(script: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", path + script], capture_output=True, text=True, check=False)

    load = "from pathlib import Path; from hestia.plans import Plan; plan = Plan.load(Path(sys.path[0], 'plan.json'))"
    done = run(f"{load}; spec = plan.layers['a.q'].spec; print(spec.estimator.name, spec.scale.name)")
    assert done.stdout.split() == ["quiet", "loud"], done.stderr
    done = run("from hestia import recipes; print('theirs' in recipes.names(), recipes.get('theirs').name)")
    assert done.stdout.split() == ["True", "theirs"], done.stderr
    (tmp_path / "their_method.py").write_text("import nobody_has_this")
    done = run(load)
    assert "PlanError" in done.stderr and "a.q: the recipe 'theirs' of another package cannot be" in done.stderr


specs = st.builds(
    QuantSpec,
    grid=st.sampled_from([TERNARY, BINARY, INT2]),
    group_size=st.sampled_from(["row", "tensor", 64]),
    scale=st.sampled_from([AbsMean(), TWN(factor=0.7)]),
    estimator=st.just(Softmax()),
)
layers = st.builds(
    LayerPlan,
    spec=specs,
    shape=st.tuples(st.integers(1, 4096), st.integers(1, 64).map(lambda n: 64 * n)),
    temperature_factor=st.floats(1e-3, 1e3),
    stored=st.just({"hf": "pack-quantized 2-bit"}),
)


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(st.text(min_size=1, max_size=20), layers, min_size=1, max_size=4), st.floats(0, 1), st.floats(0, 10)
)
def test_any_plan_survives_json(found: dict[str, LayerPlan], rho: float, temperature: float) -> None:
    plan = Plan(
        recipe={"name": "hestia"},
        trains=True,
        targets=("hf",),
        schedule=KnobSchedule(rho=rho, temperature=temperature),
        layers=found,
        kept={},
    )
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_counts_and_stored_bits() -> None:
    plan = small()
    assert (plan.quantized_weights, plan.kept_weights) == (256 * 256 + 64 * 512, 1500)
    bits = (256 * 256 * 2.0625 + 64 * 512 * 2.25) / plan.quantized_weights
    assert plan.bits_per_weight("gguf:tq2_0") == pytest.approx(bits)


def test_the_table_accounts_for_every_weight() -> None:
    table = small().table()
    assert "quantized: 98,304 of 99,804 weights (98.5 %)" in table
    for expected in ("a.q", "256 x 256", "1.200", "TQ2_0", "embedding", HEAD, "WARNING: experts", "gguf:tq2_0: 2.1250"):
        assert expected in table


def test_an_empty_plan_prints() -> None:
    plan = Plan(recipe={}, trains=False, targets=("hf",), schedule=KnobSchedule(), layers={}, kept={})
    assert "quantized: 0 of 0" in plan.table()


def test_factors_that_are_not_named_become_one() -> None:
    plan = small().with_factors({"a.up": 0.5})
    assert {path: layer.temperature_factor for path, layer in plan.layers.items()} == {"a.q": 1.0, "a.up": 0.5}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("layers", "a.q", "shape"), ..., r"a\.q: missing key 'shape'"),
        (("layers", "a.q", "shape"), [1, 2, 3], r"a\.q: "),
        (("layers", "a.q", "temperature_factor"), 0.0, r"a\.q: temperature_factor must be positive"),
        (("layers", "a.q", "temperature_factor"), None, r"a\.q: "),
        (("layers", "a.q", "temperature_factor"), 1e6, r"a\.q: temperature_factor must be positive and finite"),
        (("layers", "a.q", "levels"), [0.1, 0.5], r"a\.q: grid levels"),
        (("layers", "a.q", "group_size"), "rows", r"a\.q: group_size must be"),
        (("layers", "a.q", "group_size"), 100, r"a\.q: group_size=100 does not divide in_features=256"),
        (("layers", "a.q", "scale"), {"name": "absmen"}, r"a\.q: unknown scale rule 'absmen': did you mean 'absmean'"),
        (
            ("layers", "a.q", "estimator"),
            {"name": "softmax", "heat": 1},
            r"a\.q: estimator 'softmax' has no option 'heat'",
        ),
        (("layers", "a.q", "stored"), {"hf": "pack-quantized 2-bit"}, r"a\.q: stored: gguf:tq2_0 has no type None"),
        (("layers", "a.q", "stored"), {**HYBRID, "hf": "TQ9_0"}, r"a\.q: stored: hf has no type 'TQ9_0'"),
        (("layers", "a.q", "group_size"), 128, r"a\.q: stored: TQ2_0 has one scale for 256 weights"),
        (("targets",), [], "at least one target"),
        (("targets",), ["hff"], "unknown target 'hff': did you mean 'hf'"),
        (("schedule",), {"rho": 2.0}, "rho is a share"),
        (("schedule",), {"speed": 2.0}, "speed"),
        (("kept",), ..., "missing key 'kept'"),
        (("itemsize",), 0, "itemsize must be the bytes of a number"),
        (("layers",), [], "plan"),
    ],
)
def test_a_damaged_plan_names_the_place(path: tuple[str, ...], value: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.from_json(changed(path, value))


def test_another_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(changed(("schema",), 2)), encoding="utf-8")
    with pytest.raises(ConfigError, match="schema 2, this version reads schema 1"):
        Plan.load(tmp_path / "plan.json")


def test_a_plan_that_names_no_item_size_is_of_two_bytes() -> None:
    assert Plan.from_json(changed(("itemsize",), ...)).itemsize == 2
