"""Does `hestia estimate` tell the truth on a GPU? Predicted against measured memory and speed, on real shapes.

    python benchmarks/gpu.py [NAME ...]       measure, on a GPU
    python benchmarks/gpu.py --predict        predict anew what was measured, anywhere

Random weights in the published shapes (estimate/configs), full depth; each configuration with its own recipe and, as
NAME+kl, with the defaults of `hestia quantize`: hearth, the parent as teacher; NAME+compile and NAME+kl+compile do the
same through torch.compile. A step is two micro-batches of the size
that the configuration says. Every stage runs by the functions that the command line calls: calibration of four
sequences with five candidates; three training steps, whose time is the median of the last two; the scores of four times
as many blocks as are scored at once, under the parent too. Memory is what the caching allocator gave out at most
("allocated") and what it took from the card ("reserved"). Predictions are given the speeds that were probed.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

import hestia
from hestia import nn
from hestia.data import Blocks
from hestia.estimate.machine import probe
from hestia.estimate.time import SCORED_PASSES
from hestia.estimate.whole import estimate, memory
from hestia.evaluation import model_logits, score
from hestia.evaluation.scoring import blocks_at_once
from hestia.files import read_json, write_json
from hestia.options import Options
from hestia.provenance import machine, versions
from hestia.resources import release
from hestia.settings import calibrate_on, candidate_specs
from hestia.training import Distillation, HestiaTrainer, TrainConfig
from hestia.training.teacher import hold_in_bf16

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "estimate" / "gpu.json"
NAMES = ("smollm2-360m", "qwen3-0.6b", "qwen3-0.6b+kl", "llama-3.2-1b")
STEPS, SEQUENCES, SCORES = 3, 4, 4
WIDTHS = ("1", "1.58", "2", "3", "4")
"""Bits of the five candidates, those of ``candidate_specs``."""


class Peak:
    """The most memory that the card gave in the block."""

    def __enter__(self) -> Peak:
        release()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *exc: object) -> None:
        self.record: dict[str, float] = {
            "allocated": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.max_memory_reserved(),
        }


class StepTimes(TrainerCallback):
    """Seconds of every step, from begin to end, with the card done."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begun = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.cuda.synchronize()
        self._begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._begun)


def options_of(name: str) -> Options:
    """The configuration's options, three steps of two micro-batches; ``+kl`` takes recipe and teacher by default."""
    base, *more = name.split("+")
    given: dict[str, Any] = yaml.safe_load((ROOT / "configs" / f"{base}.yaml").read_text(encoding="utf-8"))
    shapes = ROOT / "benchmarks" / "estimate" / "configs" / f"{base}.json"
    words = AutoConfig.from_pretrained(shapes).vocab_size
    given |= {
        "model": str(shapes),
        "batch_size": 2 * given["batch_size"] // given["accumulation"],
        "accumulation": 2,
        "steps": STEPS,
        "calibrate": SEQUENCES,
        "eval_tokens": str(SCORES * blocks_at_once(given["seq_len"], words) * given["seq_len"]),
        "device": "cuda",
        "compile": "compile" in more,
    }
    if "kl" in more:
        del given["recipe"], given["teacher"]
    return Options(**given)


def predict(options: Options, flops: float, bandwidth: float) -> dict[str, Any]:
    """Bytes of every stage and seconds of training, by ``hestia.estimate``."""
    found = estimate(options, flops=str(flops), bandwidth=str(bandwidth), memory="80G")
    sizes = {stage.name: stage.peak for stage in found.stages if stage.name != "export"}
    if "calibrate" in sizes:
        five = memory(dataclasses.replace(options, widths=WIDTHS))
        sizes["calibrate"] = next(stage.peak for stage in five if stage.name == "calibrate")
    seconds = {"train": found.seconds["train"], "score": found.seconds["score"] * 2 / SCORED_PASSES}  # two models here
    return {"bytes": sizes, "seconds": seconds}


def measure(options: Options) -> dict[str, Any]:
    """Bytes of every stage, seconds of training and scores."""
    config: Any = AutoConfig.from_pretrained(options.model)
    assert options.batch_size is not None and options.seq_len is not None
    scored = int(options.eval_tokens) // options.seq_len
    blocks = _blocks(config.vocab_size, max(options.batch_size * STEPS, scored), options.seq_len)

    def parent() -> Any:
        torch.manual_seed(0)
        with torch.device("cuda"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

    found: dict[str, Any] = {}
    model = parent()
    if options.recipe == "hestia":
        linears = nn.select(model).candidates
        specs = candidate_specs([linear.in_features for linear in linears.values()], options.group())
        with Peak() as peak:
            calibrate_on(model, list(linears), specs, blocks, options, {})
        found["calibrate"] = peak.record
    plan = hestia.plan(model, options.recipe, options.target)
    teacher = hold_in_bf16(parent()) if options.teacher == "parent" else None
    nn.apply(model, plan)
    settings = TrainConfig(
        steps=STEPS,
        batch_size=options.batch_size,
        accumulation=options.accumulation,
        learning_rate=1e-5,
        distill=Distillation(weight=options.distill_weight) if teacher is not None else None,
        gradient_checkpointing=options.gradient_checkpointing,
        compile=options.compile,
        log_every=0,
        device="cuda",
    )
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder, Peak() as peak:
        HestiaTrainer(
            model,
            plan=plan,
            config=settings,
            train=blocks,
            tuning=blocks[:1],
            folder=Path(folder),
            teacher=teacher,
            callbacks=[times],
        ).fit()
    found["train"] = {**peak.record, "seconds": STEPS * statistics.median(times.seconds[1:])}
    del teacher
    nn.freeze(model)
    model, original = model.float(), parent()
    score(model_logits(model), blocks[:1], parent=model_logits(original), description="")  # kernels are loaded
    with Peak() as peak:
        torch.cuda.synchronize()
        started = time.perf_counter()
        score(model_logits(model), blocks[:scored], parent=model_logits(original), description="")
        seconds = time.perf_counter() - started
    found["score"] = {**peak.record, "seconds": seconds}
    return found


def _blocks(vocabulary: int, count: int, length: int) -> Blocks:
    ids = torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    return Blocks(ids, torch.ones_like(ids, dtype=torch.bool))


def show(name: str, row: dict[str, Any]) -> None:
    """A line a stage."""
    print(f"{name}: {row['tokens_per_second']:,.0f} tokens/s")
    for stage, of in row["measured"].items():
        gib = [x / 2**30 for x in (of["allocated"], of["reserved"], row["predicted"]["bytes"][stage])]
        line = f"  {stage:<10}{gib[0]:6.2f} GiB allocated,{gib[1]:6.2f} reserved,{gib[2]:6.2f} predicted"
        if "seconds" in of:
            line += f";{of['seconds']:6.2f} s,{row['predicted']['seconds'][stage]:6.2f} predicted"
        print(line, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    record: dict[str, Any] = read_json(given.out, schema=1) if given.out.is_file() else {"schema": 1, "rows": {}}
    if not given.predict:
        flops, _, bandwidth = probe(torch.device("cuda"), bf16=True)
        record |= {"probed": {"flops": flops, "bandwidth": bandwidth}}
        record |= {"machine": machine(torch.device("cuda")), "versions": versions()}
    for name in record["rows"] if given.predict else given.names:
        options = options_of(name)
        row = record["rows"].setdefault(name, {})
        row |= {"recipe": options.recipe, "teacher": options.teacher}
        if not given.predict:
            row["measured"] = measure(options)
            assert options.batch_size is not None and options.seq_len is not None
            tokens = STEPS * options.batch_size * options.seq_len
            row["tokens_per_second"] = tokens / row["measured"]["train"]["seconds"]
        row["predicted"] = predict(options, **record["probed"])
        write_json(given.out, record)
        show(name, row)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
