"""TQ2_0 with a Q8_0 head against F16: a random Llama of 336M parameters, measured by ``hestia bench``.

    python benchmarks/exports/speed.py [--folder DIR]

Makes the frozen run (``large_run``), exports it, and runs ``hestia bench`` on the files from inside their folder, one
thread. What is in DIR already is used again. The record is what ``hestia bench --out`` writes, with its command.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import large_run

from hestia.export import export_model
from hestia.export.frozen import FrozenModel

RESULT = Path(__file__).parents[1] / "results" / "export_speed.json"
SIZES = {"hidden": 1024, "intermediate": 2816, "layers": 24, "vocabulary": 32000}
FILES = {
    "f16.gguf": ("gguf:f16", "f16"),
    "tq2_0-q8_0.gguf": ("gguf:tq2_0", "q8_0"),
    "tq2_0-f16.gguf": ("gguf:tq2_0", "f16"),
}
WANTED = 2.5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rounds", default="3")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        if not (folder / "run").exists():
            large_run.make(folder / "run", **SIZES)
        for name, (target, head) in FILES.items():
            if not (folder / name).exists():
                export_model(FrozenModel(folder / "run"), target, folder / name, head=head)
        out = (folder / "bench.json").resolve()
        options = ["--threads", "1", "--rounds", given.rounds, "--out", "bench.json"]
        command = [sys.executable, "-m", "hestia", "bench", *FILES, *options]
        subprocess.run(command, cwd=folder, check=True)
        record = json.loads(out.read_text())
    record["model"] = {"made_by": "benchmarks/exports/large_run.py", **SIZES}
    record["exports"] = {name: {"target": target, "head": head} for name, (target, head) in FILES.items()}
    RESULT.write_text(json.dumps(record, indent=1) + "\n")
    reached = record["files"][1]["times_first"]
    print(f"TQ2_0 with a Q8_0 head: {reached:.2f} x F16 ({WANTED} wanted)", file=sys.stderr)
    return int(reached < WANTED)


if __name__ == "__main__":
    sys.exit(main())
