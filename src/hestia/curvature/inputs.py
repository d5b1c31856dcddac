"""Second moments of what each layer is fed: the Hessian of its output error, up to a factor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import CalibrationError


@torch.no_grad()
def input_moments(model: nn.Module, paths: Sequence[str], sequences: Tensor) -> dict[str, Tensor]:
    """X'X / N ``[I, I]`` of every named linear layer, over all tokens of ``sequences`` [K, T]; fp32, one forward each.

    Raises:
        CalibrationError: a layer that no token reached.
    """
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = dict.fromkeys(paths, 0)

    def watch(path: str) -> object:
        def note(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].reshape(-1, arguments[0].shape[-1]).float()
            counts[path] += len(x)
            product = x.T @ x
            totals[path] = totals[path].add_(product) if path in totals else product

        return model.get_submodule(path).register_forward_pre_hook(note)

    handles: Mapping[str, object] = {path: watch(path) for path in paths}
    try:
        for ids in sequences:
            model(input_ids=ids[None])
    finally:
        for handle in handles.values():
            handle.remove()  # type: ignore[attr-defined]
    for path in paths:
        if not counts[path]:
            raise CalibrationError(f"{path}: no token reached this layer")
    return {path: totals[path] / counts[path] for path in paths}
