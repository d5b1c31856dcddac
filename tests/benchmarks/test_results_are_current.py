"""The README's table and RESULTS.md say what the result files say."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_generated_texts_match_the_result_files() -> None:
    script = ROOT / "benchmarks" / "make_results.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_matrix_of_exports_matches_its_numbers() -> None:
    script = ROOT / "benchmarks" / "exports" / "matrix.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
