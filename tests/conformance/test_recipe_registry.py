"""A recipe that someone else wrote is found, configured and refused like our own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
import torch
from conformance import logits
from toy_models import qwen2, tied_llama

import hestia
from hestia import recipes
from hestia.errors import ConfigError
from hestia.quant import AbsMax, ClippedSTE, Grid, GroupSize, QuantSpec, family
from hestia.quant.family import Member
from hestia.schedules import KnobSchedule


class EntryPoint:
    """What ``importlib.metadata`` hands out for ``[project.entry-points."hestia.recipes"]``."""

    name = "third_party"

    @staticmethod
    def load() -> type[recipes.Recipe]:
        """Defining the class registers it, as importing its module would."""

        @dataclass(frozen=True, kw_only=True)
        class ThirdParty(recipes.Recipe):
            """A slow ramp onto a clipped grid, by someone else."""

            name: ClassVar[str] = "third_party"
            widths: ClassVar[tuple[float, ...]] = (1.58, 2.0)
            rho: float = 0.5
            margin: float = 0.25
            steps: int = 3
            hold: float | None = None
            decay: Literal["cosine", "linear"] = "linear"

            def _spec(self, grid: Grid, group_size: GroupSize) -> QuantSpec:
                estimator = ClippedSTE(margin=self.margin)
                return QuantSpec(grid=grid, group_size=group_size, scale=AbsMax(), estimator=estimator)

            def schedule(self) -> KnobSchedule:
                return KnobSchedule(rho=self.rho, temperature=0.0, hold=self.hold, decay=self.decay)

        return ThirdParty


@pytest.fixture
def third_party(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a recipe that another package offers, for the length of one test."""
    recipes.names()
    members = dict(Member._registry["recipe"])
    monkeypatch.setattr(family, "entry_points", lambda group: [EntryPoint] if group == "hestia.recipes" else [])
    family.load_packages.cache_clear()
    yield EntryPoint.name
    family.load_packages.cache_clear()
    Member._registry["recipe"] = members


def test_a_third_party_recipe_is_discovered_and_quantizes(third_party: str) -> None:
    assert third_party in recipes.names()
    model = tied_llama()
    plan = hestia.plan(model, third_party, bits=2.0, options={"margin": 0.5, "rho": 1, "hold": 0.5})
    assert plan.recipe == {
        "name": third_party, "rho": 1, "margin": 0.5, "steps": 3, "hold": 0.5, "decay": "linear",
    }  # fmt: skip
    assert all(layer.spec.estimator == ClippedSTE(margin=0.5) for layer in plan.layers.values())
    hestia.apply(model, plan).eval()
    before = logits(model)
    frozen = hestia.freeze(model)
    assert torch.equal(logits(model), before)
    assert all(set(t.codes.unique().tolist()) <= {-2, -1, 0, 1} for t in frozen.values())


def test_it_disappears_with_its_package() -> None:
    assert EntryPoint.name not in recipes.names()


def test_a_recipe_object_serves_as_well_as_its_name(third_party: str) -> None:
    recipe = recipes.get(third_party, margin=0.75)
    model = qwen2()
    assert hestia.plan(model, recipe) == hestia.plan(model, third_party, options={"margin": 0.75})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margn": 0.5}, r"'third_party' has no option 'margn': did you mean 'margin'\?"),
        ({"margin": "wide"}, "option margin wants float, got 'wide'"),
        ({"margin": True}, "option margin wants float, got True"),
        ({"margin": float("nan")}, "option margin wants float, got nan"),
        ({"steps": 2.5}, "option steps wants int, got 2.5"),
        ({"hold": "never"}, r"option hold wants float \| None, got 'never'"),
        ({"decay": "cosin"}, r"option decay: unknown 'cosin': did you mean 'cosine'\?"),
        ({"rho": 1.5}, r"rho is a share of the run in \[0, 1\], got 1.5"),
    ],
)
def test_a_bad_option_is_refused_before_anything_is_computed(
    third_party: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        recipes.get(third_party, **options)


def test_an_unknown_name_gives_the_nearest() -> None:
    for name in recipes.names():
        with pytest.raises(ConfigError, match=f"unknown recipe '{name}x': did you mean '{name}'"):
            recipes.get(name + "x")


def test_an_unknown_option_gives_the_options_there_are() -> None:
    for name in recipes.names():
        with pytest.raises(ConfigError, match=f"recipe '{name}' has no option 'no_such_option'"):
            recipes.get(name, no_such_option=1)


def test_a_width_that_a_recipe_does_not_do_is_refused_with_those_it_does() -> None:
    for name in recipes.names():
        recipe = recipes.get(name)
        for bits in {*recipes.GRIDS, 1.9} - set(recipe.widths):
            with pytest.raises(ConfigError, match=f"recipe '{name}' does not do {bits:g} bits; it does "):
                recipe.spec_for(bits, "row")


def test_default_options_travel_as_json() -> None:
    for name in recipes.names():
        recipe = recipes.get(name)
        assert recipes.Recipe.from_json(recipe.to_json()) == recipe
