"""Calibrate: run an estimator over sequences of text, leave the model as it was, and keep every number."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError, ConfigError, nearest
from . import gnb
from .table import Sensitivity, TensorSensitivity

Forward = Callable[[Tensor], Tensor]
"""Token ids [1, T] -> logits [1, T, V]."""

Estimator = Callable[[Forward, Mapping[str, nn.Parameter], Tensor, int], dict[str, float]]
"""(forward, weights, ids [T], seed) -> module path -> one positive sample of that tensor's trace."""

ESTIMATORS: dict[str, Estimator] = {"gnb": gnb.traces}
"""Every estimator by its name: one a file, one line here."""


def calibrate(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    sequences: Tensor,
    *,
    estimator: str = "gnb",
    seed: int = 0,
    forward: Forward | None = None,
    fingerprint: Mapping[str, Any] | None = None,
) -> Sensitivity:
    """Estimate how curved the loss is along every tensor of ``weights``, one pass a sequence for all of them.

    The model runs as in ``eval()``, with gradients on, whatever the caller's mode, and is left as it was:
    modes, ``requires_grad`` and ``.grad`` included. Only one gradient is alive at a time.

    Args:
        model: any causal language model; the Parameters of ``weights`` are among its own.
        weights: module path -> weight matrix, at least one; bf16 and fp16 weights are fine.
        sequences: token ids [K, T], K >= 2 of equal length T >= 2; the last token of each predicts nothing.
        estimator: a key of ``ESTIMATORS``.
        seed: of the random probes, which depend on it and on the content of a sequence, and not on its place.
        forward: token ids [1, T] -> logits [1, T, V]; None means ``model(input_ids=ids).logits``.
        fingerprint: what identifies the model (path, commit, hashes), kept in the artefact as it is.

    Raises:
        ConfigError: an unknown estimator.
        CalibrationError: too few or too short sequences, two names for one tied weight, or a tensor whose sample
            is zero or not finite (the logits do not depend on it, or not on every sequence): named, never clipped.
    """
    if estimator not in ESTIMATORS:
        raise ConfigError(f"unknown estimator {estimator!r}: {nearest(estimator, ESTIMATORS)}")
    from ..progress import track  # here, so that listing the recipes needs torch alone

    _check(model, weights, sequences)
    sample = ESTIMATORS[estimator]
    started = time.perf_counter()
    rows: list[dict[str, float]] = []
    with _prepared(model, weights):
        ids = sequences.to(next(iter(weights.values())).device, copy=True)
        run = forward or (lambda batch: model(input_ids=batch).logits)
        for k, row in enumerate(track(ids, "calibrating", total=len(ids))):
            try:
                rows.append(sample(run, weights, row, seed))
            except CalibrationError as error:
                raise CalibrationError(f"sequence {k} of {len(ids)}: {error}") from None
    return Sensitivity(
        estimator=estimator,
        seed=seed,
        sequences=len(rows),
        scored_positions=len(rows) * (sequences.shape[1] - 1),
        model=dict(fingerprint or {}),
        tensors={
            path: TensorSensitivity.of(path, weight.numel(), _column(rows, path)) for path, weight in weights.items()
        },
        seconds=time.perf_counter() - started,
    )


def _check(model: nn.Module, weights: Mapping[str, nn.Parameter], sequences: Tensor) -> None:
    if not weights:
        raise CalibrationError("no tensors to calibrate: pass module path -> weight Parameter")
    if sequences.dim() != 2 or sequences.is_floating_point() or sequences.is_complex():
        raise CalibrationError(
            f"sequences must be integer token ids [K, T], got {sequences.dtype} of shape {list(sequences.shape)}"
        )
    count, length = sequences.shape
    if count < 2 or length < 2:
        raise CalibrationError(
            f"calibration needs at least 2 sequences of at least 2 tokens, got {count} of {length}: "
            "use more text (64 sequences are usual), or shorter sequences"
        )
    own = {id(parameter) for parameter in model.parameters()}
    seen: dict[int, str] = {}
    for path, weight in weights.items():
        if id(weight) not in own:
            raise CalibrationError(f"{path}: this weight is not a Parameter of the model")
        if not weight.is_floating_point() or weight.is_meta:
            raise CalibrationError(
                f"{path}: needs a floating-point weight with data, got {weight.dtype} on {weight.device}"
            )
        if id(weight) in seen:
            raise CalibrationError(
                f"{path}: the same (tied) weight as {seen[id(weight)]}; pass it once, its trace covers both uses"
            )
        seen[id(weight)] = path


@contextlib.contextmanager
def _prepared(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Evaluation mode, gradients on, the weights differentiable; all as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    frozen = [weight for weight in weights.values() if not weight.requires_grad]
    try:
        for module, _ in modes:
            module.training = False  # not model.eval(): a module that acts on the switch would not act back
        for weight in frozen:
            weight.requires_grad_(True)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for weight in frozen:
            weight.requires_grad_(False)


def _column(rows: list[dict[str, float]], path: str) -> list[float]:
    """The samples of one tensor, each positive and finite.

    Raises:
        CalibrationError: one that is not; the tensor, the sequence and the likely cause are named.
    """
    samples = [row.get(path, 0.0) for row in rows]
    bad = [k for k, sample in enumerate(samples) if not (math.isfinite(sample) and sample > 0.0)]
    if not bad:
        return samples
    where = f"{path}: sequence {bad[0]}" + (f" (and {len(bad) - 1} others of {len(samples)})" if bad[1:] else "")
    if all(path not in row for row in rows):
        reason = "the model's output does not depend on this tensor; leave it out"
    elif samples[bad[0]] == 0.0:
        reason = (
            "its gradient is exactly zero there: dead weights, an expert that no token reached, or an underflow in "
            f"{'low' if len(bad) < len(samples) else 'the'} precision; use longer sequences or fp32, or leave it out"
        )
    else:
        reason = "the backward pass overflowed; calibrate in fp32"
    raise CalibrationError(f"{where}: trace sample {samples[bad[0]]}: {reason}")
