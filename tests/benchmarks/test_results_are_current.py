"""The README, the tables and what is written about them say what the result files say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_generated_texts_match_the_result_files() -> None:
    script = ROOT / "benchmarks" / "make_results.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_matrix_of_exports_matches_its_numbers() -> None:
    script = ROOT / "benchmarks" / "exports" / "matrix.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


NUMBER = r"[-+]?\d+\.\d+"
INTERVAL = re.compile(rf"({NUMBER}) \[({NUMBER}), ({NUMBER})\]")


def intervals(*pages: Path) -> set[tuple[float, float, float]]:
    """Every ``mean [low, high]`` of the pages."""
    text = " ".join(page.read_text(encoding="utf-8") for page in pages)
    plain = re.sub(r"\s+", " ", text.replace("\N{MINUS SIGN}", "-").replace("**", ""))
    return {(float(mean), float(low), float(high)) for mean, low, high in INTERVAL.findall(plain)}


@pytest.mark.parametrize("page", ["README.md", "docs/results/README.md", "docs/choosing-a-recipe.md"])
def test_every_interval_that_was_written_by_hand_stands_in_a_table(page: str) -> None:
    """Rounded, or as the difference the other way round."""
    tables = intervals(*(ROOT / "docs" / "results").glob("stage-*.md"))
    tables |= {(-mean, -high, -low) for mean, low, high in tables}
    told = intervals(ROOT / page)
    assert told
    for interval in told:
        assert any(max(abs(a - b) for a, b in zip(interval, row, strict=True)) < 0.000501 for row in tables), interval
