"""RUN/report.html: one self-contained page.

No script, no font, no address outside the file; it reads on a phone, in the dark and on paper. Jinja escapes every
string of the run (autoescape); the only markup passed through is the SVG of plots.py, which holds no such string.
Numbers that reach a style attribute are formatted here, from floats.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..files import write_text
from . import plots, wording
from .diagnostics import CodeShares, Histogram
from .fields import text
from .heatmap import heat_map
from .records import RunRecord
from .sensitivity import Sensitivity, Trace
from .tables import headline_rows

REPORT_PAGE = "report.html"
_HISTOGRAMS_SHOWN = 6
_INTERVALS_OPEN = 12
_DOUBTFUL_SHARE = 0.1


def write_report(run: Path) -> Path:
    """Write ``RUN/report.html`` from the run's artefacts and return its path.

    Raises:
        ConfigError: the run holds no valid report.json, or another artefact is damaged.
    """
    page = run / REPORT_PAGE
    write_text(page, render(RunRecord.load(run)))
    return page


def render(record: RunRecord) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("hestia.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    formats = ("fixed", "significant", "bits", "perplexity", "percent", "rate", "size", "whole", "duration")
    environment.filters.update({name: getattr(wording, name) for name in formats})
    return environment.get_template("report.html.jinja").render(
        record=record,
        verdict=wording.verdict(record),
        grid=wording.grid_name(record),
        rows=headline_rows(record),
        over=_over_parent(record),
        shrink=_shrink(record),
        figures=_figures(record),
        heat=heat_map(record.sensitivity.tensors) if record.sensitivity else None,
        measured=wording.measured(record.sensitivity) if record.sensitivity else None,
        intervals=_intervals(record.sensitivity),
        intervals_open=_INTERVALS_OPEN,
        doubtful=_DOUBTFUL_SHARE,
        histograms=_histograms(record),
        plan_layers=_plan_layers(record.layers),
        kept=_kept(record.kept),
        schedule=[pair for pair in flat((record.plan or {}).get("schedule")) if pair[1] != wording.UNKNOWN],
        command=shlex.join(record.command),
        provenance=[
            (
                "Model",
                [
                    *_named(name=record.model, commit=record.commit, dtype=record.parent_dtype),
                    *flat(record.model_details),
                ],
            ),
            ("Recipe", flat(record.recipe_options)),
            ("Teacher", flat(record.teacher)),
            ("Machine", flat(record.machine)),
            ("Versions", flat(record.versions)),
            ("Data", flat(record.data)),
            ("Options", flat(record.options)),
        ],
    )


def flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """A nested JSON value as (dotted key, text) pairs, for a list of definitions."""
    if isinstance(value, Mapping):
        return [pair for key, entry in value.items() for pair in flat(entry, f"{prefix}.{text(key)}".lstrip("."))]
    if value is None:
        return [(prefix, wording.UNKNOWN)] if prefix else []
    if isinstance(value, list) and not any(isinstance(v, (dict, list)) for v in value):
        return [(prefix, ", ".join(text(v) for v in value) or wording.UNKNOWN)]
    if isinstance(value, list):
        return [pair for i, entry in enumerate(value) for pair in flat(entry, f"{prefix}[{i}]")]
    if isinstance(value, bool):
        return [(prefix, "yes" if value else "no")]
    if isinstance(value, int):
        return [(prefix, f"{value:,}" if abs(value) >= 10_000 else str(value))]
    return [(prefix, f"{value:g}" if isinstance(value, float) else text(value))]


def _named(**values: str) -> list[tuple[str, str]]:
    return [(name, value) for name, value in values.items() if value]


def _over_parent(record: RunRecord) -> Callable[[float | None], tuple[float, float] | None]:
    """NLL -> (nats per token over the parent, width of its bar in percent of the largest), for the headline table."""
    parent = record.nll_parent
    known = [row.nll - parent for row in headline_rows(record) if row.nll is not None and parent is not None]
    largest = max((abs(d) for d in known), default=0.0) or 1.0

    def over(nll: float | None) -> tuple[float, float] | None:
        if nll is None or parent is None:
            return None
        return nll - parent, round(100.0 * max(0.0, nll - parent) / largest, 2)

    return over


def _shrink(record: RunRecord) -> float | None:
    """How many times smaller the first export is than the parent's parameters."""
    rows = headline_rows(record)
    before, after = rows[0].bytes, rows[-1].bytes
    return before / after if before and after else None


def _figures(record: RunRecord) -> dict[str, Any]:
    log, taught = record.log, bool(record.teacher)
    small = [
        ("Training loss, to the teacher", plots.taught_loss(log, name="taught") if taught else None),
        ("Pressure and temperature", plots.knobs(log, name="knobs")),
        ("Saturated weights", plots.saturated(log, name="saturated")),
        ("Learning rate", plots.learning_rate(log, name="rate")),
        ("Gradient norm, before clipping", plots.gradient_norm(log, name="gradient")),
    ]
    return {
        "loss": _svg(plots.loss(log, parent=record.parent_hard_loss, name="loss", taught=taught)),
        "loss_narrow": _svg(
            plots.loss(log, parent=record.parent_hard_loss, name="loss-narrow", width=400, taught=taught)
        ),
        "small": [(title, _svg(drawing)) for title, drawing in small if drawing],
    }


def _svg(drawing: str | None) -> Markup | None:
    return None if drawing is None else Markup(drawing)  # plots.py draws no string of the run


@dataclass(frozen=True)
class _IntervalRow:
    """A tensor with the place of its interval and of the mean that it covers on a common log axis, in percent."""

    trace: Trace
    left: float
    width: float
    mark: float


def _intervals(sensitivity: Sensitivity | None) -> list[_IntervalRow]:
    """Every tensor, most sensitive first."""
    if sensitivity is None:
        return []
    ends = [v for t in sensitivity.tensors for v in (t.low, _mean(t), t.high) if v is not None and v > 0]
    bottom, top = (math.log(min(ends)), math.log(max(ends))) if ends else (0.0, 0.0)
    span = (top - bottom) or 1.0

    def place(value: float | None, default: float) -> float:
        if value is None:
            return default
        return 0.0 if value <= 0 else 100.0 * (math.log(value) - bottom) / span

    rows: list[_IntervalRow] = []
    for trace in sorted(sensitivity.tensors, key=lambda t: -(_mean(t) or 0.0)):
        mark = place(_mean(trace), 0.0)
        left, right = place(trace.low, mark), place(trace.high, mark)
        rows.append(_IntervalRow(trace, round(left, 2), round(max(0.0, right - left), 2), round(mark, 2)))
    return rows


def _mean(trace: Trace) -> float | None:
    """The mean that the interval covers: the geometric one, or the plain one of a signed estimate."""
    return trace.geometric_mean if trace.geometric_mean is not None else trace.trace


@dataclass(frozen=True)
class _HistogramFigure:
    histogram: Histogram
    drawing: Markup | None
    shares: CodeShares
    has_thresholds: bool


def _histograms(record: RunRecord) -> list[_HistogramFigure]:
    """At most six, evenly spread over the model."""
    every = record.histograms
    count = min(len(every), _HISTOGRAMS_SHOWN)
    chosen = [every[round(i * (len(every) - 1) / max(1, count - 1))] for i in range(count)]
    figures: list[_HistogramFigure] = []
    for i, histogram in enumerate(chosen):
        layer = record.layers.get(histogram.path)
        levels = wording.levels_of(layer) or (-1.0, 0.0, 1.0)
        thresholds = [0.5 * (a + b) for a, b in zip(levels, levels[1:], strict=False)]
        if isinstance(layer, dict) and layer.get("block"):  # zeros are counted in blocks: no size decides alone
            thresholds = []
        drawing = plots.weights(histogram, thresholds, name=f"weights{i}")
        shares = record.codes.get(histogram.path, CodeShares())
        figures.append(_HistogramFigure(histogram, _svg(drawing), shares, bool(thresholds)))
    return figures


def _plan_layers(layers: Mapping[str, Any]) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []
    for path, layer in layers.items():
        entry = layer if isinstance(layer, dict) else {}
        levels = wording.levels_of(entry)
        factor = entry.get("temperature_factor")
        stored, shape = entry.get("stored"), entry.get("shape")
        found.append(
            {
                "path": text(path),
                "shape": " × ".join(text(n) for n in shape) if isinstance(shape, list) else "",
                "levels": ", ".join(f"{v:g}".replace("-", "−") for v in levels),
                "group": text(entry.get("group_size")),
                "scale": _member(entry.get("scale")),
                "estimator": _member(entry.get("estimator")),
                "factor": wording.fixed(factor if isinstance(factor, (int, float)) else None),
                "stored": ", ".join(dict.fromkeys(text(v) for v in stored.values()))
                if isinstance(stored, dict)
                else "",
            }
        )
    return found


def _member(value: Any) -> str:
    """``{"name": "absmean", "eps": 1e-05}`` -> ``absmean (eps 1e-05)``."""
    if not isinstance(value, dict):
        return text(value)
    options = ", ".join(f"{key} {entry}" for key, entry in flat({k: v for k, v in value.items() if k != "name"}))
    return text(value.get("name")) + (f" ({options})" if options else "")


@dataclass(frozen=True)
class _KeptGroup:
    reason: str
    names: Sequence[str]
    weights: int


def _kept(kept: Mapping[str, Any]) -> list[_KeptGroup]:
    """The kept parameters, gathered by reason, the largest group first."""
    groups: dict[str, tuple[list[str], int]] = {}
    for name, entry in kept.items():
        reason = text(entry.get("reason")) if isinstance(entry, dict) else ""
        weights = entry.get("weights") if isinstance(entry, dict) else 0
        names, total = groups.get(reason, ([], 0))
        groups[reason] = ([*names, text(name)], total + (weights if isinstance(weights, int) else 0))
    return [_KeptGroup(r, n, w) for r, (n, w) in sorted(groups.items(), key=lambda item: -item[1][1])]
