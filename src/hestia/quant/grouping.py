"""Groups: which weights of a matrix share one scale.

A weight ``[O, I]`` is viewed as ``[R, G, N]``: R rows, G groups a row, N consecutive inputs a group.

    group_size   R   G     N
    "tensor"     1   1     O*I
    "row"        O   1     I
    n            O   I/n   n

The view never copies a contiguous weight and never crosses a row unless the whole tensor is the group.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..errors import ConfigError

GroupSize = int | Literal["row", "tensor"]


def check_group_size(group_size: GroupSize) -> GroupSize:
    """``group_size`` itself if it is "row", "tensor" or a positive integer.

    Raises:
        ConfigError: anything else.
    """
    if group_size in ("row", "tensor"):
        return group_size
    if isinstance(group_size, int) and not isinstance(group_size, bool) and group_size > 0:
        return group_size
    raise ConfigError(f"group_size must be 'row', 'tensor' or a positive integer, got {group_size!r}")


def group_shape(shape: tuple[int, int], group_size: GroupSize) -> tuple[int, int, int]:
    """``(R, G, N)`` for a weight of ``shape`` (out_features, in_features).

    Raises:
        ConfigError: the group does not divide the row; the message lists common groups that do.
    """
    rows, columns = shape
    check_group_size(group_size)
    if group_size == "tensor":
        return 1, 1, rows * columns
    if group_size == "row":
        return rows, 1, columns
    assert isinstance(group_size, int)
    if columns % group_size:
        fitting = [n for n in (256, 128, 64, 32, 16) if columns % n == 0]
        groups = f"Groups that do: {', '.join(map(str, fitting))} and 'row'." if fitting else "Write 'row'."
        raise ConfigError(f"group_size={group_size} does not divide in_features={columns}. {groups}")
    return rows, columns // group_size, group_size


def to_groups(w_OI: Tensor, group_size: GroupSize) -> Tensor:
    """View a weight ``[O, I]`` as ``[R, G, N]`` (see the table at the top of this file)."""
    return w_OI.reshape(group_shape((w_OI.shape[0], w_OI.shape[1]), group_size))
