"""Does `hestia estimate` tell the truth about memory? Predicted against measured peaks.

    python benchmarks/memory.py [--models 6m 25m ...] [--stages calibrate train taught score export]

Random Llama models of 6M to 336M parameters, bf16 checkpoints. Every stage runs in a process of its own, on one thread,
by the functions that the command line calls: calibration of two sequences of 128 tokens with five candidates; two
training steps of two blocks of 128 under bf16 autocast, each followed by the hard loss of eight blocks; the same of 16
blocks with the parent as teacher ("taught"); the scoring of eight blocks against the parent; the export to hf, read
back and run. Peaks are the growth of RssAnon (anonymous memory: mapped files do not count), sampled every two
milliseconds, over its value after the same stage of a toy model, which imports all that is imported late and whose
freed memory is given back. Small models vary by a fifth from process to
process, as the heap falls; `--rounds` takes the median. Rows that the result file holds already are not measured again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "estimate" / "memory.json"
BATCH, TOKENS = 2, 128
ALLOWED = 0.15

MODELS: dict[str, dict[str, int]] = {
    "toy": {"hidden": 64, "intermediate": 128, "layers": 2, "heads": 2, "kv_heads": 1, "vocabulary": 4096},
    "6m": {"hidden": 256, "intermediate": 688, "layers": 6, "heads": 4, "kv_heads": 2, "vocabulary": 4096},
    "25m": {"hidden": 384, "intermediate": 1024, "layers": 12, "heads": 6, "kv_heads": 3, "vocabulary": 16384},
    "110m": {"hidden": 768, "intermediate": 2048, "layers": 13, "heads": 12, "kv_heads": 4, "vocabulary": 32000},
    "336m": {"hidden": 1024, "intermediate": 2816, "layers": 26, "heads": 16, "kv_heads": 8, "vocabulary": 32000},
}
STAGES = ("calibrate", "train", "taught", "score", "export")
TAUGHT_BATCH = 16


def make(name: str, folder: Path) -> Path:
    """A random model of the table with the bundled tokenizer, in bf16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from hestia.tiny import model_path

    sizes = MODELS[name]
    config = LlamaConfig(
        vocab_size=sizes["vocabulary"],
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["intermediate"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv_heads"],
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    out = folder / name
    if not (out / "config.json").is_file():
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(out)
        for file in model_path().iterdir():
            if file.name.startswith("tokenizer"):
                shutil.copy(file, out / file.name)
    return out


class Watch:
    """The peak of RssAnon while the block runs, sampled from a thread beside it."""

    def __enter__(self) -> Watch:
        self.before = self.peak = anonymous()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.peak = max(self.peak, anonymous())

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()


def anonymous() -> int:
    """RssAnon of this process, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


def child(model: Path, toy: Path, stage: str, scratch: Path) -> dict[str, Any]:
    """One stage of the toy, then of the model, watched."""
    import ctypes
    import gc

    import torch

    torch.set_num_threads(1)
    run(toy, stage, scratch / "toy")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the toy left free is no part of the baseline
    with Watch() as watch:
        started = time.process_time()
        run(model, stage, scratch / "run")
        seconds = time.process_time() - started
    return {"measured": watch.peak - watch.before, "cpu_seconds": seconds}


def run(folder: Path, stage: str, scratch: Path) -> None:
    """One stage as the command line runs it."""
    import torch

    import hestia
    from hestia import loading, nn, settings
    from hestia.data import Blocks
    from hestia.evaluation import model_logits, score
    from hestia.export import export_model
    from hestia.export.frozen import MODEL_FOLDER, FrozenModel
    from hestia.export.verify import require_ok, verify
    from hestia.options import Options
    from hestia.pipeline.delivery import probe_shape
    from hestia.resources import release
    from hestia.training import Distillation, HestiaTrainer, TrainConfig
    from hestia.training.teacher import hold_in_bf16

    scratch.mkdir(exist_ok=True)
    source = loading.resolve(str(folder))
    config = loading.load_config(source)
    if stage == "export":
        kept = FrozenModel(scratch.parent.parent / f"frozen-{folder.name}")
        out = scratch / "file"
        export_model(kept, "hf", out)
        words = int(config.vocab_size)
        rows, tokens = probe_shape(TOKENS, words)
        text = (torch.arange(rows * tokens) % words).reshape(rows, tokens)
        require_ok(verify(out, kept.run, target="hf", token_ids=text))
        return
    ids = torch.randint(0, 4096, (32, TOKENS), generator=torch.Generator().manual_seed(0))
    blocks = Blocks(ids.int(), torch.ones_like(ids, dtype=torch.bool))
    model: Any = loading.load_model(source)
    if stage == "calibrate":
        linears = nn.select(model).candidates
        specs = settings.candidate_specs([linear.in_features for linear in linears.values()], "row")
        settings.calibrate_on(model, list(linears), specs, blocks, Options(calibrate=2), {})
        return
    plan = hestia.plan(loading.empty_model(source, config), "hestia", "hf")
    if stage == "score":
        rounded = nn.apply(loading.load_model(source), plan)
        score(model_logits(rounded), blocks[:8], parent=model_logits(model), description="")
        return
    taught = stage == "taught"
    nn.apply(model, plan)
    settings = TrainConfig(
        steps=2,
        batch_size=TAUGHT_BATCH if taught else BATCH,
        learning_rate=1e-4,
        distill=Distillation(weight=1.0) if taught else None,
        log_every=0,
        eval_every=1,
        eval_blocks=8,
        save_every=0,
    )
    teacher: Any = hold_in_bf16(loading.load_model(source)) if taught else None
    release()
    HestiaTrainer(model, plan=plan, config=settings, train=blocks, tuning=blocks, folder=scratch, teacher=teacher).fit()
    if stage == "train" and not (scratch.parent.parent / f"frozen-{folder.name}").is_dir():
        freeze(model, source, config, scratch.parent.parent / f"frozen-{folder.name}", MODEL_FOLDER)


def freeze(model: Any, source: Any, config: Any, out: Path, name: str) -> None:
    """What an export starts from."""
    from hestia import loading, nn
    from hestia.export.frozen import CODES_FILE, save_codes

    codes = nn.freeze(model)
    loading.cast_parameters(model, loading.parent_dtype(source, config))
    out.mkdir()
    loading.save(model, source, out / name)
    save_codes(out / CODES_FILE, codes)


def spawn(model: Path, toy: Path, stage: str, folder: Path) -> dict[str, Any]:
    """``child`` in a process of its own."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, __file__, "--child", str(model), str(toy), stage, scratch]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def predict(model: Path) -> dict[str, int]:
    """Stage -> bytes, by ``hestia.estimate``."""
    from hestia.estimate.whole import memory
    from hestia.options import Options

    def of(batch: int, teacher: str, **more: Any) -> dict[str, int]:
        options = Options(
            model=str(model), recipe="hestia", teacher=teacher, batch_size=batch, seq_len=TOKENS, steps=2,
            eval_tokens=str(8 * TOKENS), target=("hf",), precision="bf16", device="cpu", **more,
        )  # fmt: skip
        return {stage.name: stage.peak for stage in memory(options)}

    calibrating = of(BATCH, "none", widths=("1", "1.58", "2", "3", "4"))["calibrate"]
    return {**of(BATCH, "none"), "calibrate": calibrating, "taught": of(TAUGHT_BATCH, "parent")["train"]}


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        model, toy, stage, scratch = sys.argv[2:]
        print(json.dumps(child(Path(model), Path(toy), stage, Path(scratch))))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[name for name in MODELS if name != "toy"])
    parser.add_argument("--stages", nargs="+", default=list(STAGES))
    parser.add_argument("--rounds", type=int, default=1, help="processes a row; the median counts")
    parser.add_argument("--folder", type=Path, help="where the models are made; it needs 3 GB")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    import torch

    from hestia import loading
    from hestia.files import read_json, write_json
    from hestia.provenance import machine, versions

    record = read_json(given.out, schema=1) if given.out.is_file() else {"schema": 1, "rows": {}}
    record |= {"what": __doc__, "machine": machine(torch.device("cpu")), "versions": versions()}
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for name in given.models:
            model, toy = make(name, folder), make("toy", folder)
            source = loading.resolve(str(model))
            empty = loading.empty_model(source, loading.load_config(source))
            predicted = predict(model)
            for stage in given.stages:
                row = record["rows"].setdefault(f"{name} {stage}", {})
                row |= {"parameters": sum(p.numel() for p in empty.parameters()), "predicted": predicted[stage]}
                while len(row.setdefault("runs", [])) < given.rounds:
                    if stage == "export":
                        for each in (toy, model):
                            if not (folder / f"frozen-{each.name}").is_dir():
                                spawn(each, toy, "train", folder)
                    row["runs"].append(spawn(model, toy, stage, folder))
                row["measured"] = statistics.median(each["measured"] for each in row["runs"])
                row["error"] = row["predicted"] / row["measured"] - 1.0
                write_json(given.out, record)
                print(
                    f"{name:<6}{stage:<10} measured {row['measured'] / 2**20:8.0f} MiB   predicted "
                    f"{row['predicted'] / 2**20:8.0f} MiB   {100 * row['error']:+6.1f} %",
                    flush=True,
                )
    worst = max(abs(row["error"]) for row in record["rows"].values() if "error" in row)
    print(f"largest error {100 * worst:.1f} %, allowed {100 * ALLOWED:.0f} %")
    return int(worst > ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
