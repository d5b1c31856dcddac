"""Numbers and the verdict in words: the terminal, the page and the model card say the same thing the same way.

An honest report leads with what was lost, then with what training won back, then with everything that should lower
one's trust in either. A number that is not known is an en dash, never a zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .records import Interval, RunRecord
from .sensitivity import Sensitivity

UNKNOWN = "–"
_GRIDS = {
    (-1.0, 1.0): "binary",
    (-1.0, 0.0, 1.0): "ternary",
    **{tuple(map(float, range(-(1 << bits - 1), 1 << bits - 1))): f"{bits}-bit" for bits in (2, 3, 4)},
}


def fixed(value: float | None, digits: int = 3) -> str:
    """``value`` with so many decimals, and a true minus sign.

    >>> fixed(-0.25, 2), fixed(None)
    ('−0.25', '–')
    """
    return UNKNOWN if value is None else f"{value:.{digits}f}".replace("-", "−")


def significant(value: float | None, digits: int = 3) -> str:
    """``value`` to so many significant digits: plain from 0.001 to a million, scientific outside.

    >>> significant(12345.6), significant(0.0123456), significant(2.5e-7), significant(0.0)
    ('12,300', '0.0123', '2.50e−7', '0')
    """
    if value is None:
        return UNKNOWN
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    places = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{round(value, places):,.{max(0, places)}f}".replace("-", "−")


def perplexity(nll: float | None) -> str:
    """``exp(nll)`` to three significant digits; ``nll`` in nats per token."""
    return UNKNOWN if nll is None else significant(math.exp(min(nll, 700.0)))


def percent(share: float | None, digits: int = 1) -> str:
    """A share of 0 to 1 as a percentage."""
    return UNKNOWN if share is None else f"{100.0 * share:.{digits}f} %"


def size(count: float | None) -> str:
    """A number of bytes in decimal units.

    >>> size(2_113_536), size(812)
    ('2.11 MB', '812 B')
    """
    if count is None:
        return UNKNOWN
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{significant(count / factor)} {unit}"
    return f"{count:.0f} B"


def whole(count: float | None) -> str:
    """A count with thousands separators."""
    return UNKNOWN if count is None else f"{count:,.0f}"


def duration(seconds: float | None) -> str:
    """A time in its two largest units.

    >>> duration(85.2), duration(0.4), duration(7322), duration(3599.7)
    ('1 min 25 s', '0.4 s', '2 h 2 min', '1 h 0 min')
    """
    if seconds is None:
        return UNKNOWN
    if seconds < 10:
        return f"{seconds:.1f} s"
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60} s"
    minutes = round(total / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def bits(value: float | None) -> str:
    """Bits per weight, to the four decimals that block formats need.

    >>> bits(2.0625), bits(16.0)
    ('2.0625', '16')
    """
    return UNKNOWN if value is None else f"{value:.4f}".rstrip("0").rstrip(".")


def rate(value: float | None) -> str:
    """A learning rate as people write it: ``0.006``, ``5e-05``."""
    return UNKNOWN if value is None else f"{value:.3g}"


def grid_name(record: RunRecord) -> str:
    """``ternary``, ``binary``, ``2-bit``, or ``low-bit`` where the plan mixes grids or is absent."""
    names = {_GRIDS.get(levels_of(layer), "low-bit") for layer in record.layers.values()}
    return names.pop() if len(names) == 1 else "low-bit"


@dataclass(frozen=True)
class Measured:
    """What a sensitivity holds, in words.

    Attributes:
        sentence: what was measured of each weight matrix.
        name: what one number is.
        mean: which mean over sequences is shown, and covered by the interval.
    """

    sentence: str
    name: str
    mean: str


def measured(sensitivity: Sensitivity) -> Measured:
    """By its primary quantity; signed estimates have no geometric mean."""
    kind, _, label = sensitivity.primary.partition(":")
    bends = "How sharply the loss bends along each weight matrix: the"
    sentence, name = {
        "trace": (f"{bends} trace of its curvature", "trace"),
        "eigenvalue": (f"{bends} eigenvalue of its curvature that is largest in magnitude", "eigenvalue"),
        "kl": (
            "How far the predictions move from the parent's where each weight matrix alone is rounded"
            f"{f' to {label}' if label else ''}: KL in nats per token",
            "KL",
        ),
    }.get(kind, (f"What was measured of each weight matrix: {sensitivity.primary}", sensitivity.primary))
    geometric = any(tensor.geometric_mean is not None for tensor in sensitivity.tensors)
    return Measured(sentence, name, "geometric mean" if geometric else "mean")


def levels_of(layer: Any) -> tuple[float, ...]:
    """The grid values of one entry of the plan's layers; empty where it has none."""
    levels = layer.get("levels") if isinstance(layer, dict) else None
    if not isinstance(levels, list) or not all(isinstance(v, (int, float)) for v in levels):
        return ()
    return tuple(float(v) for v in levels)


LOST = 1.0
"""Nats per token behind the parent from which on a model hardly writes sense: 2.7 times its perplexity."""


@dataclass(frozen=True)
class Verdict:
    """What happened, in one sentence, and what a careful reader should know besides.

    Attributes:
        sentence: the loss against the parent and against rounding.
        cautions: each a full sentence; empty for a run with nothing to hold against it.
        failed: a written file differs from the trained model; the first caution says which.
    """

    sentence: str
    cautions: tuple[str, ...]
    failed: bool


def verdict(record: RunRecord) -> Verdict:
    """The honest summary of a run."""
    model = record.model or record.name
    subject = f"{model}, made {grid_name(record)} by {record.method},"
    parent, rounded, ours = record.nll_parent, record.nll_round_to_nearest, record.nll_quantized
    cautions: list[str] = []
    if parent is None or ours is None:
        sentence = f"{subject} has no usable held-out loss: it was not measured, or was not a finite number."
    else:
        change = f"(perplexity {perplexity(parent)} → {perplexity(ours)})"
        if ours >= parent:
            sentence = f"{subject} loses {fixed(ours - parent)} nats per token of held-out text to its parent {change}"
        else:
            sentence = f"{subject} predicts held-out text {fixed(parent - ours)} nats per token better than its parent"
            sentence += f" {change}"
            cautions.append(
                "Rounding cannot teach it anything: that it is better than its parent is chance, on this text."
                if record.recipe == "round_to_nearest"
                else "It is better than its parent because it was trained on more text of this kind; that gain comes "
                "from the training, not from the quantization."
            )
        if record.recipe == "round_to_nearest":
            sentence += "; it was rounded, not trained."
        elif rounded is None:
            sentence += "."
        else:
            sentence += f"; rounding without training {_lost(rounded - parent)}."
            if ours >= rounded:
                cautions.append("Training did not help: plain rounding is at least as good on this text.")
    cautions.extend(far_from_parent(record))
    if record.recipe != "round_to_nearest":
        cautions.extend(_resolution(record.nll_intervals.get("quantized_minus_round_to_nearest")))
    better = [b for b in record.baselines if b.nll is not None and ours is not None and b.nll < ours]
    for other in sorted(better, key=lambda b: b.nll or 0.0):
        if other.recipe not in ("parent", "round_to_nearest"):
            cautions.append(f"{other.recipe} did better here: {fixed(other.nll)} nats per token against {fixed(ours)}.")
    different = [e for e in record.exports if e.verify is not None and e.verify.failed]
    unread = [e for e in record.exports if e.verify is None or e.verify.codes_equal is None]
    if different:
        names = ", ".join(e.target for e in different)
        cautions.insert(0, f"The written file differs from the trained model: {names}. Do not use it.")
    if record.refused:  # a card is published, and the reasons may name folders
        cautions.append(f"Asked for but not written: {', '.join(record.refused)}; the run's report.json says why.")
    if unread:
        cautions.append(f"Not verified after writing: {', '.join(e.target for e in unread)}.")
    return Verdict(sentence, tuple(cautions), bool(different))


def far_from_parent(record: RunRecord) -> list[str]:
    """A sentence about a model that is ``LOST`` or more behind its parent; none about others."""
    parent, ours = record.nll_parent, record.nll_quantized
    if parent is None or ours is None or ours - parent < LOST:
        return []
    change = f"(perplexity {perplexity(parent)} → {perplexity(ours)})"
    return [
        "It is far from its parent and will hardly write sense; more --tokens, or more --bits, bring it nearer "
        f"{change}."
    ]


def _lost(difference: float) -> str:
    return f"loses {fixed(difference)}" if difference >= 0 else f"gains {fixed(-difference)}"


def _resolution(interval: Interval | None) -> list[str]:
    if interval is None or not interval.low <= 0.0 <= interval.high:
        return []
    return [
        f"The difference from plain rounding, {fixed(interval.mean)} nats per token, is within what this much "
        f"held-out text can resolve (interval {fixed(interval.low)} to {fixed(interval.high)})."
    ]
