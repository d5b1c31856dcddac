"""Does `hestia estimate` tell the truth on a GPU? Predicted against measured memory and time, on real shapes.

    python benchmarks/gpu.py [NAME ...]

Random weights in the published shapes (estimate/configs), full depth; each configuration with its own recipe and, as
NAME+kl, with the defaults of `hestia quantize`: hearth, the parent as teacher. A step is two micro-batches of the size
that the configuration says. Every stage runs in one process by the functions that the command line calls: calibration
of four sequences, three training steps (time: the median of the last two), the scores of as many blocks as are scored
at once, four times. Memory is what the caching allocator gave out at most ("allocated") and what it took from the card
("reserved"); time includes the waiting for the card.
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
from hestia import jobs, nn
from hestia.data import Blocks
from hestia.estimate.time import SCORED_PASSES
from hestia.estimate.whole import estimate
from hestia.evaluation import model_logits, score
from hestia.evaluation.scoring import blocks_at_once
from hestia.files import read_json, write_json
from hestia.options import Options
from hestia.provenance import machine, versions
from hestia.training import Distillation, HestiaTrainer, TrainConfig
from hestia.training.teacher import hold_in_bf16

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "estimate" / "gpu.json"
NAMES = ("smollm2-360m", "qwen3-0.6b", "qwen3-0.6b+kl", "llama-3.2-1b")
STEPS, SEQUENCES, SCORES = 3, 4, 4


class Peak:
    """What the card gave in the block, and how long it took."""

    def __enter__(self) -> Peak:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        self._started = time.perf_counter()
        return self

    def __exit__(self, *exc: object) -> None:
        torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self._started
        self.allocated, self.reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()

    def record(self, seconds: float) -> dict[str, float]:
        """For the result; ``seconds`` as the stage counts them."""
        return {"allocated": self.allocated, "reserved": self.reserved, "seconds": seconds}


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
    base, _, taught = name.partition("+")
    given: dict[str, Any] = yaml.safe_load((ROOT / "configs" / f"{base}.yaml").read_text(encoding="utf-8"))
    micro = given["batch_size"] // given["accumulation"]
    given |= {
        "model": str(ROOT / "benchmarks" / "estimate" / "configs" / f"{base}.json"),
        "batch_size": 2 * micro,
        "accumulation": 2,
        "steps": STEPS,
        "calibrate": SEQUENCES,
        "device": "cuda",
    }
    if taught:
        del given["recipe"], given["teacher"]
    return Options(**given)


def measure(name: str) -> dict[str, Any]:
    """One row: stage -> predicted and measured."""
    options = options_of(name)
    config: Any = AutoConfig.from_pretrained(options.model)
    at_once = blocks_at_once(options.seq_len, config.vocab_size)
    options = dataclasses.replace(options, eval_tokens=str(SCORES * at_once * options.seq_len))
    predicted = estimate(options)
    assert options.batch_size is not None
    blocks = _blocks(config.vocab_size, max(options.batch_size * STEPS, SCORES * at_once), options.seq_len)

    def parent() -> Any:
        torch.manual_seed(0)
        with torch.device("cuda"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

    found: dict[str, Any] = {}
    model = parent()
    if "calibrate" in predicted.seconds:
        linears = nn.select(model).candidates
        specs = jobs.candidate_specs([linear.in_features for linear in linears.values()], options.group())
        with Peak() as peak:
            jobs.calibrate_on(model, list(linears), specs, blocks, options, {})
        found["calibrate"] = peak.record(peak.seconds)
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
            held_out=blocks[:1],
            folder=Path(folder),
            teacher=teacher,
            callbacks=[times],
        ).fit()
    found["train"] = peak.record(STEPS * statistics.median(times.seconds[1:]))
    del teacher
    nn.freeze(model)
    model, original = model.float(), parent()
    with Peak() as peak:
        score(model_logits(model), blocks[: SCORES * at_once], parent=model_logits(original), description="")
    found["score"] = peak.record(peak.seconds)
    bytes_of = {stage.name: stage.peak for stage in predicted.stages}
    seconds_of = {**predicted.seconds, "score": predicted.seconds["score"] * 2 / SCORED_PASSES}  # two models here
    return {
        "parameters": predicted.parameters,
        "recipe": options.recipe,
        "teacher": options.teacher,
        "micro_batch": options.batch_size // options.accumulation,
        "seq_len": options.seq_len,
        "tokens_per_second": STEPS * options.batch_size * options.seq_len / found["train"]["seconds"],
        "probed": predicted.machine.to_json(),
        "stages": {
            stage: {**numbers, "predicted_bytes": bytes_of[stage], "predicted_seconds": seconds_of[stage]}
            for stage, numbers in found.items()
        },
    }


def _blocks(vocabulary: int, count: int, length: int) -> Blocks:
    ids = torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    return Blocks(ids, torch.ones_like(ids, dtype=torch.bool))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    record: dict[str, Any] = read_json(given.out, schema=1) if given.out.is_file() else {"schema": 1, "rows": {}}
    record |= {"machine": machine(torch.device("cuda")), "versions": versions()}
    for name in given.names:
        row = record["rows"][name] = measure(name)
        write_json(given.out, record)
        print(f"{name}: {row['tokens_per_second']:,.0f} tokens/s")
        for stage, of in row["stages"].items():
            print(
                f"  {stage:<10} {of['allocated'] / 2**30:6.2f} GiB allocated, {of['reserved'] / 2**30:6.2f} reserved, "
                f"{of['predicted_bytes'] / 2**30:6.2f} predicted; {of['seconds']:6.2f} s, "
                f"{of['predicted_seconds']:6.2f} predicted",
                flush=True,
            )
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
