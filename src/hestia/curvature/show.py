"""A sensitivity for people: one line a tensor, the one that hurts most for the bits it gives up first."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from ..errors import CalibrationError
from ..quant import QuantSpec
from .damage import damages
from .sensitivity import LARGE_SHARE, Sensitivity, TensorSensitivity

PARENT_BITS = 16.0
"""What a weight costs before it is quantized."""


def damage_per_megabit(sensitivity: Sensitivity, label: str) -> dict[str, float]:
    """Module path -> damage over the bits that the candidate ``label`` saves, in nats per token and megabit.

        D_i / (n_i (16 - bits)) * 10^6

    Raises:
        CalibrationError: no damage of ``label`` was measured.
    """
    read = damages(sensitivity, label)
    if read is None:
        raise CalibrationError(f"no damage of {label!r} was measured, only {', '.join(sensitivity.quantities)}")
    saved = PARENT_BITS - QuantSpec.from_json(dict(sensitivity.candidates[label])).grid.bits
    return {path: 1e6 * read[0][path] / (t.weights * saved) for path, t in sensitivity.tensors.items()}


def reference_label(sensitivity: Sensitivity) -> str | None:
    """The candidate that the table is sorted by: ternary where it was measured."""
    labels = list(sensitivity.candidates)
    return "ternary" if "ternary" in labels else next(iter(labels), None)


def table(sensitivity: Sensitivity) -> str:
    """Head line, one line a tensor sorted by damage per bit, and what should lower one's trust."""
    label = reference_label(sensitivity)
    read = damages(sensitivity, label) if label is not None else None
    per_bit = damage_per_megabit(sensitivity, label) if read is not None and label is not None else None
    order: Mapping[str, float] = per_bit if per_bit is not None else sensitivity.traces
    width = max((len(path) for path in sensitivity.tensors), default=6)
    head = f"{'tensor':<{width}}  {'weights':>12}  {sensitivity.primary:>11} {'+-':>6}  {'95 %':>23}  largest sequence"
    if per_bit is not None:
        head += f"  {'KL, ' + str(label):>12}  {'per Mbit saved':>14}"
    lines = [_summary(sensitivity), head]
    for path in sorted(sensitivity.tensors, key=lambda path: -order[path]):
        line = _line(sensitivity.tensors[path], width)
        if per_bit is not None and read is not None:
            line += f"  {read[0][path]:>12.4g}  {per_bit[path]:>14.4g}"
        lines.append(line)
    return "\n".join([*lines, *_doubts(sensitivity)])


def _summary(sensitivity: Sensitivity) -> str:
    per_sequence = sensitivity.scored_positions // max(1, sensitivity.sequences)
    errors = [t.standard_error / abs(t.trace) for t in sensitivity.tensors.values() if t.trace]
    text = (
        f"{sensitivity.estimator}: {sensitivity.sequences} sequences x {per_sequence} scored positions, "
        f"seed {sensitivity.seed}, {sensitivity.seconds:.1f} s; median relative standard error "
        f"{statistics.median(errors) if errors else 0.0:.1%}"
    )
    return f"{text}\n{sensitivity.stopped}" if sensitivity.stopped else text


def _line(tensor: TensorSensitivity, width: int) -> str:
    error = f"{tensor.standard_error / abs(tensor.trace):.1%}" if tensor.trace else "-"
    share = "-" if tensor.largest_share is None else f"{tensor.largest_share:.1%}"
    mark = " !" if tensor.largest_share is not None and tensor.largest_share > LARGE_SHARE else "  "
    mark = " *" if tensor.gauss_newton is not None else mark
    interval = f"{tensor.low:.4g} .. {tensor.high:.4g}"
    return (
        f"{tensor.path:<{width}}  {tensor.weights:>12,}  {tensor.trace:>11.4g} {error:>6}  {interval:>23}  "
        f"{share:>14}{mark}"
    )


def _doubts(sensitivity: Sensitivity) -> list[str]:
    tensors = sensitivity.tensors.values()
    lines = []
    if any(tensor.geometric_mean is not None for tensor in tensors):
        lines.append("95 %: interval of the geometric mean over sequences, which lies below the plain mean in column 3")
    if any(tensor.signed for tensor in tensors):
        lines.append("95 %: nominal; where it was measured, such intervals of signed samples covered 79 %")
    heavy = sum(tensor.largest_share is not None and tensor.largest_share > LARGE_SHARE for tensor in tensors)
    if heavy:
        lines.append(
            f"! in {heavy} tensors one sequence carries over {LARGE_SHARE:.0%} of the sum: "
            "trust the geometric mean, or add sequences"
        )
    replaced = sum(tensor.gauss_newton is not None for tensor in tensors)
    if replaced:
        lines.append(
            f"* in {replaced} tensors the interval is not wholly positive: "
            f"the Gauss-Newton {sensitivity.primary} takes the place"
        )
    return lines
