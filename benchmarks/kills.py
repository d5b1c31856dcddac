"""Does a run that is killed at any moment, and resumed, end with the very same weights?

    python benchmarks/kills.py [--kills 50] [--folder DIR] [--results FILE]

A toy model is quantized by the whole main job (calibrate, plan, pilot, train with a teacher, freeze, score, export,
verify, report) once without a break. Then, for every kill: the same job in a folder of its own, SIGKILL at a moment
drawn by seed, ``--resume`` until it is done, and every file that holds a weight, a moment or a random state compared
with the unbroken run's, byte for byte. There are three kinds of moments:

    checkpoint   while a checkpoint is being written: as soon as its temporary folder is seen, after a short draw; it
                 counts only if the folder is still there afterwards, unfinished
    anywhere     a uniform share of the unbroken run's time
    pilot        the same in a job that looks for its learning rate first

The jobs are forked from this process, which has imported everything, so that a start costs no seconds; the kill is the
system's. A result that is in the file already is left alone, so that an interrupted call takes up where it stopped.
Exit status 1 if a resumed run differs or lost more than one checkpoint interval.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import hestia.pipeline  # all that a job imports, before the first fork
from hestia import digests
from hestia.cli import quantize  # noqa: F401
from hestia.cli.main import main as command
from hestia.files import read_json, sha256, write_json
from hestia.provenance import machine, versions
from hestia.training import checkpoints

RESULTS = Path(__file__).parent / "results" / "running" / "kills.json"
STEPS, EVERY = 48, 4
"""Steps of a run, and between its checkpoints."""

KINDS = ("checkpoint", "anywhere", "anywhere", "checkpoint", "pilot")
"""What the kills cycle through."""

COMPARED = ("plan.json", "training.json")
TENSORS = ("model/model.safetensors", "codes.safetensors", "sensitivity.safetensors")


def main() -> int:
    """Measure what has no result yet and print the sum."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--folder", type=Path, default=Path("runs") / "kills")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parent, text = inputs(arguments.folder)
    record = read_json(arguments.results) if arguments.results.is_file() else {
        "schema": 1, "command": "python benchmarks/kills.py", "steps": STEPS, "save_every": EVERY,
        "versions": versions(), "machine": machine(torch.device("cpu")), "kills": [],
    }  # fmt: skip
    wholes = {lr: unbroken(arguments.folder, parent, text, lr) for lr in ("3e-3", "auto")}
    for number in range(len(record["kills"]), arguments.kills):
        kind = KINDS[number % len(KINDS)]
        lr = "auto" if kind == "pilot" else "3e-3"
        row = one_kill(arguments.folder / f"kill-{number}", job(parent, text, lr), wholes[lr], kind, number)
        record["kills"].append({"number": number, "kind": kind, **row})
        write_json(arguments.results, {**record, "sum": summary(record["kills"])})
        print(json.dumps(record["kills"][-1]))
    print(json.dumps(summary(record["kills"])))
    return 0 if all(row["exact"] and row["lost_steps"] <= EVERY for row in record["kills"]) else 1


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of all kills so far."""
    return {
        "kills": len(rows),
        "exact_resumes": sum(row["exact"] for row in rows),
        "during_a_checkpoint_write": sum(row["unfinished_checkpoint"] for row in rows),
        "most_steps_lost": max((row["lost_steps"] for row in rows), default=0),
        "by_stage": dict(sorted(Counter(row["stage"] for row in rows).items())),
    }


def inputs(folder: Path) -> tuple[Path, Path]:
    """A toy Llama of two layers with a tokenizer of bytes and a few merges, and a text of stories; the same always."""
    parent, text = folder / "parent", folder / "stories.txt"
    draw = random.Random(0)
    words = ("the", "a", "cat", "dog", "bird", "girl", "saw", "found", "lost", "ball", "river", "moon", "and", "home")
    lines = [" ".join(draw.choice(words) for _ in range(30)) + "." for _ in range(400)]
    folder.mkdir(parents=True, exist_ok=True)
    text.write_text("\n<|endofstory|>\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(lines, trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False,
    ))  # fmt: skip
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=64
    ).save_pretrained(parent)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.1,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )).save_pretrained(parent)  # fmt: skip
    return parent, text


def job(parent: Path, text: Path, lr: str) -> list[str]:
    """The command, but for its folder."""
    return [
        "quantize", str(parent), "--recipe", "hestia", "--data", str(text), "--steps", str(STEPS),
        "--seq-len", "32", "--batch-size", "4", "--lr", lr, "--calibrate", "8", "--save-every", str(EVERY), "--log-every", "1", "--teacher", "parent",
        "--target", "hf", "--threads", "1", "--resume",
    ]  # fmt: skip


def start(arguments: list[str], out: Path) -> int:
    """Fork a process that runs the command into ``out``; its output goes to a file beside. Returns its number."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = command([*arguments, "--out", str(out)])
    finally:
        os._exit(status)


def finish(child: int) -> int:
    """Wait for a process; its exit status, negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def unbroken(folder: Path, parent: Path, text: Path, lr: str) -> dict[str, Any]:
    """The run that is never killed: its files and how long it took."""
    out = folder / f"whole-{lr}"
    clean(out)
    started = time.perf_counter()
    status = finish(start(job(parent, text, lr), out))
    if status:
        raise SystemExit(f"the unbroken run failed with {status}: {out.with_suffix('.log').read_text('utf-8')}")
    return {"seconds": time.perf_counter() - started, "files": files(out)}


def files(out: Path) -> dict[str, str]:
    """Hash of everything that must be equal: weights, codes, plan, every last moment and random state, the samples of
    the sensitivity, and the losses of every step.
    """
    last = Path("checkpoints") / checkpoints.folder_name(STEPS)
    found = {name: sha256(out / name) for name in COMPARED}
    # By their tensors: the order of two keys in a safetensors header changes from process to process.
    for name in (*TENSORS, *(str(last / f"{part}.safetensors") for part in ("model", "optimizer", "random"))):
        found[name] = digests.of_tensors(dict(sorted(load_file(out / name).items())))
    measured = read_json(out / "sensitivity.json")
    found["sensitivity.json"] = json.dumps({path: entry["samples"] for path, entry in measured["tensors"].items()})
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [(row.get("step"), row.get("loss"), row.get("hard_loss"), row.get("pilot")) for row in rows]
    return {**found, "log.jsonl": json.dumps(losses)}


def one_kill(out: Path, arguments: list[str], whole: dict[str, Any], kind: str, seed: int) -> dict[str, Any]:
    """Kill a run at a moment of ``kind``, resume it to the end, compare."""
    draw = random.Random(seed)
    for _ in range(40):  # until the kill met what it was meant to meet
        clean(out)
        child = start(arguments, out)
        started = time.perf_counter()
        if kind == "checkpoint":
            _wait_for_checkpoint(out, child, draw)
        else:
            time.sleep(draw.uniform(0.0, 0.97) * whole["seconds"])
        os.kill(child, signal.SIGKILL)
        killed, status = time.perf_counter() - started, finish(child)
        unfinished = any((out / "checkpoints").glob(".step-*.tmp"))
        if status == -signal.SIGKILL and (kind != "checkpoint" or unfinished):
            break
    reached = _steps(out)
    kept = checkpoints.newest(out / "checkpoints")
    step = 0 if kept is None else int(kept.name.removeprefix("step-"))
    row = {
        "seed": seed, "after_seconds": round(killed, 3), "stage": stage(out), "unfinished_checkpoint": unfinished,
        "step_reached": reached, "step_of_checkpoint": step, "lost_steps": max(0, reached - step),
    }  # fmt: skip
    status = finish(start(arguments, out))
    differing = [name for name, digest in files(out).items() if digest != whole["files"][name]] if status == 0 else []
    row |= {"resumed_status": status, "differing": differing, "exact": status == 0 and not differing}
    if row["exact"]:
        clean(out)
    return row


def _wait_for_checkpoint(out: Path, child: int, draw: random.Random) -> None:
    """Return while a checkpoint is being written: at a drawn one, a drawn moment after its folder appeared."""
    which = f".step-{EVERY * draw.randrange(1, STEPS // EVERY + 1):06d}.tmp"
    folder, root = out / "checkpoints" / which, out / "checkpoints"
    while not folder.is_dir():
        later = any(path.name > which.strip(".") for path in root.glob("step-*"))
        if later or _gone(child):
            return
        time.sleep(0.0002)
    time.sleep(draw.uniform(0.0, 0.02))


def _gone(child: int) -> bool:
    return Path(f"/proc/{child}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"


def _steps(out: Path) -> int:
    """The last step that the log knows; half a line is none."""
    steps = [0]
    log = out / "log.jsonl"
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
        try:
            steps.append(int(json.loads(line).get("step", 0)))
        except ValueError:
            continue
    return max(steps)


def stage(out: Path) -> str:
    """What the killed process was at, by what it left."""
    done = (
        ("report.json", "reporting"), ("scores.json", "exporting"), ("codes.safetensors", "scoring"),
        ("training.json", "training"), ("plan.json", "pilot"), ("run.yaml", "calibrating"),
    )  # fmt: skip
    return next((name for file, name in done if (out / file).is_file()), "starting")


def clean(out: Path) -> None:
    """Nothing of an earlier attempt is left."""
    shutil.rmtree(out, ignore_errors=True)
    out.with_suffix(".log").unlink(missing_ok=True)


if __name__ == "__main__":
    assert hestia.pipeline.quantize
    sys.exit(main())
