"""The main job on a device that is not the CPU: nothing is left behind on the CPU, and the numbers are the CPU's.

Scores of a model that was not trained are equal to the last bit. Training rounds in another order (the gradient's norm
is taken of all tensors at once), which fp32 keeps small and bf16 does not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration
from toy_runs import make_parent, write_stories

HERE = Path(__file__).parent


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="torch without Python backends"
)
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("scale", ["few", pytest.param("all", marks=pytest.mark.slow)])
def test_a_run_elsewhere_ends_in_the_model_of_a_run_here(tmp_path: Path, scale: str) -> None:
    parent, text = make_parent(tmp_path / "parent"), write_stories(tmp_path / "text.txt", 400, seed=1)
    words = [sys.executable, str(HERE / "runs.py"), str(parent), str(text), str(tmp_path), scale]
    places = os.pathsep.join([str(HERE.parent), str(HERE.parent / "training")])
    # whatever the machine has, the other side is the CPU
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([places, os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=1400)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    (traces, *scores), (traces_there, *scores_there) = found["verbs"]
    assert traces_there == pytest.approx(traces, rel=1e-5) and scores_there == scores
    assert found["runs"]
    for name, (here, there) in found["runs"].items():
        assert (here["device"], there["device"]) == ("cpu", "pretended"), name
        assert there["verified"] and all(there["verified"]), name
        for untrained in ("parent", "round_to_nearest"):
            assert there["nll"][untrained] == here["nll"][untrained], name
        close = {"abs": 0.02 if "bf16" in name else 1e-5}
        assert there["nll"]["quantized"] == pytest.approx(here["nll"]["quantized"], **close), name
        assert there["kl"] == pytest.approx(here["kl"], **close), name
