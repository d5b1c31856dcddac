"""Tables as aligned text: the headline of one run, and ``hestia compare`` of several.

``headline_rows`` is the one place that decides what stands beside the quantized model; the page and the model card
print the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .records import RunRecord
from .wording import UNKNOWN, bits, duration, fixed, percent, perplexity, rate, size, whole

_SAME = 1e-3
"""Nats per token: one model scored twice on the same blocks in fp32, on any two machines, differs by less."""

_DTYPE_BITS = {"float64": 64, "float32": 32, "bfloat16": 16, "float16": 16, "float8_e4m3fn": 8, "float8_e5m2": 8}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model in the headline table.

    Attributes:
        label: ``parent`` or the name of a recipe.
        kind: "parent", "rounding", "baseline" or "ours".
        nll: nats per token on the held-out blocks; ``kl`` likewise, to the parent.
        bits: stored bits per quantized weight.
        bytes: of the file; for the parent, of its parameters in its dtype.
    """

    label: str
    kind: str
    nll: float | None
    kl: float | None
    top1: float | None
    bits: float | None = None
    bytes: float | None = None
    seconds: float | None = None


def headline_rows(record: RunRecord) -> list[Row]:
    """Parent, plain rounding, the other recipes, ours last; rounding would fill the same file as ours.

    A run of ``round_to_nearest`` itself has no separate row for rounding.
    """
    others = {b.recipe: b for b in record.baselines}
    dtype_bits = _DTYPE_BITS.get(record.parent_dtype)
    count = None if record.weights_quantized is None else record.weights_quantized + (record.weights_kept or 0)
    file_size = record.exports[0].bytes if record.exports else None
    rows = [
        Row(
            label="parent",
            kind="parent",
            nll=record.nll_parent,
            kl=0.0,
            top1=1.0,
            bits=dtype_bits,
            bytes=None if dtype_bits is None or count is None else count * dtype_bits / 8,
        )
    ]
    if record.recipe != "round_to_nearest":
        rounding = others.get("round_to_nearest")
        rows.append(
            Row(
                label="round_to_nearest",
                kind="rounding",
                nll=record.nll_round_to_nearest,
                kl=rounding.kl_to_parent if rounding else None,
                top1=rounding.top1_agreement if rounding else None,
                bits=record.bits_quantized,
                bytes=file_size,
                seconds=rounding.seconds if rounding else None,
            )
        )
    rows.extend(
        Row(
            label=b.recipe,
            kind="baseline",
            nll=b.nll,
            kl=b.kl_to_parent,
            top1=b.top1_agreement,
            seconds=b.seconds,
        )
        for b in record.baselines
        # The demo lists every recipe, ours too; another run of our recipe (other options) stays.
        if b.recipe not in ("parent", "round_to_nearest") and (b.recipe, b.nll) != (record.recipe, record.nll_quantized)
    )
    rows.append(_ours(record, record.method))
    return rows


def headline(record: RunRecord) -> str:
    """The headline table of one run for the terminal: NLL and KL in nats per token, bits per quantized weight."""
    header = ["", "NLL", "perplexity", "KL to parent", "top-1 agreement", "bits/weight", "size"]
    return _aligned([header, *(_cells(row) for row in headline_rows(record))])


def compare(records: Sequence[RunRecord]) -> str:
    """Several runs in one table, best NLL first, under their common parent.

    Runs whose parents differ in NLL were scored on other text or start from other models: a line below says so,
    because their rows must not be compared.
    """
    ordered = sorted(records, key=lambda r: (r.nll_quantized is None, r.nll_quantized or 0.0))
    header = ["run", "recipe", "target", "tokens", "lr", "seed"]
    header += ["NLL", "over parent", "KL to parent", "top-1", "bits/weight", "size", "time"]
    lines = [header]
    for record in ordered:
        row = _ours(record, record.name)
        over = None if row.nll is None or record.nll_parent is None else row.nll - record.nll_parent
        seed = UNKNOWN if record.seed is None else str(record.seed)
        about = [record.name, record.method, ", ".join(record.targets), whole(record.tokens)]
        about += [rate(record.learning_rate), seed]
        result = [fixed(row.nll), fixed(over), fixed(row.kl), percent(row.top1), bits(row.bits), size(row.bytes)]
        lines.append([*about, *result, duration(record.seconds_total)])
    notes = [
        f"{name} on the same text: {fixed(value)} nats per token"
        for name, value in _shared(ordered)
        if value is not None
    ]
    if not _agree([r.nll_parent for r in ordered]):
        parents = ", ".join(f"{r.name} {fixed(r.nll_parent)}" for r in ordered)
        notes.append(f"NOT COMPARABLE: the parents' NLL differ ({parents}); other text or another parent")
    return "\n".join([_aligned(lines, left=3), "", *map(printable, notes)]).rstrip()


def printable(text: str) -> str:
    """``text`` without control characters, which could move a terminal's cursor or recolour it."""
    return "".join(c if c.isprintable() else "�" for c in text)


def _ours(record: RunRecord, label: str) -> Row:
    return Row(
        label=label,
        kind="ours",
        nll=record.nll_quantized,
        kl=record.kl_to_parent,
        top1=record.top1_agreement,
        bits=record.bits_quantized,
        bytes=record.exports[0].bytes if record.exports else None,
        seconds=record.seconds_train,
    )


def _cells(row: Row) -> list[str]:
    return [
        row.label,
        fixed(row.nll),
        perplexity(row.nll),
        fixed(row.kl),
        percent(row.top1),
        bits(row.bits),
        size(row.bytes),
    ]


def _shared(records: Sequence[RunRecord]) -> list[tuple[str, float | None]]:
    """Parent and rounding, each only where every run agrees on it."""
    found: list[tuple[str, float | None]] = []
    for name, values in (
        ("parent", [r.nll_parent for r in records]),
        ("round_to_nearest", [r.nll_round_to_nearest for r in records]),
    ):
        if values and _agree(values):
            found.append((name, values[0]))
    return found


def _agree(nll: Sequence[float | None]) -> bool:
    """Whether all are scores of one model on the same blocks."""
    numbers = [value for value in nll if value is not None]
    return len(numbers) in (0, len(nll)) and (not numbers or max(numbers) - min(numbers) < _SAME)


def _aligned(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns two spaces apart; the first ``left`` flush left, the others flush right."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
