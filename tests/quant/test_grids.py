import math

import pytest
import torch

from hestia import recipes
from hestia.errors import ConfigError
from hestia.quant import BINARY, INT2, TERNARY, Grid, GroupSize, QuantSpec, Softmax
from hestia.quant.family import Member

SPARSE = Grid((-1, 0, 1), block=4)


def test_named_grids() -> None:
    assert [g.name for g in (BINARY, TERNARY, INT2)] == ["binary", "ternary", "int2"]
    assert [g.bits for g in (BINARY, TERNARY, INT2)] == pytest.approx([1.0, math.log2(3), 2.0])
    assert Grid.of([1, 0, -1, 0]) == TERNARY  # order and repetition do not matter
    assert Grid.of([-2, 0, 1]).name == "[-2, 0, 1]"


def test_fractions_move_into_the_unit() -> None:
    grid = Grid.of([-1.5, -0.5, 0.5, 1.5])
    assert (grid.levels, grid.unit, grid.values) == ((-3, -1, 1, 3), 0.5, (-1.5, -0.5, 0.5, 1.5))


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([1.0], "at least two"),
        ([], "at least two"),
        ([0.0, 1.0 / 3.0], "no common power-of-two step"),
        ([0.0, math.nan], "finite"),
        ([0.0, math.inf], "finite"),
        ([-129, 0], "int8"),
        ([0, 128], "int8"),
    ],
)
def test_impossible_levels_are_refused(levels: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Grid.of(levels)


def test_a_unit_must_be_a_power_of_two() -> None:
    with pytest.raises(ConfigError, match="power of two"):
        Grid((-1, 1), unit=0.3)
    with pytest.raises(ConfigError, match="ascending"):
        Grid((1, -1))


@pytest.mark.parametrize("grid", [BINARY, TERNARY, INT2, Grid.of([-1.5, -0.5, 0.5, 1.5]), Grid((-8, -1, 0, 3))])
def test_round_finds_the_nearest_level(grid: Grid) -> None:
    z = torch.linspace(-10, 10, 2001, dtype=torch.float64)
    distance = (z.unsqueeze(-1) - torch.tensor(grid.values, dtype=torch.float64)).abs()
    nearest, _ = distance.min(-1)
    torch.testing.assert_close((z - grid.round(z)).abs(), nearest, rtol=0, atol=1e-12)
    assert set(grid.round(z).tolist()) == set(grid.values)


def test_ties() -> None:
    """Consecutive integers round half to even, as clip(round(z)) does; other grids go down."""
    ties = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5])
    assert TERNARY.round(ties).tolist() == [-1, -1, 0, 0, 1]
    assert INT2.round(ties).tolist() == [-2, -2, 0, 0, 1]
    assert BINARY.round(torch.tensor([0.0, -0.0])).tolist() == [-1, -1]
    assert Grid((-4, 0, 4)).round(torch.tensor([-2.0, 2.0])).tolist() == [-4, 0]


@pytest.mark.parametrize("grid", [TERNARY, BINARY])
def test_rounding_leaves_its_argument_and_keeps_nan(grid: Grid) -> None:
    z = torch.tensor([0.7, math.nan, math.inf])
    rounded = grid.round(z)
    assert z[0].item() == pytest.approx(0.7)
    assert rounded[0] == rounded[2] == 1
    assert rounded[1].isnan()


@pytest.mark.parametrize(("levels", "block"), [((-1, 0, 1), 1), ((-2, -1, 0, 1), 4), ((-1, 1), 4)])
def test_blocks_with_a_zero_are_of_ternary_codes_and_of_two_or_more(levels: tuple[int, ...], block: int) -> None:
    with pytest.raises(ConfigError, match="is defined on -1, 0, 1"):
        Grid(levels, block=block)


def test_a_block_with_a_zero_keeps_nan() -> None:
    z = torch.tensor([[1.0, math.nan, 0.2, -3.0]])
    assert SPARSE.round(z).isnan().tolist() == [[False, True, False, False]]


def test_a_soft_value_cannot_keep_a_zero_in_every_block() -> None:
    with pytest.raises(ConfigError, match="cannot keep one zero in 4"):
        QuantSpec(grid=SPARSE, estimator=Softmax())


@pytest.mark.parametrize(("columns", "group"), [(66, "row"), (66, "tensor"), (12, 6), (64, 2)])
def test_blocks_with_a_zero_straddle_neither_rows_nor_groups(columns: int, group: GroupSize) -> None:
    with pytest.raises(ConfigError, match="counts its zeros in blocks of 4"):
        QuantSpec(grid=SPARSE, group_size=group).check_shape((2, columns))


def test_another_package_s_class_does_not_take_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same name as hestia's; one that is defined again where it was takes its own place."""
    known = type(recipes.get("twn"))  # which loads the family
    monkeypatch.setitem(Member._registry, "recipe", dict(Member._registry["recipe"]))
    with pytest.raises(ConfigError, match=r"two recipes are called 'twn'"):
        type(known.__name__, (known,), {"name": "twn", "__module__": "elsewhere", "__qualname__": known.__qualname__})
    assert Member._registry["recipe"]["twn"] is known
    own = {"name": "twn", "__module__": known.__module__, "__qualname__": known.__qualname__}
    again = type(known.__name__, (known,), own)
    assert Member._registry["recipe"]["twn"] is again
