"""A run of several widths: calibrated, allocated, trained, frozen, exported and verified by one command."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file
from toy_runs import QUICK, Invoke


def test_a_budget_of_bits_goes_the_whole_way(
    invoke: Invoke, toy_parent: Path, toy_text: Path, tmp_path: Path, lean: None
) -> None:
    run = tmp_path / "run"
    words = ("quantize", toy_parent, "--data", toy_text, "--target", "gguf:mixed", "--bits", "2.6", "--out", run)
    status, out, err = invoke(*words, *QUICK, "--json")
    assert status == 0, err
    report, plan = json.loads(out), json.loads((run / "plan.json").read_text(encoding="utf-8"))
    spending = plan["spending"]
    assert (
        spending["asked_bits"] == 2.6 and spending["bits"] <= 2.6 and spending["source"].startswith("half of dW' G dW")
    )
    [export] = report["exports"]
    assert export["verify"]["codes_equal"] is True
    assert report["bits_per_weight"]["quantized_layers"] <= 2.6
    codes = load_file(run / "codes.safetensors")
    assert len({len(layer["levels"]) for layer in plan["layers"].values()}) > 1, "one width would be no test"
    for path, layer in plan["layers"].items():
        assert set(codes[f"{path}.codes"].unique().tolist()) <= {int(v) for v in layer["levels"]}


def test_plan_draws_the_curve_beside_itself(invoke: Invoke, toy_parent: Path, toy_text: Path, tmp_path: Path) -> None:
    table, plan = tmp_path / "s.json", tmp_path / "plan.json"
    words = ("calibrate", toy_parent, "--data", toy_text, "--calibrate", "3", "--seq-len", "32", "--out", table)
    assert invoke(*words)[0] == 0
    words = ("plan", toy_parent, "--sensitivity", table, "--target", "gguf:mixed", "--bits", "2.6", "--out", plan)
    status, text, _ = invoke(*words)
    assert status == 0
    assert "O: this plan" in text and "asked for at most 2.6 bits" in text
    assert plan.with_suffix(".svg").read_text(encoding="utf-8").startswith("<?xml")
    assert plan.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    first = plan.read_bytes()
    status, text, _ = invoke(*words, "--json")
    assert json.loads(text) == json.loads(first) and plan.read_bytes() == first
    status, _, err = invoke(*words[:-4], "--bits", "1.2", "--out", plan)
    assert status == 2 and "ask for --bits 2.0000 or more" in err
