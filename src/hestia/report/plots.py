"""Curves and histograms as SVG for one page: the one file that imports matplotlib.

One style for all: no frame, three or four ticks, labels written at the lines instead of a legend. Colours are written
as ``var(--name)``, so the page's style sheet decides them and a figure follows light, dark and print without being
drawn twice. Text stays text (``svg.fonttype: none``) in the page's own font. Only fixed words are drawn: names that
come from a run stand in the HTML around the figure, so nothing a model is called can reach the SVG.

Figures carry no external address: matplotlib's metadata, namespaces and document type are left out, which HTML needs
none of, and every id gets the figure's own prefix, because one page holds many.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from .diagnostics import Histogram
from .training_log import TrainingLog

# Placeholder colours that the style sheet's variables replace in the finished SVG.
_INK, _SOFT, _RULE, _EMBER, _SLATE = "#010101", "#020202", "#030303", "#040404", "#050505"
_VARIABLES = {_INK: "--ink", _SOFT: "--soft", _RULE: "--rule", _EMBER: "--ember", _SLATE: "--slate"}
_PRINTED = {_INK: "#1b1b1b", _SOFT: "#5a5a5a", _RULE: "#c8c8c8", _EMBER: "#c2410c", _SLATE: "#475569"}
"""The colours of a figure that stands in a file of its own, without a style sheet."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hestia",
    "text.parse_math": False,
    "font.size": 11,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _SOFT,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _RULE,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "xtick.color": _RULE,
    "xtick.labelcolor": _SOFT,
    "ytick.color": _RULE,
    "ytick.labelcolor": _SOFT,
    "ytick.major.size": 0,
    "xtick.major.size": 3,
    "text.color": _SOFT,
}
_DPI = 72  # one point is one CSS pixel of the natural size
_MOST_POINTS = 1200
_TALL, _LOW = 320, 220

Series = list[tuple[int, float]]
T = TypeVar("T")


def loss(log: TrainingLog, *, parent: float | None, name: str, width: int = 900, taught: bool = False) -> str | None:
    """Soft training loss and hard loss on unseen text over steps, nats per token, with the parent's line.

    ``width`` is the natural width in CSS pixels. The training loss of a run that was ``taught`` holds a divergence and
    has a figure of its own. Returns None where the log holds neither loss.
    """
    soft = [] if taught else _series((row.step, row.loss) for row in log.rows)
    hard = list(log.hard)
    if not soft and not hard:
        return None
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(width, _TALL)
        labels: list[tuple[float, str, str]] = []
        if soft:
            axes.plot(*_columns(soft), color=_SLATE, linewidth=1.0, alpha=0.85)
            labels.append((soft[-1][1], "soft, training", _SLATE))
        if hard:
            axes.plot(*_columns(hard), color=_EMBER, marker="o", markersize=4.5)
            labels.append((hard[-1][1], "hard, unseen", _EMBER))
        if parent is not None:
            axes.axhline(parent, color=_INK, linewidth=1.0, linestyle=(0, (4, 3)))
            labels.append((parent, "parent", _INK))
        # An untrained quantized model can start at ten times the loss it ends with: show the part that is read.
        tail = sorted(y for _, y in (soft[len(soft) // 20 :] or soft) + hard[1:] + hard[-1:])
        values = [*tail, *([parent] if parent is not None else [])]
        low, high = min(values), max(values)
        margin = 0.06 * (high - low or 1.0)
        axes.set_ylim(low - margin, high + margin)
        first, last = min(x[0][0] for x in (soft, hard) if x), max(x[-1][0] for x in (soft, hard) if x)
        axes.set_xlim(first, last if last > first else first + 1)
        _label_ends(axes, labels, _TALL)
        axes.set_xlabel("step")
        what = "Hard loss" if taught else "Soft training loss and hard loss"
        return _svg(figure, name, f"{what} on unseen text over steps, in nats per token")


def taught_loss(log: TrainingLog, *, name: str, width: int = 420) -> str | None:
    """Training loss of a run with a teacher over steps; None where it was not logged."""
    series = _series((row.step, row.loss) for row in log.rows)
    return _single(series, name, width, "Training loss with a teacher over steps, in nats per token")


def knobs(log: TrainingLog, *, name: str, width: int = 420) -> str | None:
    """Pressure, and the temperature of the coolest, mean and hottest tensor, over steps; None without either."""
    pressure = _series((row.step, row.pressure) for row in log.rows)
    mean = _series((row.step, row.temperature[1]) for row in log.rows)
    band = [
        (row.step, row.temperature[0], row.temperature[2])
        for row in _thinned(list(log.rows))
        if row.temperature[0] is not None and row.temperature[2] is not None
    ]
    if not pressure and not mean:
        return None
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(width, _LOW)
        labels: list[tuple[float, str, str]] = []
        if pressure:
            axes.plot(*_columns(pressure), color=_INK)
            labels.append((pressure[-1][1], "pressure", _INK))
        if band:
            steps, low, high = zip(*band, strict=True)
            axes.fill_between(steps, low, high, color=_EMBER, alpha=0.25, linewidth=0)
        if mean:
            axes.plot(*_columns(mean), color=_EMBER)
            labels.append((mean[-1][1], "temperature", _EMBER))
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        _label_ends(axes, labels, _LOW)
        axes.margins(x=0)
        axes.set_xlabel("step")
        return _svg(figure, name, "Pressure and temperature over steps")


def saturated(log: TrainingLog, *, name: str, width: int = 420) -> str | None:
    """Share of weights that hardly learn any more, over steps; None where it was not logged."""
    series = _series((row.step, row.saturated) for row in log.rows)
    return _single(series, name, width, "Share of saturated weights over steps", percent=True)


def gradient_norm(log: TrainingLog, *, name: str, width: int = 420) -> str | None:
    """Norm of the gradient before clipping, over steps; None where it was not logged.

    The axis is logarithmic where the norm spans more than a factor of 20.
    """
    series = [(x, y) for x, y in _series((row.step, row.grad_norm) for row in log.rows) if y > 0]
    norms = [y for _, y in series] or [1.0]
    return _single(series, name, width, "Gradient norm over steps", logarithmic=max(norms) > 20 * min(norms))


def learning_rate(log: TrainingLog, *, name: str, width: int = 420) -> str | None:
    """The learning rate over steps; None where it was not logged."""
    series = _series((row.step, row.learning_rate) for row in log.rows)
    return _single(series, name, width, "Learning rate over steps")


def weights(histogram: Histogram, thresholds: Sequence[float], *, name: str, width: int = 420) -> str | None:
    """Latent weights before and after training in units of their scale; ``thresholds`` separate the codes.

    The bin around zero, between the thresholds on either side of it, is shaded: the dead zone, where a weight's code
    is 0. Returns None for a histogram without weights.
    """
    before, after = (_density(histogram.edges, counts) for counts in (histogram.before, histogram.after))
    if not before or not after:
        return None
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(width, _LOW)
        below = [t for t in thresholds if t < 0]
        above = [t for t in thresholds if t > 0]
        if below and above and 0.0 not in thresholds:
            axes.axvspan(max(below), min(above), color=_RULE, alpha=0.45, linewidth=0)
        for threshold in thresholds:
            axes.axvline(threshold, color=_SOFT, linewidth=0.9, linestyle=(0, (2, 2)))
        axes.stairs(before, histogram.edges, color=_SLATE, fill=True, alpha=0.35, linewidth=0)
        axes.stairs(after, histogram.edges, color=_EMBER, linewidth=1.6)
        edge = _reach(histogram)
        axes.set_xlim(-edge, edge)
        axes.set_ylim(0, 1.12 * max(*before, *after))
        axes.yaxis.set_major_locator(NullLocator())
        ticks = sorted({*thresholds, -1.0, 0.0, 1.0}) if len(thresholds) <= 2 else [*thresholds]
        axes.set_xticks([t for t in ticks if abs(t) < edge], [_short(t) for t in ticks if abs(t) < edge])
        return _svg(figure, name, "Weights in units of their scale, before and after training")


def pareto(curve: Sequence[Sequence[float]], chosen: Sequence[float], form: str, width: int = 640) -> bytes:
    """Predicted KL against stored bits per weight with the chosen point: a file of its own, ``svg`` or ``png``.

    Args:
        curve: (bits, predicted KL) of the best plan at other budgets, ascending.
        chosen: bits and predicted KL of this plan.
        form: "svg" or "png".
        width: in CSS pixels; a png has twice as many.
    """
    with matplotlib.rc_context({key: _PRINTED.get(value, value) for key, value in _STYLE.items()}):
        figure, axes = _figure(width, _TALL)
        shown = [(bits, damage) for bits, damage in curve if damage > 0.0]
        axes.plot([b for b, _ in shown], [d for _, d in shown], color=_PRINTED[_SLATE], marker="o", markersize=3)
        if chosen[1] > 0.0:
            axes.plot([chosen[0]], [chosen[1]], color=_PRINTED[_EMBER], marker="o", markersize=8)
            label = f"{chosen[0]:.2f} bits, KL {chosen[1]:.3g}"
            axes.annotate(label, (chosen[0], chosen[1]), (10, 8), textcoords="offset points", color=_PRINTED[_EMBER])
        if shown:
            axes.set_yscale("log")
            axes.yaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel("stored bits per weight")
        axes.set_ylabel("predicted KL, nats per token")
        buffer = io.BytesIO()
        metadata = {"Date": None} if form == "svg" else {"Software": None}
        figure.savefig(buffer, format=form, dpi=2 * _DPI, facecolor="white", metadata=metadata)
        return buffer.getvalue()


def _single(
    series: Series, name: str, width: int, title: str, *, percent: bool = False, logarithmic: bool = False
) -> str | None:
    if not series:
        return None
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(width, _LOW)
        axes.plot(*_columns(series), color=_INK, linewidth=1.3)
        axes.margins(x=0)
        if logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        else:
            axes.set_ylim(bottom=0.0)
            form = (lambda y, _: f"{100 * y:g} %") if percent else (lambda y, _: f"{y:g}")
            axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
            axes.yaxis.set_major_formatter(FuncFormatter(form))
        axes.set_xlabel("step")
        return _svg(figure, name, title)


def _figure(width: int, height: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.xaxis.set_major_locator(MaxNLocator(5 if width > 500 else 4, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5 if height > 250 else 4, steps=[1, 2, 2.5, 5, 10]))
    return figure, axes


def _series(points: Iterable[tuple[int, float | None]]) -> Series:
    return _thinned([(x, y) for x, y in points if y is not None])


def _thinned(items: list[T]) -> list[T]:
    """At most ``_MOST_POINTS`` of the items, evenly spaced, the last one kept: a page is not a database."""
    stride = -(-len(items) // _MOST_POINTS)
    return items if stride <= 1 else [*items[:-1:stride], items[-1]]


def _columns(series: Series) -> tuple[list[int], list[float]]:
    return [x for x, _ in series], [y for _, y in series]


def _density(edges: Sequence[float], counts: Sequence[float]) -> list[float]:
    """Counts per unit length as a share of all, so bins of different widths compare; empty without any weight."""
    total = sum(counts)
    if not total > 0:
        return []
    return [c / (b - a) / total for a, b, c in zip(edges, edges[1:], counts, strict=False)]


def _reach(histogram: Histogram) -> float:
    """Half the width to show: the middle 99.8 % of both histograms, at least 1.25 scales, symmetric around 0."""
    reach = 1.25
    for counts in (histogram.before, histogram.after):
        left, total = 0.0, sum(counts)
        for low, high, count in zip(histogram.edges, histogram.edges[1:], counts, strict=False):
            if left + count > 0.001 * total and left < 0.999 * total:
                reach = max(reach, -low, high)
            left += count
    return reach


def _short(value: float) -> str:
    return f"{value:g}".replace("-", "−").replace("0.5", "½")


def _label_ends(axes: Axes, labels: Sequence[tuple[float, str, str]], height: int) -> None:
    """Write each label right of the axes at its value, pushed apart where lines end close together."""
    low, high = axes.get_ylim()
    gap = 15.0 / (height - 50.0) * (high - low)
    ordered = sorted(labels)
    places = [min(max(value, low), high) for value, _, _ in ordered]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    overflow = max(0.0, places[-1] - high) if places else 0.0
    for i in reversed(range(len(places))):  # pushed over the top: move down, and push the lower ones down in turn
        limit = places[i + 1] - gap if i + 1 < len(places) else places[i] - overflow
        places[i] = min(places[i], limit)
    for place, (_, words, colour) in zip(places, ordered, strict=True):
        axes.annotate(
            words, (1.0, place), (6, 0), ("axes fraction", "data"), "offset points", color=colour, va="center_baseline"
        )


def _svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an ``<svg>`` element for HTML: no prolog, no namespaces, themed colours, ids of its own."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", drawing).replace("xlink:href", "href")
    drawing = re.sub(r'\bid="', f'id="{name}-', drawing)
    drawing = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", drawing)
    for colour, variable in _VARIABLES.items():
        drawing = drawing.replace(colour, f"var({variable})")
    # The page's style sheet sets the font and the joins; matplotlib's own rule would apply to the whole page.
    drawing = re.sub(r"<style.*?</style>|font-family: [^;\"]*; ", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r'width="([\d.]+)pt" height="([\d.]+)pt"', r'width="\1" height="\2"', drawing, count=1)
    opening = f'<svg role="img" aria-label="{title}" '
    return re.sub(r"\s*\n\s*", "\n", drawing.replace("<svg ", opening, 1)).strip()
