import pytest
import torch

from hestia.errors import ConfigError
from hestia.quant.grouping import check_group_size, group_shape, to_groups


@pytest.mark.parametrize(
    ("group_size", "shape"), [("tensor", (1, 1, 48)), ("row", (4, 1, 12)), (12, (4, 1, 12)), (3, (4, 4, 3))]
)
def test_shapes(group_size: int, shape: tuple[int, int, int]) -> None:
    assert group_shape((4, 12), group_size) == shape


@pytest.mark.parametrize("group_size", ["tensor", "row", 3])
def test_a_view_that_returns_to_the_same_matrix(group_size: int) -> None:
    w = torch.arange(48.0).reshape(4, 12)
    grouped = to_groups(w, group_size)
    assert grouped.data_ptr() == w.data_ptr()
    assert torch.equal(grouped.reshape(4, 12), w)


def test_a_group_holds_consecutive_inputs_of_one_row() -> None:
    w = torch.arange(48.0).reshape(4, 12)
    assert to_groups(w, 3)[1, 2].tolist() == [18, 19, 20]


def test_a_group_that_does_not_divide_names_those_that_do() -> None:
    with pytest.raises(
        ConfigError, match=r"group_size=128 does not divide in_features=64\. Groups that do: 64, 32, 16"
    ):
        group_shape((4, 64), 128)
    with pytest.raises(ConfigError, match="Write 'row'"):
        group_shape((4, 43), 32)


@pytest.mark.parametrize("group_size", [0, -1, True, 1.5, "rows", None])
def test_what_is_no_group_size(group_size: object) -> None:
    with pytest.raises(ConfigError, match="'row', 'tensor' or a positive integer"):
        check_group_size(group_size)  # type: ignore[arg-type]
