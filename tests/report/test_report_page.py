"""html.py and plots.py: one self-contained page, whatever the run calls its tensors."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from report_runs import PATHS, diagnostics, make_run, plan, report, sensitivity

from hestia.report import plots
from hestia.report.diagnostics import Histogram
from hestia.report.heatmap import draw, heat_map
from hestia.report.html import write_report
from hestia.report.records import RunRecord
from hestia.report.sensitivity import Trace
from hestia.report.training_log import TrainingLog, TrainingRow

VOID = {"meta", "br", "link", "img", "input", "hr"}
EVIL = "model.layers.0.\"'><script>alert(1)</script><svg onload=alert(2)>$\\frac{&amp;}</style>"


class Page(HTMLParser):
    """The tags, ids, attributes and visible text of a page; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(make_run(tmp_path_factory.mktemp("full") / "run")).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Every string of the run is an attack, every optional number null, the log empty."""

    def spoil(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: spoil(v) for k, v in value.items()}
        if isinstance(value, list):
            return [spoil(v) for v in value]
        return EVIL if isinstance(value, str) else value

    record = spoil(report()) | {"versions": {EVIL: EVIL}, "data": {EVIL: [EVIL, {EVIL: None}]}, "nll_interval": {}}
    record |= {"learning_rate": None, "kl_to_parent": None, "tokens_per_second": None}
    shares, traces, layers = diagnostics(), sensitivity(), plan()
    first = next(iter(PATHS))
    shares["histograms"] = {EVIL: shares["histograms"][first]}
    shares["codes"] = {EVIL: {"zero_share": None, "flipped_share": None}}
    shares["samples"] = [{"prompt": EVIL, "parent": "\ud800 half a pair", "quantized": EVIL}]
    nothing = dict.fromkeys(traces["tensors"][first])
    traces["tensors"] = {EVIL: traces["tensors"][first], f"{EVIL}2": nothing}
    layers["layers"] = {EVIL: spoil(layers["layers"][first])}
    layers["kept"] = {EVIL: {"reason": EVIL, "weights": 1}}
    run = make_run(
        tmp_path_factory.mktemp("hostile") / "<b>run",
        report=record,
        log_text="",
        plan=layers,
        sensitivity=traces,
        diagnostics=shares,
    )
    return write_report(run).read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_ids_are_unique(full: str) -> None:
    page = Page(full)
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.count("svg") == 2 + 4 + 6  # loss wide and narrow, four small curves, six histograms


@pytest.mark.parametrize("which", ["full", "hostile"])
def test_nothing_is_loaded_from_anywhere(which: str, request: pytest.FixtureRequest) -> None:
    text = request.getfixturevalue(which)
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    addresses = [value for _, name, value in page.attributes if name in ("href", "src", "xlink:href", "action")]
    assert addresses and all(value.startswith("#") and value[1:] in page.ids for value in addresses)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert "http:" not in text and "https:" not in text and "@import" not in text
    assert all(target.strip("\"'").startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


def test_strings_of_the_run_stay_strings(hostile: str) -> None:
    page = Page(hostile)
    assert "<script" not in hostile and "<svg onload" not in hostile
    assert hostile.count("</style>") == 1
    # model, summary, exports, sensitivity, histogram, sample, plan, kept, versions, data: shown as they are
    assert page.text.count("<script>alert(1)</script>") > 15
    assert "? half a pair" in page.text
    assert all(re.fullmatch(r"[-\w:.%;, ()#']*", value) for _, name, value in page.attributes if name == "style")


def test_an_empty_log_and_null_numbers_are_said_not_drawn(hostile: str) -> None:
    page = Page(hostile)
    assert "The run left no training log" in page.text
    assert "nan" not in page.text.lower().replace("alert", "") and "None" not in page.text


def test_the_page_holds_what_the_issue_asks_for(full: str) -> None:
    text = " ".join(Page(full).text.split())
    for words in (
        "loses 0.285 nats per token",  # the verdict
        "27.6",  # perplexity of the parent
        "✓ codes equal",
        "llama.cpp b6912",
        "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "soft, training",
        "hard, unseen",
        "17.1 %",  # the trace that rests on one sequence
        "31.0 % of the codes are zero",
        "It was a truth universally acknowledged",
        "Kept, embedding: 1 tensor, 1,048,576 weights",
        "hestia quantize models/books-6m --data 'my books.txt'",
        "transformers 5.23.0",
        "0.006 · chosen",
        "6 of 12 tensors",
    ):
        assert words in text, words


def test_the_pilots_losses_are_not_called_held_out(full: str) -> None:
    section = (
        " ".join(Page(full).text.split()).split("The pilot that chose the learning rate")[1].split("Sensitivity")[0]
    )
    assert "hard loss" in section and "tuning blocks" in section and "held-out" not in section


@pytest.mark.parametrize(
    ("primary", "signed", "said", "unsaid"),
    [
        ("trace", False, ("the trace of its curvature, geometric mean over 64", "not the trace beside it"), ()),
        ("trace", True, ("the trace of its curvature, mean over 64", "covers the mean, nominally"), ("geometric",)),
        ("eigenvalue", True, ("largest in magnitude, mean over 64", "eigenvalue ± standard error"), ("trace",)),
        ("kl:ternary", False, ("alone is rounded to ternary: KL in nats per token", "KL ± standard error"), ("trace",)),
        ("<b>new", False, ("What was measured of each weight matrix: <b>new, geometric mean",), ("trace",)),
    ],
)  # fmt: skip
def test_the_sensitivity_is_called_by_what_was_measured(
    primary: str, signed: bool, said: tuple[str, ...], unsaid: tuple[str, ...], tmp_path: Path
) -> None:
    record = sensitivity() | {"primary": primary}
    if signed:
        for i, entry in enumerate(record["tensors"].values()):
            entry["geometric_mean"] = None
            entry["low"] = -entry["low"] if i == 0 else entry["low"]
    page = Page(write_report(make_run(tmp_path / "run", sensitivity=record)).read_text(encoding="utf-8"))
    section = " ".join(page.text.split()).split("Sensitivity")[-1].split("Weights, before and after")[0]
    for words in said:
        assert words in section, words
    for words in unsaid:
        assert words not in section, words


def test_what_the_watch_saw_is_told_once_each(tmp_path: Path) -> None:
    lines = [
        {"step": 30, "loss_spike": 9.25, "highest_before": 4.5},
        {"step": 40, "collapsed": {EVIL: "all zero"}},
        {"step": 30, "loss_spike": 9.25, "highest_before": 4.5},  # a resumed run says it again
        {"step": 60, "collapsed": {EVIL: None}},
        {"step": 65, "collapsed": {"half a pair \ud800": "all zero"}},
        {"step": 70, "loss_spike": None, "collapsed": 3},
    ]
    run = make_run(tmp_path / "run", log_text="\n".join(map(json.dumps, lines)))
    assert [step for step, _ in RunRecord.load(run).log.events] == [30, 40, 60, 65]
    text = write_report(run).read_text()
    assert Page(text).text.count("step 30: the loss jumped to 9.250, from at most 4.500") == 1
    assert "codes collapsed, all zero" in text and "codes use both signs again" in text
    assert "<script>" not in text


def test_light_dark_phone_and_paper_have_rules(full: str) -> None:
    for rule in ("prefers-color-scheme: dark", "max-width: 44rem", "@media print", 'name="viewport"'):
        assert rule in full


def test_a_failed_verification_cannot_be_overlooked(tmp_path: Path) -> None:
    record = report()
    record["exports"][0]["verify"]["codes_equal"] = False
    text = Page(write_report(make_run(tmp_path / "run", report=record)).read_text(encoding="utf-8")).text
    assert "✗ codes differ" in text and "Do not use it." in text


def test_a_kept_tensor_that_differs_fails_the_file_although_its_codes_are_equal(tmp_path: Path) -> None:
    record = report()
    record["exports"][1]["verify"] |= {"ok": False, "differences": ["lm_head.weight: <7 of 4096 rows>"], "notes": []}
    text = Page(write_report(make_run(tmp_path / "run", report=record)).read_text(encoding="utf-8")).text
    assert "✗ file differs" in text and "lm_head.weight: <7 of 4096 rows>" in text
    assert "The written file differs from the trained model: hf." in text


def test_a_report_alone_makes_a_page(tmp_path: Path) -> None:
    required = {k: v for k, v in report().items() if k not in ("baselines", "nll_interval", "command", "versions")}
    required = {k: v for k, v in required.items() if k not in ("machine", "model", "parent_dtype", "data", "started")}
    run = make_run(
        tmp_path / "run", report=required | {"exports": []}, log_text="", plan=None, sensitivity=None, diagnostics=None
    )
    (run / "run.yaml").unlink()
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "Nothing was exported" in page.text and "svg" not in page.tags


def test_the_page_is_a_function_of_the_run(tmp_path: Path) -> None:
    record = RunRecord.load(make_run(tmp_path / "run"))
    first, second = (plots.loss(record.log, parent=3.3, name="x") for _ in range(2))
    assert first == second


def test_figures_follow_the_style_sheet_and_name_no_colour_of_their_own() -> None:
    rows = tuple(TrainingRow(step=i, loss=3.0 - 0.01 * i, pressure=1.0, grad_norm=10.0**i) for i in range(5))
    log = TrainingLog(rows, ((0, 4.0), (4, 2.9)))
    for drawing in (
        plots.loss(log, parent=2.5, name="a"),
        plots.knobs(log, name="b"),
        plots.gradient_norm(log, name="c"),
    ):
        assert drawing is not None
        assert "var(--" in drawing and not re.findall(r"(?<=[: ])#[0-9a-f]{3,8}\b", drawing)
        assert "<style" not in drawing and "xmlns" not in drawing and "metadata" not in drawing


def test_losses_that_are_null_leave_no_curve() -> None:
    log = TrainingLog((TrainingRow(step=0), TrainingRow(step=1)))
    assert plots.loss(log, parent=1.0, name="a") is None
    assert plots.knobs(log, name="b") is None and plots.saturated(log, name="c") is None


def test_single_points_and_long_logs_are_drawn() -> None:
    one = plots.loss(TrainingLog((TrainingRow(step=7, loss=2.0),)), parent=None, name="a")
    long = plots.loss(
        TrainingLog(tuple(TrainingRow(step=i, loss=2.0 + i % 7) for i in range(50_000))), parent=1.0, name="b"
    )
    assert one and long and len(long) < 100_000


def label_heights(drawing: str) -> dict[str, float]:
    found = re.findall(r'<text[^>]*\by="([\d.]+)"[^>]*>([^<]+)</text>', drawing)
    return {words: float(y) for y, words in found}


def test_labels_of_lines_that_end_together_do_not_overlap() -> None:
    rows = tuple(TrainingRow(step=i, loss=2.0) for i in range(20))
    drawing = plots.loss(TrainingLog(rows, ((0, 3.0), (19, 2.001))), parent=1.999, name="a")
    assert drawing is not None
    heights = label_heights(drawing)
    places = sorted(heights[words] for words in ("parent", "soft, training", "hard, unseen"))
    assert places[1] - places[0] > 11 and places[2] - places[1] > 11


def histogram(edges: list[float], counts: list[float]) -> Histogram:
    return Histogram(path="x", edges=tuple(edges), before=tuple(counts), after=tuple(counts))


def test_the_histogram_marks_its_thresholds() -> None:
    edges = [-2.0 + 0.25 * i for i in range(17)]
    drawing = plots.weights(histogram(edges, [1.0] * 16), (-0.5, 0.5), name="a")
    assert drawing is not None
    assert {"−½", "½", "−1", "0", "1"} <= label_heights(drawing).keys()
    assert plots.weights(histogram(edges, [0.0] * 16), (-0.5, 0.5), name="a") is None


def test_the_heat_map_file_escapes_names_and_shades_by_value() -> None:
    traces = [Trace(path=f"layers.{k}.<b>{name}", trace=10.0**k) for k in (0, 2) for name in ("q", "v")]
    heat = heat_map(traces)
    assert heat is not None
    drawing = draw(heat, "KL & more")
    root = ElementTree.fromstring(drawing)
    boxes = [e for e in root.iter() if e.tag.endswith("rect")][1:]
    assert len(boxes) == 4
    assert boxes[0].get("fill") == "rgb(255,247,237)" and boxes[-1].get("fill") == "rgb(194,65,12)"
    assert "<b>" not in drawing and "KL &amp; more" in drawing and "href" not in drawing
