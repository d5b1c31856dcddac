"""What an estimator is: a rule that turns one sequence into one number per tensor and quantity.

A quantity is a name, with the label of a candidate quantizer behind a colon where it depends on one:

    trace               tr(G_i) or tr(H_i), nats per squared weight unit
    trace_error         one sequence's own standard error of its trace, where an estimator has one (xtrace)
    eigenvalue          the eigenvalue of H_i with the largest magnitude, same unit
    quadratic:LABEL     dW' G dW for that candidate's rounding error, nats; half of it predicts the KL
    delta_loss:LABEL    sum |g dW|, first order
    kl:LABEL            KL to the parent with this one tensor quantized, nats per token: the ground truth
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...quant import QuantizedTensor, Quantizer, QuantSpec
from ...quant.family import Member
from ...quant.grouping import GroupSize, group_shape, to_groups

Forward = Callable[[Tensor], Tensor]
"""Token ids [1, T] -> logits [1, T, V]."""

Row = dict[str, dict[str, float]]
"""What one sequence says: module path -> quantity -> sample."""

CHUNK = 1 << 22
"""Weights handled at a time where a rounding error is rebuilt: 16 MB a buffer in fp32."""


def quantity(name: str, label: str | None = None) -> str:
    """The key of a quantity: ``quantity("kl", "ternary") == "kl:ternary"``."""
    return name if label is None else f"{name}:{label}"


class Candidates:
    """What each tensor would become under each candidate quantizer, held as int8 codes and fp32 scales.

    One byte per weight and candidate, plus the scales (``nbytes``); the error ``dW = codes scales - W`` is rebuilt in
    pieces of ``CHUNK`` weights when it is needed.

    Args:
        weights: module path -> weight matrix ``[O, I]``.
        specs: label -> quantizer, such as ``{"ternary": QuantSpec()}``; may be empty.

    Raises:
        ConfigError: a group size that does not divide a row.
    """

    def __init__(self, weights: Mapping[str, Tensor], specs: Mapping[str, QuantSpec]) -> None:
        self.labels = tuple(specs)
        # All that lasts is made first: among the passing tensors of the quantizers it would pin the heap's holes.
        self._frozen: dict[str, dict[str, QuantizedTensor]] = {
            path: {label: _room(weight, spec.group_size) for label, spec in specs.items()}
            for path, weight in weights.items()
        }
        for path, weight in weights.items():
            for label, spec in specs.items():
                made, kept = Quantizer(spec).codes(weight), self._frozen[path][label]
                kept.codes.copy_(made.codes)
                kept.scales.copy_(made.scales)
        self.errors = {path: self._squared_errors(path, weight) for path, weight in weights.items()}
        """Module path -> label -> ``||dW||^2``."""

    @property
    def nbytes(self) -> int:
        """Bytes that all candidates hold."""
        return sum(
            tensor.nbytes
            for choices in self._frozen.values()
            for frozen in choices.values()
            for tensor in (frozen.codes, frozen.scales)
        )

    def dense(self, path: str, label: str) -> Tensor:
        """The quantized weight ``[O, I]``, fp32."""
        return self._frozen[path][label].dense()

    @torch.no_grad()
    def products(self, path: str, weight: Tensor, gradient: Tensor) -> Iterator[tuple[str, float, float]]:
        """(label, ``sum g dW``, ``sum |g dW|``) of every candidate of one tensor; accumulated in fp64."""
        for label in self.labels:
            signed = absolute = 0.0
            for rows, error in self._error_rows(path, label, weight):
                product = error.mul_(gradient[rows])
                signed += float(product.sum(dtype=torch.float64))
                absolute += float(product.abs_().sum(dtype=torch.float64))
            yield label, signed, absolute

    def _squared_errors(self, path: str, weight: Tensor) -> dict[str, float]:
        def squared(label: str) -> float:
            errors = (error for _, error in self._error_rows(path, label, weight))
            return sum(float(error.square_().sum(dtype=torch.float64)) for error in errors)

        return {label: squared(label) for label in self.labels}

    @torch.no_grad()
    def _error_rows(self, path: str, label: str, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """dW, some rows at a time: (rows, fp32 ``[rows, I]``), a fresh tensor each."""
        frozen, step = self._frozen[path][label], max(1, CHUNK // weight.shape[1])
        for start in range(0, len(weight), step):
            rows = slice(start, min(len(weight), start + step))
            yield rows, frozen.rows(rows).sub_(weight[rows])


def _room(weight: Tensor, group_size: GroupSize) -> QuantizedTensor:
    """An empty place for a quantized weight."""
    shape = (weight.shape[0], weight.shape[1])
    rows, groups, _ = group_shape(shape, group_size)
    codes = torch.empty(shape, dtype=torch.int8, device=weight.device)
    return QuantizedTensor(codes, torch.empty(rows, groups, device=weight.device), group_size)


class Diagonals:
    """Sums of squared gradients over output channels and scale groups, for whoever weighs errors later.

        channel_o = (1/K) sum_k sum_i g_koi^2 / N          group_rg = (1/K) sum_k sum_{n in group} g_krgn^2 / N

    Both are partial sums of the trace: ``channel.sum() == group.sum() == trace``.

    Args:
        group_size: of the scale groups.
        weights: module path -> weight whose sums are made beforehand: small lasting tensors, made while large passing
            ones are alive, would keep the heap from shrinking.
    """

    def __init__(self, group_size: int | str = "row", weights: Mapping[str, Tensor] | None = None) -> None:
        self.group_size = group_size
        self.sequences = 0
        self._channel: dict[str, Tensor] = {}
        self._group: dict[str, Tensor] = {}
        for path, weight in (weights or {}).items():
            rows, groups, _ = group_shape((weight.shape[0], weight.shape[1]), group_size)  # type: ignore[arg-type]
            self._channel[path] = torch.zeros(weight.shape[0], device=weight.device)
            self._group[path] = torch.zeros(rows, groups, device=weight.device)

    @torch.no_grad()
    def add(self, path: str, gradient: Tensor, positions: int) -> None:
        """One sequence's gradient ``[O, I]`` of a sum over ``positions``."""
        square = gradient.float().square()
        channel = square.sum(-1) / positions
        group = to_groups(square, self.group_size).sum(-1) / positions  # type: ignore[arg-type]
        for store, value in ((self._channel, channel), (self._group, group)):
            store[path] = store[path].add_(value) if path in store else value

    def mean(self) -> dict[str, Tensor]:
        """``PATH/output_channel`` ``[O]`` and ``PATH/group`` ``[R, G]``, averaged over sequences."""
        count = max(1, self.sequences)
        out = {f"{path}/output_channel": value / count for path, value in self._channel.items()}
        return out | {f"{path}/group": value / count for path, value in self._group.items()}

    def state(self) -> dict[str, Tensor]:
        """The running sums themselves, in a fixed order: what parallel processes add up."""
        stores = (("channel", self._channel), ("group", self._group))
        return {f"{kind}/{path}": value for kind, store in stores for path, value in sorted(store.items())}

    def restore(self, state: Mapping[str, Tensor], sequences: int) -> None:
        """Go on from the ``state`` of ``sequences`` sequences."""
        self.sequences = sequences
        for name, value in state.items():
            kind, _, path = name.partition("/")
            store = self._channel if kind == "channel" else self._group
            if path in store:
                store[path].copy_(value)  # stays on the weight's device
            else:
                store[path] = value


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What every estimator is given.

    Attributes:
        model: the model, in eval mode.
        forward: token ids -> logits, through ``model``.
        weights: module path -> the Parameter to look at; each requires grad.
        candidates: what each would become.
        diagonals: where first-order estimators leave per-channel sums; None: not wanted.
        seed: with the content of a sequence it decides every random draw; order, batch and rank do not.
        counted: bool [T - 1], the positions of the sequence at hand whose prediction counts; None: all.
        scales: module path -> factor on a tensor's probes, where ``prepare`` chose any; 1 without.
    """

    model: nn.Module
    forward: Forward
    weights: Mapping[str, nn.Parameter]
    candidates: Candidates
    diagonals: Diagonals | None = None
    seed: int = 0
    counted: Tensor | None = None
    scales: Mapping[str, float] = field(default_factory=dict)

    def positions(self, ids: Tensor) -> int:
        """N: the positions of ``ids`` [T] whose prediction counts."""
        return ids.numel() - 1 if self.counted is None else int(self.counted.sum())


@dataclass(frozen=True, kw_only=True)
class CurvatureEstimator(Member, ABC):
    """Base of all estimators: ``sample(problem, ids)`` fills one row of the table."""

    family: ClassVar[str] = "curvature estimator"

    primary: ClassVar[str] = "trace"
    """The quantity whose statistics head the table; with a candidate, that of the first label."""

    signed: ClassVar[bool] = False
    """Whether samples may be negative: then the Gauss-Newton value stands in where the interval is not positive."""

    may_be_zero: ClassVar[bool] = False
    """Whether a sample may be exactly 0: a candidate that changes nothing."""

    squares: ClassVar[bool] = False
    """Whether it leaves sums of squared gradients in ``Problem.diagonals``."""

    needs_candidates: ClassVar[bool] = False
    """Whether it measures nothing without a candidate quantizer."""

    @property
    def measures_damage(self) -> bool:
        """Whether it tells what every candidate quantizer would cost, which plans of several widths are made from."""
        return self.squares or self.needs_candidates

    def stand_in(self) -> CurvatureEstimator | None:
        """What replaces a signed estimate that is not surely positive, in the same primary quantity; None: ``gnb``."""
        return None

    def prepare(self, problem: Problem, sequences: Tensor) -> Problem:
        """Refuse what this estimator cannot do, before any work, and settle what ``sample`` is to read.

        Args:
            problem: without candidates and diagonals, which come later.
            sequences: all that may be used.

        Raises:
            CalibrationError: with the reason.
        """
        return problem

    @abstractmethod
    def sample(self, problem: Problem, ids: Tensor) -> Row:
        """One sequence ``ids`` [T] -> one sample a tensor and quantity; the last token predicts nothing.

        Only the positions ``problem.counted`` are scored, and N is their number.

        A tensor that the logits do not depend on is left out.
        """
