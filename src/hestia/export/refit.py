"""Scales re-fitted to a coarser grouping, for a target that cannot hold the run's own: asked for and measured.

A target with one scale for B weights cannot hold a model trained with a scale for every n < B of them. Then codes c'
and scales s' of the longer groups are fitted to the trained weights w = c s:

    s' = sum(c' w) / sum(c'^2)   over the group,   c' = Q(w / s'),   in turn from c' = c, and snap(s') at the end

which is least squares, monotone until the snap. The curvature of the finer groups as weights of the fit was measured
and makes it worse (docs/log.md). The tensor's gives the loss to expect, the sum over tensors of
1/2 trace / weights |w' - w|^2, beside the one that is measured on held-out text.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, PlanError
from ..files import replacing_folder, save_file
from ..quant.codes import QuantizedTensor
from ..quant.grids import Grid
from ..quant.grouping import to_groups
from ..quant.scales import SMALLEST_SCALE, snap
from ..targets import Target
from .frozen import CODES_FILE, MODEL_FOLDER, REFITS_FOLDER, FrozenModel, save_codes
from .huggingface import load, logits

_ROUNDS = 4


@dataclass(frozen=True)
class Refit:
    """What a refit changed.

    Attributes:
        folder: the refitted frozen model, laid out like a run: ``hestia verify FILE --against`` it.
        tensors: how many weights got coarser groups.
        group_size: what they got.
        relative_error: |w' - w| / |w| over those weights.
        codes_changed: share of their codes that moved.
        expected_loss: nats per token by curvature; None without sensitivity.
        nll_change: nats per token on the run's held-out text; None where it keeps none.
    """

    folder: Path
    tensors: int
    group_size: int
    relative_error: float
    codes_changed: float
    expected_loss: float | None
    nll_change: float | None

    def to_json(self) -> dict[str, Any]:
        """The ``refit`` object of an export's entry in report.json."""
        return {**vars(self), "folder": self.folder.name}


def refit_tensor(tensor: QuantizedTensor, grid: Grid, group_size: int) -> QuantizedTensor:
    """Least-squares codes and scales in groups of ``group_size`` for the weights that ``tensor`` stands for."""
    weight = to_groups(tensor.dense(), group_size)
    codes = to_groups(tensor.codes.float(), group_size)
    scale = weight.abs().amax(dim=-1, keepdim=True).clamp_min(SMALLEST_SCALE)
    for round_ in range(_ROUNDS + 1):
        if round_:
            codes = grid.round(weight / (scale * grid.unit)) / grid.unit
        power = (codes * codes).sum(dim=-1, keepdim=True)
        fitted = (codes * weight).sum(dim=-1, keepdim=True) / power.clamp_min(1.0)
        scale = torch.where((power > 0) & (fitted > 0), fitted, scale)
    scale = snap(scale, grid)
    return QuantizedTensor(codes.to(torch.int8).reshape(tensor.codes.shape), scale.squeeze(-1), group_size)


def refit(
    frozen: FrozenModel, target: Target, traces: Mapping[str, float] | None = None, text: Tensor | None = None
) -> Refit | None:
    """A copy of the frozen model that ``target`` holds, in RUN/refits/TARGET; None if it holds the model as it is.

    Args:
        frozen: the run's frozen model.
        target: the format it shall fit.
        traces: curvature by module path, for the loss to expect.
        text: held-out tokens ``[B, T]``, for the loss that is measured.

    Raises:
        PlanError: coarser groups do not help, because blocks do not divide the rows or levels do not fit.
    """
    storage = target.types[0]
    length = storage.block or (storage.groups[-1] if storage.groups else 0)
    changed: dict[str, QuantizedTensor] = {}
    error = power = moved = expected = 0.0
    weights = 0
    for path in frozen.quantized:
        tensor = frozen.codes(path)
        grid = tensor.grid()
        if _held(target, grid, tensor):
            continue
        refusal = storage.refusal(grid, length, tensor.shape)
        if refusal is not None or not isinstance(tensor.group_size, int) or tensor.group_size >= length:
            raise PlanError(f"{path}: coarser scales do not help: {refusal or 'its groups are long enough'}")
        new = refit_tensor(tensor, grid, length)
        changed[path] = new
        before, after = tensor.dense(), new.dense()
        lost = float((after - before).double().square().sum())
        error, power = error + lost, power + float(before.double().square().sum())
        moved += float((new.codes != tensor.codes).sum())
        weights += before.numel()
        if traces is not None:
            expected += 0.5 * traces.get(path, 0.0) / before.numel() * lost
    if not changed:
        return None
    folder = frozen.run / REFITS_FOLDER / target.name.replace(":", "-")
    _write(frozen, changed, folder)
    change = None
    if text is not None:
        change = _nll(folder / MODEL_FOLDER, text) - _nll(frozen.folder, text)
    return Refit(
        folder=folder,
        tensors=len(changed),
        group_size=length,
        relative_error=(error / power) ** 0.5 if power else 0.0,
        codes_changed=moved / max(1, weights),
        expected_loss=expected if traces is not None else None,
        nll_change=change,
    )


def _held(target: Target, grid: Grid, tensor: QuantizedTensor) -> bool:
    """Whether the target holds a tensor as it is."""
    try:
        target.storage(grid, tensor.group_size, tensor.shape, fallback=False)
    except PlanError:
        return False
    return True


def _nll(folder: Path, text: Tensor) -> float:
    values = logits(load(folder), text)[:, :-1].double().log_softmax(dim=-1)
    return -float(values.gather(-1, text[:, 1:].unsqueeze(-1)).mean())


def _write(frozen: FrozenModel, changed: Mapping[str, QuantizedTensor], folder: Path) -> None:
    """The run's model and codes with the changed weights in place."""
    if not (frozen.folder / "config.json").is_file():
        raise ConfigError(f"{frozen.run}: holds no frozen model")
    with replacing_folder(folder) as temporary:
        model = temporary / MODEL_FOLDER
        shutil.copytree(frozen.folder, model, ignore=shutil.ignore_patterns("*.safetensors"))
        names = {f"{path}.weight": path for path in changed}
        for source, tensors in frozen.shards().items():
            out = {
                name: changed[names[name]].dense(frozen.dtype) if name in names else frozen.tensor(name)
                for name in tensors
            }
            save_file(out, model / source, metadata={"format": "pt"})
        save_codes(temporary / CODES_FILE, {p: changed.get(p) or frozen.codes(p) for p in frozen.quantized})
