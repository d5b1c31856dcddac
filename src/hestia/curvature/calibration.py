"""Calibrate: run an estimator over sequences of text until they suffice, and leave the model as it was."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import processes
from ..errors import CalibrationError
from ..quant import QuantSpec
from . import parallel
from .estimators import Candidates, CurvatureEstimator, Diagonals, Forward, GaussNewton, Problem, Row, quantity
from .partial import Partial, key_of
from .sensitivity import Sensitivity, TensorSensitivity
from .stopping import Stopping


def calibrate(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    sequences: Tensor,
    *,
    targets: Tensor | None = None,
    estimator: str | CurvatureEstimator = "gnb",
    candidates: Mapping[str, QuantSpec] | None = None,
    diagonals: int | str | None = None,
    stopping: Stopping | None = None,
    seed: int = 0,
    forward: Forward | None = None,
    fingerprint: Mapping[str, Any] | None = None,
    keep: Path | None = None,
) -> Sensitivity:
    """Estimate how curved the loss is along every tensor of ``weights``, one pass a sequence for all of them.

    The model runs as in ``eval()``, with gradients on, whatever the caller's mode, and is left as it was:
    modes, ``requires_grad`` and ``.grad`` included. Only one gradient is alive at a time.

    Under ``torch.distributed`` every process takes its share of the sequences and all return the same table.

    Args:
        model: any causal language model; the Parameters of ``weights`` are among its own.
        weights: module path -> weight matrix, at least one; bf16 and fp16 weights are fine.
        sequences: token ids [K, T], K >= 2 of equal length T >= 2; the last token of each predicts nothing.
        targets: bool [K, T], True where predicting the token counts, as in training (``data.Blocks.loss_mask``); a
            sequence without any is skipped. None: all count.
        estimator: one of ``CurvatureEstimator.names()``, or the object.
        candidates: label -> quantizer whose damage is measured in the same pass, one byte per weight and candidate.
        diagonals: group size of the per-group sums of squared gradients to keep, where the estimator has gradients to
            square (gnb, fisher); None keeps none.
        stopping: stop before all sequences are used; None uses all.
        seed: of the random probes, which depend on it and on the content of a sequence, and not on its place.
        forward: token ids [1, T] -> logits [1, T, V]; None means ``model(input_ids=ids).logits``.
        fingerprint: what identifies the model (path, commit, hashes), kept in the artefact as it is.
        keep: a .safetensors file for what is measured so far, every ``partial.SECONDS``. Where it lies already, of this
            very calibration, its sequences are not measured again; the result is the same. It is the caller's to remove
            once the result is kept. Several processes keep nothing.

    Raises:
        ConfigError: an unknown estimator, or a group size that does not divide a row.
        CalibrationError: too few or too short sequences, two names for one tied weight, or a tensor whose sample
            is zero or not finite (the logits do not depend on it, or not on every sequence): named, never clipped.
    """
    chosen = estimator if isinstance(estimator, CurvatureEstimator) else CurvatureEstimator.make(estimator)
    _check(model, weights, sequences)
    counted = None if targets is None else _counted(sequences, targets)
    if counted is not None:
        reached = counted.any(dim=1)
        sequences, counted = sequences[reached], counted[reached]
    if chosen.needs_candidates and not candidates:
        raise CalibrationError(f"the estimator {chosen.name!r} needs candidates: whose damage is it to measure?")
    started = time.perf_counter()
    with _prepared(model, weights):
        ids = sequences.to(next(iter(weights.values())).device, copy=True)
        problem = Problem(
            model=model,
            forward=forward or (lambda batch: model(input_ids=batch).logits),
            weights=weights,
            candidates=Candidates(weights, {}),
            seed=seed,
        )
        problem = replace(
            chosen.prepare(problem, ids),
            candidates=Candidates(weights, candidates or {}),
            diagonals=Diagonals(diagonals, weights) if chosen.squares and diagonals is not None else None,
        )
        labelled = {label: spec.to_json() for label, spec in (candidates or {}).items()}
        partial = None
        if keep is not None and processes.world_size() == 1:
            key = key_of(chosen, model, weights, sequences, counted, labelled, diagonals, seed, stopping)
            partial = Partial(keep, key)
        rows, stopped = _rows(chosen, problem, ids, counted, stopping, partial)
        gauss_newton = _substitutes(chosen, problem, ids[: len(rows)], counted, rows)
    primary = _primary(chosen, problem.candidates)
    columns = {path: _columns(rows, path, primary, chosen) for path in weights}
    return Sensitivity(
        estimator=chosen.name,
        estimator_options={key: value for key, value in chosen.to_json().items() if key != "name"},
        primary=primary,
        seed=seed,
        sequences=len(rows),
        scored_positions=len(rows) * (sequences.shape[1] - 1) if counted is None else int(counted[: len(rows)].sum()),
        stopped=stopped,
        candidates=labelled,
        candidate_bytes=problem.candidates.nbytes,
        model=dict(fingerprint or {}),
        tensors={
            path: TensorSensitivity.of(
                path,
                weight.numel(),
                columns[path].pop(primary),
                others=columns[path],
                errors=problem.candidates.errors[path],
                signed=chosen.signed,
                may_be_zero=chosen.may_be_zero,
                gauss_newton=gauss_newton.get(path),
            )
            for path, weight in weights.items()
        },
        seconds=time.perf_counter() - started + (0.0 if partial is None else partial.earlier),
        diagonals={} if problem.diagonals is None else parallel.summed(problem.diagonals).mean(),
    )


def _rows(
    estimator: CurvatureEstimator,
    problem: Problem,
    ids: Tensor,
    counted: Tensor | None,
    stopping: Stopping | None,
    partial: Partial | None = None,
) -> tuple[list[Row], str]:
    """Rows until the rule says stop or the sequences end, and which it was; ``partial`` has the first and gets all."""
    from ..progress import track  # here, so that listing the recipes needs torch alone

    primary = _primary(estimator, problem.candidates)
    rows = [] if partial is None else partial.load(problem.diagonals)
    found = ""
    stops = [len(ids)] if stopping is None else _doubling(stopping.start, len(ids))
    # A calibration that was killed beyond a stop had not settled there.
    for stop in (stop for stop in stops if stop >= len(rows)):
        share = range(len(rows) + processes.rank(), stop, processes.world_size())
        mine: dict[int, Row] = {}
        for k in track(share, f"calibrating, {estimator.name}", total=len(share)):
            try:
                mine[k] = estimator.sample(_of_sequence(problem, counted, k), ids[k])
            except CalibrationError as error:
                raise CalibrationError(f"sequence {k} of {len(ids)}: {error}") from None
            if partial is not None:
                partial.save([*rows, *mine.values()], problem.diagonals)
        if problem.diagonals is not None:
            problem.diagonals.sequences += len(mine)
        rows += parallel.gathered(mine, len(rows), stop)
        if stopping is None:
            return rows, f"all {len(rows)} sequences were used"
        samples = {path: _columns(rows, path, primary, estimator)[primary] for path in problem.weights}
        width, agreement = stopping.progress(samples, estimator.signed)
        found = f"median half-width {width:.1%}, split-half rank agreement {agreement:.3f}"
        if stopping.enough(samples, estimator.signed):
            return rows, f"settled after {len(rows)} sequences: {found}"
    return rows, f"the budget of {len(rows)} sequences ended first: {found}"


def _of_sequence(problem: Problem, counted: Tensor | None, k: int) -> Problem:
    """The problem as sequence ``k`` sees it; the same object where every position counts."""
    if counted is None or bool(counted[k].all()):
        return problem
    return replace(problem, counted=counted[k].to(next(iter(problem.weights.values())).device))


def _doubling(start: int, most: int) -> list[int]:
    """start, 2 start, 4 start, ... and ``most`` at the end.

    >>> _doubling(32, 200)
    [32, 64, 128, 200]
    """
    stops = []
    while start < most:
        stops.append(start)
        start *= 2
    return [*stops, most]


def _substitutes(
    estimator: CurvatureEstimator, problem: Problem, ids: Tensor, counted: Tensor | None, rows: Sequence[Row]
) -> dict[str, list[float]]:
    """Gauss-Newton samples for the tensors whose signed estimate is not surely positive."""
    if not estimator.signed:
        return {}
    primary = estimator.primary
    unsure = {}
    for path, weight in problem.weights.items():
        samples = _columns(rows, path, primary, estimator)[primary]
        if not TensorSensitivity.of(path, weight.numel(), samples, signed=True).low > 0.0:
            unsure[path] = weight
    if not unsure:
        return {}
    bare = replace(problem, weights=unsure, candidates=Candidates(unsure, {}), diagonals=None)
    positive, _ = _rows(estimator.stand_in() or GaussNewton(), bare, ids, counted, None)
    return {path: _columns(positive, path, primary, None)[primary] for path in unsure}


def _primary(estimator: CurvatureEstimator, candidates: Candidates) -> str:
    return quantity(estimator.primary, candidates.labels[0]) if estimator.needs_candidates else estimator.primary


def _check(model: nn.Module, weights: Mapping[str, nn.Parameter], sequences: Tensor) -> None:
    if not weights:
        raise CalibrationError(
            "no tensors to calibrate: the model has no linear layer that could become low-bit, or all are skipped"
        )
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


def _counted(sequences: Tensor, targets: Tensor) -> Tensor:
    """bool [K, T - 1]: whether the token that each position predicts counts."""
    if targets.shape != sequences.shape or targets.dtype != torch.bool:
        raise CalibrationError(
            f"targets must be bool and of the shape of the sequences, {list(sequences.shape)}; got {targets.dtype} of "
            f"shape {list(targets.shape)}"
        )
    counted = targets[:, 1:].cpu()
    reached = int(counted.any(dim=1).sum())
    if reached < 2:
        raise CalibrationError(
            f"only {reached} of {len(sequences)} sequences have a token that counts (of a chat, the assistant's), and "
            "calibration needs at least 2: use more text, or longer sequences"
        )
    return counted


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


def _columns(
    rows: Sequence[Row], path: str, primary: str, estimator: CurvatureEstimator | None
) -> dict[str, list[float]]:
    """Quantity -> the samples of one tensor; the primary ones finite, and of the sign that the estimator allows.

    Without an estimator, as for what stands in for one, they must be positive.

    Raises:
        CalibrationError: one that is not; the tensor, the sequence and the likely cause are named.
    """
    samples = [row.get(path, {}).get(primary, 0.0) for row in rows]
    signed = estimator is not None and estimator.signed
    may_be_zero = estimator is not None and estimator.may_be_zero

    def good(k: int, sample: float) -> bool:
        allowed = signed or (may_be_zero and sample == 0.0)
        return math.isfinite(sample) and (sample > 0.0 or (allowed and path in rows[k]))

    bad = [k for k, sample in enumerate(samples) if not good(k, sample)]
    if not bad:
        return {name: [row[path][name] for row in rows] for name in rows[0][path]}
    where = f"{path}: sequence {bad[0]}" + (f" (and {len(bad) - 1} others of {len(samples)})" if bad[1:] else "")
    if all(path not in row for row in rows):
        reason = "the model's output does not depend on this tensor; leave it out"
    elif may_be_zero:
        reason = "a divergence is 0 or a positive number; calibrate in fp32"
    elif math.isfinite(samples[bad[0]]):
        reason = (
            "its gradient is exactly zero there: dead weights, an expert that no token reached, or an underflow in "
            f"{'low' if len(bad) < len(samples) else 'the'} precision; use longer sequences or fp32, or leave it out"
        )
    else:
        reason = "the backward pass overflowed; calibrate in fp32"
    raise CalibrationError(f"{where}: sample {samples[bad[0]]}: {reason}")
