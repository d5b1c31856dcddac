"""tables.py, wording.py and heatmap.py: the same honest numbers in the terminal as on the page."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import toy_models
from hypothesis import given
from hypothesis import strategies as st
from report_runs import make_run, report

import hestia
from hestia.report import wording
from hestia.report.heatmap import heat_map
from hestia.report.records import RunRecord
from hestia.report.sensitivity import Trace
from hestia.report.tables import compare, headline, headline_rows
from hestia.report.wording import duration, significant, size, verdict


def load(tmp_path: Path, name: str = "run", **changes: Any) -> RunRecord:
    return RunRecord.load(make_run(tmp_path / name, report=report() | changes))


def test_headline_rows_their_order_and_what_rounding_shares_with_ours(tmp_path: Path) -> None:
    rows = headline_rows(load(tmp_path))
    assert [r.label for r in rows] == ["parent", "round_to_nearest", "bitnet_ste", "hestia"]
    assert (rows[0].kl, rows[0].top1, rows[0].bits) == (0.0, 1.0, 16)
    assert rows[0].bytes == 2 * (4_718_592 + 1_051_904)
    assert (rows[1].nll, rows[1].kl, rows[1].bits, rows[1].bytes) == (7.9184, 4.91, 2.0625, 2_311_424)
    assert rows[2].bits is None  # another recipe's file was not measured


def test_our_own_row_among_the_baselines_is_not_repeated_but_another_run_of_it_is(tmp_path: Path) -> None:
    same, other = {"recipe": "hestia", "nll": 3.6022}, {"recipe": "hestia", "nll": 3.55}
    rows = headline_rows(load(tmp_path, baselines=[same, other, {"recipe": "parent", "nll": 3.3171}]))
    assert [(r.label, r.kind, r.nll) for r in rows[2:]] == [("hestia", "baseline", 3.55), ("hestia", "ours", 3.6022)]


def test_rounding_takes_its_agreement_from_the_scores_where_no_baseline_has_it(tmp_path: Path) -> None:
    scores = {"round_to_nearest": {"nll": 7.9184, "kl_to_parent": 4.7, "top1_agreement": 0.05}}
    row = headline_rows(load(tmp_path, baselines=[], scores=scores))[1]
    assert (row.label, row.kl, row.top1) == ("round_to_nearest", 4.7, 0.05)


def test_a_run_of_plain_rounding_is_one_row(tmp_path: Path) -> None:
    record = load(tmp_path, recipe="round_to_nearest", nll={"parent": 3.3, "round_to_nearest": 7.9, "quantized": 7.9})
    assert [r.label for r in headline_rows(record)] == ["parent", "bitnet_ste", "round_to_nearest"]
    assert "it was rounded, not trained" in verdict(record).sentence


def test_the_headline_is_aligned_and_holds_the_numbers(tmp_path: Path) -> None:
    lines = headline(load(tmp_path)).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[-1].split()[:4] == ["hestia", "3.602", "36.7", "0.311"]
    assert "2.0625" in lines[-1] and "2.31 MB" in lines[-1]


def test_compare_sorts_by_loss_and_names_the_common_parent(tmp_path: Path) -> None:
    worse = {"parent": 3.3171, "round_to_nearest": 7.9184, "quantized": 3.9}
    lines = compare([load(tmp_path, "b", nll=worse), load(tmp_path, "a")]).splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["a", "b"]
    assert any(line.startswith("parent on the same text: 3.317") for line in lines)
    assert not any("NOT COMPARABLE" in line for line in lines)


@pytest.mark.parametrize(("apart", "comparable"), [(2e-6, True), (9e-4, True), (2e-3, False)])
def test_compare_takes_parents_for_the_same_up_to_rounding(tmp_path: Path, apart: float, comparable: bool) -> None:
    one, other = (
        {"parent": parent, "round_to_nearest": 7.9184, "quantized": 3.9} for parent in (3.12345, 3.12345 + apart)
    )
    said = compare([load(tmp_path, "a", nll=one), load(tmp_path, "b", nll=other)])
    assert ("NOT COMPARABLE" not in said) is comparable
    assert ("parent on the same text" in said) is comparable


def test_compare_says_when_runs_are_not_comparable(tmp_path: Path) -> None:
    other = {"parent": 2.0, "round_to_nearest": 7.9184, "quantized": 3.0}
    assert "NOT COMPARABLE" in compare([load(tmp_path, "a"), load(tmp_path, "b", nll=other)])


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path) -> None:
    record = load(tmp_path, recipe="evil\x1b[31m\nrow")
    for table in (headline(record), compare([record])):
        assert "\x1b" not in table and "evil�[31m�row" in table


def nll(parent: float | None, rounded: float | None, ours: float | None) -> dict[str, float | None]:
    return {"parent": parent, "round_to_nearest": rounded, "quantized": ours}


def test_the_verdict_of_a_good_run_leads_with_the_loss(tmp_path: Path) -> None:
    good = verdict(load(tmp_path))
    assert good.sentence == (
        "books-6m, made ternary by hestia, loses 0.285 nats per token of held-out text to its parent "
        "(perplexity 27.6 → 36.7); rounding without training loses 4.601."
    )
    assert good.cautions == () and not good.failed


@pytest.mark.parametrize(
    ("changes", "caution"),
    [
        ({"nll": nll(3.3, 3.5, 3.6)}, "Training did not help"),
        ({"nll": nll(3.3, 7.9, 4.3)}, "will hardly write sense; more --tokens, or more --bits, bring it nearer (perp"),
        ({"nll": nll(3.3, 7.9, 3.1)}, "better than its parent because it was trained on more text of this kind"),
        ({"nll": nll(3.3, 3.29, 3.29), "recipe": "round_to_nearest"}, "better than its parent is chance, on this text"),
        ({"baselines": [{"recipe": "bitnet_ste", "nll": 3.5}]}, "bitnet_ste did better here: 3.500"),
        (
            {"nll_interval": {"quantized_minus_round_to_nearest": {"mean": -0.01, "low": -0.03, "high": 0.01}}},
            "can resolve (interval −0.030 to 0.010)",
        ),
        ({"exports": [{"target": "hf", "path": "x", "bytes": 1, "sha256": "", "verify": None}]}, "Not verified"),
    ],
)
def test_the_verdict_says_what_speaks_against_the_run(tmp_path: Path, changes: dict[str, Any], caution: str) -> None:
    assert any(caution in c for c in verdict(load(tmp_path, **changes)).cautions)


def test_a_rounded_run_is_not_compared_with_its_rounding(tmp_path: Path) -> None:
    interval = {"quantized_minus_round_to_nearest": {"mean": 0.0, "low": 0.0, "high": 0.0}}
    found = verdict(load(tmp_path, recipe="round_to_nearest", nll=nll(3.3, 4.2, 4.2), nll_interval=interval))
    assert not any("plain rounding" in caution for caution in found.cautions)


def test_a_failed_verification_comes_first(tmp_path: Path) -> None:
    exports = report()["exports"]
    exports[0]["verify"]["codes_equal"] = False
    result = verdict(load(tmp_path, exports=exports, nll=nll(3.3, 3.5, 3.6)))
    assert result.failed and result.cautions[0].startswith(
        "The written file differs from the trained model: gguf:tq2_0"
    )


def test_without_a_measured_loss_the_verdict_claims_nothing(tmp_path: Path) -> None:
    sentence = verdict(load(tmp_path, nll=nll(None, None, None))).sentence
    assert "no usable held-out loss" in sentence and "loses" not in sentence


@given(st.floats(1e-300, 1e300), st.sampled_from([1, 2, 3, 5]))
def test_significant_keeps_the_value_to_its_digits(value: float, digits: int) -> None:
    back = float(significant(value, digits).replace("−", "-").replace(",", ""))
    assert math.isclose(back, value, rel_tol=0.5001 * 10.0 ** (1 - digits))


@given(st.floats(0, 1e7))
def test_durations_never_show_sixty_of_a_smaller_unit(seconds: float) -> None:
    assert " 60 " not in f" {duration(seconds)} " or seconds >= 3600 * 60


def test_sizes_are_decimal() -> None:
    assert [size(v) for v in (None, 0, 999, 1_000, 14_000_000, 2.5e9)] == [
        "–",
        "0 B",
        "999 B",
        "1.00 kB",
        "14.0 MB",
        "2.50 GB",
    ]


def trace(path: str, mean: float | None) -> Trace:
    return Trace(
        path=path,
        trace=mean,
        standard_error=None,
        geometric_mean=mean,
        low=None,
        high=None,
        largest_share=None,
        weights=None,
    )


def test_the_heat_map_places_layers_and_projections_on_a_log_scale() -> None:
    paths = {"m.layers.0.attn.q": 1.0, "m.layers.0.mlp.up": 10.0, "m.layers.10.attn.q": 100.0, "lm_head": 5.0}
    found = heat_map([trace(p, v) for p, v in paths.items()] + [trace("m.layers.2.attn.q", None)])
    assert found is not None
    assert found.labels == ("q", "up") and [layer for layer, _ in found.rows] == [0, 10]
    first, last = found.rows[0][1], found.rows[1][1]
    assert first[0] and first[1] and last[0] and last[1] is None
    assert (first[0].shade, first[1].shade, last[0].shade) == pytest.approx((0.0, 0.5, 1.0))


def test_projections_of_one_name_keep_what_tells_them_apart() -> None:
    found = heat_map([trace(f"h.0.{p}", 1.0) for p in ("attn.c_proj", "mlp.c_proj", "mlp.c_fc")])
    assert found is not None and found.labels == ("attn.c_proj", "mlp.c_proj", "c_fc")
    assert heat_map([trace("lm_head", 1.0)]) is None


def test_the_terminal_tables_cost_no_matplotlib() -> None:
    check = "import sys, hestia.report.tables; sys.exit('matplotlib' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_a_plan_of_one_width_is_called_by_it(tmp_path: Path) -> None:
    for bits, name in ((1.0, "binary"), (1.58, "ternary"), (2.0, "2-bit"), (3.0, "3-bit"), (4.0, "4-bit")):
        plan = hestia.plan(toy_models.llama(), "round_to_nearest", "gguf:mixed", bits=bits).to_json()
        run = make_run(tmp_path / name, plan=plan)
        assert wording.grid_name(RunRecord.load(run)) == name
