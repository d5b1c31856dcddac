"""What an export holds in memory, and how long it takes.

    python benchmarks/exports/memory.py [--folder DIR] [--targets gguf:tq2_0 hf ...]

A synthetic sharded checkpoint of 2.2 GB (``large_run``) is exported to each target in a process of its own. The peak is
the growth of RssAnon (anonymous memory: mapped files do not count) over its value after all imports, sampled every two
milliseconds; the promise is twice the largest tensor in fp32 and 64 MB. The bundled 6M model is exported too, for the
time alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "export_memory.json"
TARGETS = ("gguf:tq2_0", "gguf:q2_k", "gguf:q2_0", "hf", "hf:int4", "mlx")


def anonymous() -> int:
    """RssAnon of this process, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


def child(run: Path, target: str, out: Path, head: str) -> dict[str, Any]:
    """One export, watched from a thread beside it."""
    import gguf  # noqa: F401 - what an export imports lazily belongs to the baseline
    from transformers import LlamaForCausalLM  # noqa: F401

    from hestia.export import export_model
    from hestia.export import gguf as gguf_export  # noqa: F401
    from hestia.export import mlx as mlx_export  # noqa: F401
    from hestia.export.frozen import FrozenModel

    frozen = FrozenModel(run)
    largest = max(frozen.tensor(name).numel() for name in frozen.names()) * 4
    before = anonymous()
    peak, done = [before], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    entry = export_model(frozen, target, out, head=head)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return {
        "target": target,
        "head": head,
        "seconds": seconds,
        "bytes": entry["bytes"],
        "peak_above_baseline": peak[0] - before,
        "allowed": 2 * largest + 64 * 2**20,
    }


def spawn(run: Path, target: str, out: Path, head: str) -> dict[str, Any]:
    """``child`` in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", str(run), target, str(out), head],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    return json.loads(done.stdout.splitlines()[-1])


def tiny_run(out: Path) -> Path:
    """The bundled 6M model, rounded."""
    import toy_runs
    from transformers import AutoModelForCausalLM

    from hestia.tiny import model_path

    model = AutoModelForCausalLM.from_pretrained(model_path())
    toy_runs.freeze(model, out, dtype=model.dtype)
    for file in model_path().iterdir():
        if file.name.startswith("tokenizer"):
            shutil.copy(file, out / "model" / file.name)
    return out


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        run, target, out, head = sys.argv[2:]
        print(json.dumps(child(Path(run), target, Path(out), head)))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to work; it needs 5 GB")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    given = parser.parse_args()
    import large_run
    import torch

    from hestia.provenance import machine, versions

    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        parameters = large_run.make(folder / "run", hidden=2048, intermediate=5632, layers=22, vocabulary=32000)
        checkpoint = sum(file.stat().st_size for file in (folder / "run" / "model").glob("*.safetensors"))
        rows = [spawn(folder / "run", target, folder / "out", "auto") for target in given.targets]
        rows.append(spawn(folder / "run", "gguf:tq2_0", folder / "out", "q8_0"))
        tiny = tiny_run(folder / "tiny")
        small = [spawn(tiny, target, folder / "out", "auto") for target in ("gguf:q4_0", "gguf:q2_0", "hf")]
    record = {
        "schema": 1,
        "command": "python benchmarks/exports/memory.py",
        "parameters": parameters,
        "checkpoint_bytes": checkpoint,
        "exports": rows,
        "small_model": small,
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
    }
    RESULT.write_text(json.dumps(record, indent=1) + "\n")
    for row in [*rows, *small]:
        print(
            f"{row['target']:<11} head {row['head']:<5} {row['seconds']:7.1f} s  {row['bytes'] / 1e6:8.0f} MB file  "
            f"peak {row['peak_above_baseline'] / 2**20:7.0f} MiB of {row['allowed'] / 2**20:.0f} allowed"
        )
    return int(any(row["peak_above_baseline"] > row["allowed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
