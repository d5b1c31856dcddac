"""Hours of every stage on a machine of known speed.

    seconds(pass) = FLOPs / (FLOP/s) + bytes moved / (bytes/s)

FLOPs are those of matrix products and attention, bytes those that every operation reads and writes one after another,
as without a compiler; both were counted in a pretended pass. Calibration and scores are taken in fp32, at that speed. A
step adds clipping and AdamW: ten passes over fp32 numbers. What neither term knows (launches, Python, caches that serve
small tensors) makes small models faster or slower than this by tens of percent.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..evaluation.scoring import blocks_at_once
from ..options import Options, count
from ..pipeline.planning import calibrates
from ..training import pilot
from .machine import Machine
from .memory import Passes, Sizes

STEP_BYTES = 40
"""Bytes moved a trained parameter and step beside forward and backward: norm, clipping, AdamW."""

SCORED_PASSES = 5
"""Forward passes over the held-out text: the parent three times, round-to-nearest and the frozen model."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """How long a run is.

    Attributes:
        steps: optimizer steps; 0 for recipes that do not train.
        batch, tokens: blocks per step in all, and tokens per block.
        micro: blocks of one process and micro-batch.
        processes: that share training, calibration and evaluation.
        pilot: whether the learning rate is searched for.
        sequences: of calibration at most; 0 where there is none.
        scored: held-out tokens.
    """

    steps: int
    batch: int
    tokens: int
    micro: int
    processes: int
    pilot: bool
    sequences: int
    scored: int

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {**asdict(self), "training_tokens": self.steps * self.batch * self.tokens}


def job(options: Options, *, tokens: int, batch: int, steps: int, processes: int, trains: bool) -> Job:
    """The length of the run that ``options`` describe."""
    return Job(
        steps=steps if trains else 0,
        batch=batch,
        tokens=tokens,
        micro=max(1, batch // options.accumulation // processes),
        processes=processes,
        pilot=trains and options.learning_rate() is None,
        sequences=options.calibrate if calibrates(options) else 0,
        scored=count(options.eval_tokens, "eval_tokens"),
    )


def seconds(run: Job, done: Passes, sizes: Sizes, machine: Machine) -> dict[str, float]:
    """Stage -> seconds; every process is as fast as ``machine``."""

    def cost(flops: float, moved: float, speed: float = machine.flops) -> float:
        return flops / speed + moved / machine.bandwidth

    out: dict[str, float] = {}
    if done.calibrate is not None:
        once = cost(done.calibrate.flops, done.calibrate.moved, machine.exact)
        out["calibrate"] = run.sequences * once / run.processes
    if done.train is not None:
        micro_batches = run.batch / run.micro / run.processes
        passes = [work for work in (done.train, done.teacher) if work is not None]
        step = micro_batches * sum(cost(work.flops, work.moved) for work in passes) + cost(
            0.0, STEP_BYTES * sizes.trained
        )
        if run.pilot:
            first, second = pilot.trial_steps(run.steps)
            out["pilot"] = (pilot.ROUNDS[0][0] * first + pilot.ROUNDS[1][0] * second) * step
        out["train"] = run.steps * step
    whole = cost(done.evaluate.flops, done.evaluate.moved, machine.exact)
    batches = run.scored / run.tokens / blocks_at_once(run.tokens, sizes.vocabulary)
    out["score"] = SCORED_PASSES * batches * whole / run.processes
    return out
