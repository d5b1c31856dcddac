"""``torchrun -m hestia quantize``: one set of files, one line on standard output, the numbers of one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from processes import environment, free_port
from safetensors.torch import load_file
from toy_runs import CALIBRATED, QUICK


@pytest.mark.slow
def test_the_main_job_by_two_processes(
    toy_parent: Path, toy_text: Path, toy_held_out: Path, toy_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    job = ["-m", "hestia", "quantize", str(toy_parent), "--data", str(toy_text), "--eval-data", str(toy_held_out)]
    more = ["--target", "hf", "--target", "gguf:q4_0", "--out", str(out), "--json", *QUICK, *CALIBRATED]
    done = subprocess.run(
        [*launch, *job, *more], env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 1, "only the first process speaks"
    record, alone = json.loads(lines[0]), json.loads((toy_run / "report.json").read_text())
    assert record == json.loads((out / "report.json").read_text())
    for kind, nll in alone["nll"].items():
        assert record["nll"][kind] == pytest.approx(nll, rel=1e-3), kind
    assert record["scores"]["parent"]["tokens"] == alone["scores"]["parent"]["tokens"]
    assert record["steps"] == alone["steps"] and record["tokens"] == alone["tokens"]
    assert all(entry["verify"]["ok"] for entry in record["exports"])
    mine, theirs = (load_file(run / "codes.safetensors") for run in (out, toy_run))
    names = [name for name in mine if name.endswith(".codes")]
    differing = sum(int((mine[name] != theirs[name]).sum()) for name in names)
    assert differing < 0.001 * sum(mine[name].numel() for name in names)
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in toy_run.iterdir())
