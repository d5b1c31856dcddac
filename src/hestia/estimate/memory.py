"""Memory of every stage, from the configuration alone.

    calibrate   4 P + candidates + forward and backward of one sequence, one gradient at a time; only where the plan
                needs a sensitivity that is not given
    train       4 P weights + 8 P_t AdamW + gradients and activations of a micro-batch (with a teacher its weights, and
                its forward pass beside what the student's has left), or, where that is more, an evaluation in the
                middle of the run: 12 P and the logits of a few blocks; and what a weighted scale rule holds
    score       two models, and the logits of both for as many blocks as are scored at once
    export      4 P + Q: the packed file loaded and unpacked, and the logits of the frozen model, to which its own are
                compared (measured for hf; what llama.cpp itself takes to run a .gguf file is not counted)

The text, 5 bytes per token (``text_bytes``), lies in the memory of the host, beside a GPU or not, and is not counted.

P parameters, P_t trainable ones, Q quantized ones. What a step holds beside weights and moments is pretended
(``pretend``), and so is exact up to what kernels allocate inside. With micro-batches to a step the gradients of those
before lie there whole. ``ALLOCATOR`` is measured: freed pieces lie between live ones (benchmarks/memory.py, gpu.py).
Under FSDP2 a process holds a share of weights, gradients and moments, and one block at a time whole; under DDP all of
them and the reducer's buckets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..curvature.estimators.base import CHUNK
from ..evaluation.scoring import CHUNK_ELEMENTS, blocks_at_once
from ..options import Options
from ..pipeline.planning import calibrates
from ..plans import Plan
from ..training import Distillation
from .pretend import Step, Work, pretend

ALLOCATOR = {
    "cpu": {"calibrate": 1.12, "train": 1.2, "score": 1.0, "export": 1.05},
    "cuda": {"calibrate": 1.05, "train": 1.1, "score": 1.05, "export": 1.05},
}
"""Memory taken over live bytes, by device and stage, measured: of the C library, and of CUDA's caching allocator."""

TIGHT = {"cpu": {"train": ("activations",)}, "cuda": {}}
"""Parts without that share, by device and stage, measured: every step asks for the same sizes as the one before."""

CONSTANT = {"calibrate": 12 << 20, "train": 40 << 20, "score": 0, "export": 14 << 20}
"""Bytes of kernels, their workspaces and Python objects, whatever the model, by stage, measured."""

SCORE_BUFFERS = 26
"""Bytes an element of such a piece, measured: of model and parent, their difference, probability, product, copies."""

UNPACKED_BYTES = 1
"""Bytes per quantized weight that compressed-tensors holds beside the fp32 weights when a packed folder is loaded: its
code."""


@dataclass(frozen=True)
class Stage:
    """What one process holds at the peak of a stage.

    Attributes:
        name: of the stage.
        parts: what -> bytes; they add up to ``peak``.
        note: in words, what decides.
    """

    name: str
    parts: Mapping[str, int]
    note: str = ""

    @property
    def peak(self) -> int:
        """Bytes above an idle process that has imported everything."""
        return sum(self.parts.values())

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {"stage": self.name, "bytes": self.peak, "parts": dict(self.parts), "note": self.note}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Parameter counts that memory depends on.

    Attributes:
        parameters: all, ties once.
        trained: those with a gradient.
        quantized: those of the plan.
        candidates: quantizers that calibration looks at.
        largest_block: parameters of the largest block.
        outside: parameters outside the blocks (embeddings, last norm, head).
        vocabulary: of the head.
        logits: numbers of the logits of the blocks that are scored at once.
        compared: numbers of the logits on which an exported file is compared.
        text: bytes of the tokenized text in the run's folder.
        importance: weights beside which their scale rule holds a number.
        teacher: bytes of the teacher's weights; 0: none.
    """

    parameters: int
    trained: int
    quantized: int
    candidates: int
    largest_block: int
    outside: int
    vocabulary: int
    logits: int
    compared: int
    text: int
    importance: int = 0
    teacher: int = 0


@dataclass(frozen=True, kw_only=True)
class Passes:
    """The pretended passes of one configuration; whether the training step finds gradients of micro-batches before."""

    calibrate: Work | None
    train: Work | None
    evaluate: Work = field(repr=False)
    teacher: Work | None = None
    accumulated: bool = False


def passes(
    config: Any,
    plan: Plan,
    options: Options,
    *,
    tokens: int,
    batch: int,
    bf16: bool,
    teacher: Any = None,
    device: str = "cpu",
) -> Passes:
    """Pretend every stage once: ``batch`` blocks of ``tokens`` a process and micro-batch.

    Args:
        config: of the model.
        plan: its plan.
        options: of the run.
        tokens, batch: shape of a step.
        bf16: whether training runs under bf16 autocast.
        teacher: configuration of the teacher, if there is one.
        device: the kind of device that trains.
    """
    remote = options.trust_remote_code
    taught = plan.trains and teacher is not None

    def run(of: Any = config, **step: Any) -> Work:
        return pretend(of, Step(tokens=tokens, **step), trust_remote_code=remote)

    return Passes(
        calibrate=run(batch=1, calibrating=True, device=device) if calibrates(options) else None,
        train=run(
            batch=batch,
            plan=plan,
            training=True,
            teacher=teacher,
            distill=Distillation(divergence=options.distill, weight=options.distill_weight),
            device=device,
            bf16=bf16,
            checkpointing=options.gradient_checkpointing,
            train_embeddings=options.embeddings == "train",
        )
        if plan.trains
        else None,
        evaluate=run(batch=blocks_at_once(tokens, int(config.get_text_config().vocab_size)), plan=plan, device=device),
        teacher=run(teacher, batch=batch, teaching=True, device=device, bf16=bf16) if taught else None,
        accumulated=options.accumulation > 1,
    )


def stages(
    sizes: Sizes, done: Passes, *, processes: int = 1, sharded: bool = False, device: str = "cpu"
) -> list[Stage]:
    """The stages of a whole run, in their order, as one process sees them.

    Args:
        sizes: of the model.
        done: its pretended passes.
        processes: that share the training.
        sharded: under FSDP2, else DDP.
        device: the kind of device that it runs on.
    """
    return [_taken(stage, device) for stage in _live(sizes, done, processes, sharded)]


def _live(sizes: Sizes, done: Passes, processes: int, sharded: bool) -> list[Stage]:
    out: list[Stage] = []
    if done.calibrate is not None:
        out.append(_calibration(sizes, done.calibrate))
    if done.train is not None:
        step = _training(sizes, done, processes, sharded)
        halfway = _halfway(sizes, done.evaluate)
        out.append(max(step, halfway, key=lambda stage: stage.peak) if processes == 1 else step)
    out.append(_scoring(sizes, done.evaluate))
    out.append(_export(sizes))
    return out


def text_bytes(tokens: int) -> int:
    """Bytes of so many tokens in blocks, in memory and in a run's cache: an int32 id and whether it is learned."""
    return 5 * tokens


def _stage(name: str, parts: Mapping[str, int], note: str = "") -> Stage:
    return Stage(name, {k: round(v) for k, v in parts.items() if v > 0}, note)


def _taken(stage: Stage, device: str) -> Stage:
    """The stage with what the allocator holds beside the live bytes."""
    tight = TIGHT[device].get(stage.name, ())
    loose = sum(size for part, size in stage.parts.items() if part not in tight)
    kept = round((ALLOCATOR[device][stage.name] - 1.0) * loose) + CONSTANT[stage.name]
    return Stage(stage.name, {**stage.parts, "allocator": kept} if kept else stage.parts, stage.note)


def _calibration(sizes: Sizes, work: Work) -> Stage:
    return _stage(
        "calibrate",
        {
            "weights": 4 * sizes.parameters,
            "candidates": sizes.candidates * sizes.quantized,
            "activations": work.peak + 3 * 4 * min(CHUNK, sizes.largest_block // 4),
        },
    )


def _training(sizes: Sizes, done: Passes, processes: int, sharded: bool) -> Stage:
    assert done.train is not None
    work, share = done.train, processes if sharded else 1
    earlier = 4 * sizes.trained if done.accumulated and not sharded else 0
    answering = 0 if done.teacher is None else work.held + done.teacher.peak + earlier  # before its own gradients
    peak = max(work.forward + earlier, work.head + earlier, work.blocks)
    gradients = min(4 * sizes.trained, peak)
    parts = {
        "weights": 4 * sizes.parameters / share,
        "optimizer": 8 * sizes.trained / share,
        "importance": 4 * sizes.importance / share,
        "gradients": gradients / share,
        # whole gradients come while activations go; sharded ones are small beside what the forward pass leaves
        "activations": max(work.forward, work.head, answering) if sharded else max(peak, answering) - gradients,
        "teacher": sizes.teacher,
    }
    note = ""
    if sharded:
        parts["gathered"] = 4 * (sizes.outside + 3 * sizes.largest_block)
        note = "gathered: embeddings and head, two blocks' weights, one block's gradients"
    elif processes > 1:
        parts["buckets"] = 4 * sizes.trained
        note = "buckets: gradients a second time, in the reducer of DDP"
    return _stage("train", {k: round(v) for k, v in parts.items()}, note)


def _halfway(sizes: Sizes, work: Work) -> Stage:
    parts = {
        "weights": 4 * sizes.parameters,
        "optimizer": 8 * sizes.trained,
        "importance": 4 * sizes.importance,
        "activations": work.peak + 8 * min(CHUNK_ELEMENTS, sizes.logits),
        "teacher": sizes.teacher,
    }
    return _stage("train", parts, "decided by the hard loss on tuning blocks, logged ten times a run")


def _scoring(sizes: Sizes, work: Work) -> Stage:
    logits = work.peak + 4 * sizes.logits + SCORE_BUFFERS * min(CHUNK_ELEMENTS, sizes.logits)
    return _stage("score", {"weights": 8 * sizes.parameters, "logits": logits})


def _export(sizes: Sizes) -> Stage:
    unpacking = UNPACKED_BYTES * sizes.quantized
    return _stage("export", {"weights": 4 * sizes.parameters, "unpacking": unpacking, "logits": 8 * sizes.compared})
