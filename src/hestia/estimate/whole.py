"""All of an estimate for one set of options."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import loading
from ..errors import ConfigError
from ..evaluation.scoring import blocks_at_once
from ..export.precheck import check_targets, refusals
from ..mixed import candidates
from ..nn.select import EMBEDDING, HEAD
from ..options import Options, count
from ..pipeline.delivery import probe_shape
from ..pipeline.planning import calibrates, given_plan
from ..plans import Plan
from ..quant import WeightedRule
from ..resources import free_disk
from ..settings import (
    TUNING_BLOCKS,
    batch_and_steps,
    choose_device,
    in_bf16,
    longest_block,
    plan_of,
    recipe_of,
    widths_may_differ,
)
from ..training.teacher import rounded_anyway
from .files import FileSize, Kept, file_sizes, run_folder
from .machine import FP32_SHARE, Machine, memory_of, probe, quantity
from .memory import Passes, Sizes, Stage, passes, stages, text_bytes
from .time import Job, job, seconds


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How many processes train, and how they share the model.

    Raises:
        ConfigError: fewer than one process.
    """

    processes: int = 1
    sharded: bool = False

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ConfigError(f"--processes must be at least 1, got {self.processes}")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run would cost.

    Attributes:
        model: name and shape.
        parameters, quantized: counts.
        alike: the width that all tensors are reckoned at, in place of a plan that needs a sensitivity; else None.
        job: its length.
        stages: memory of one process in every stage.
        alternatives: training memory of one process in other layouts.
        seconds: of every stage; empty without a machine's speed.
        files: size in every file format.
        folder: what the run's folder holds.
        machine: what it was held against.
    """

    model: Mapping[str, Any]
    parameters: int
    quantized: int
    alike: float | None
    job: Job
    layout: Layout
    stages: list[Stage]
    alternatives: list[Stage]
    seconds: Mapping[str, float]
    files: list[FileSize]
    folder: Mapping[str, int]
    machine: Machine

    @property
    def peak(self) -> int:
        """Bytes of one process in its largest stage."""
        return max(stage.peak for stage in self.stages)

    @property
    def fits_memory(self) -> bool | None:
        """Whether every process fits the memory it may use; None where that is unknown."""
        return None if self.machine.memory is None else self.peak <= self.machine.memory

    @property
    def fits_disk(self) -> bool | None:
        """Whether the run's folder fits the disk; None where it is unknown."""
        return None if self.machine.disk is None else sum(self.folder.values()) <= self.machine.disk

    def to_json(self) -> dict[str, Any]:
        """The JSON object of ``hestia estimate --json``."""
        return {
            "schema": 1,
            "model": dict(self.model),
            "parameters": self.parameters,
            "quantized": self.quantized,
            "alike": self.alike,
            "job": self.job.to_json(),
            "layout": dataclasses.asdict(self.layout),
            "memory": [stage.to_json() for stage in self.stages],
            "alternatives": [stage.to_json() for stage in self.alternatives],
            "peak_bytes": self.peak,
            "seconds": dict(self.seconds),
            "files": [file.to_json() for file in self.files],
            "folder": dict(self.folder),
            "machine": self.machine.to_json(),
            "fits": {"memory": self.fits_memory, "disk": self.fits_disk},
        }


RECKONED = ("gnb", "fisher")
"""Estimators that take one backward pass a sequence, which is what is pretended."""


class _Model:
    """What the options say of the model: its configuration, plan, sizes and the shape of a step."""

    def __init__(self, options: Options, layout: Layout) -> None:
        self.layout = layout
        if calibrates(options) and options.estimator not in RECKONED:
            known = " and ".join(RECKONED)
            raise ConfigError(f"--estimator {options.estimator}: its cost is not reckoned; that of {known} is")
        self.device, self.there = _device(options)
        remote = options.trust_remote_code
        self.source = loading.config_source(options.model)
        self.config = loading.load_config(self.source, trust_remote_code=remote)
        self.empty = loading.empty_model(self.source, self.config, trust_remote_code=remote)
        self.alike = _alike(options)
        self.plan = _plan(self.empty, options, self.alike)
        check_targets(self.plan.targets, self.config, Path(self.source.location), head=options.head)
        self.tokens = longest_block(self.config, options)
        self.batch, self.steps = batch_and_steps(options, self.tokens, layout.processes)
        self.micro = max(1, self.batch // options.accumulation // layout.processes)
        self.dtype = loading.parent_dtype(self.source, self.config)
        text = self.config.get_text_config()
        self.bf16 = in_bf16(options, self.config, self.device) if self.there else options.precision != "fp32"
        teacher = _teacher(options, self.config)
        held = 0 if teacher is None else _held(_empty(teacher, options), self.bf16)
        read = self.steps * self.batch * self.tokens * 11 // 10 + TUNING_BLOCKS * self.tokens
        self.sizes = dataclasses.replace(
            _sizes(self.empty, self.plan, options, int(text.vocab_size), self.tokens, held),
            text=text_bytes(read + count(options.eval_tokens, "eval_tokens")),
        )
        self.passes = passes(
            self.config,
            self.plan,
            options,
            tokens=self.tokens,
            batch=self.micro,
            bf16=self.bf16,
            teacher=teacher,
            device=self.device.type,
        )
        self.kept = _kept(self.empty, self.plan)

    def stages(self, sharded: bool) -> list[Stage]:
        """The memory of one process."""
        device = self.device.type
        return stages(self.sizes, self.passes, processes=self.layout.processes, sharded=sharded, device=device)

    @property
    def folder(self) -> Path | None:
        """The model's folder, where it is one."""
        path = Path(self.source.location)
        return path if path.is_dir() else None


def memory(options: Options, layout: Layout | None = None) -> list[Stage]:
    """The memory alone: what ``estimate`` says of it."""
    layout = layout or Layout()
    return _Model(options, layout).stages(layout.sharded)


def estimate(
    options: Options,
    layout: Layout | None = None,
    *,
    memory: str | None = None,
    disk: str | None = None,
    flops: str | None = None,
    bandwidth: str | None = None,
) -> Estimate:
    """What a run with these options would cost. Reads the model's config.json and no weight.

    Args:
        options: of the run; data and out need not be given.
        layout: processes.
        memory, disk: bytes to hold a process and the run's folder against, such as ``80G``; None asks this machine,
            whose processors share their memory, while a GPU each has its own.
        flops, bandwidth: speed of one process, such as ``300T`` and ``2T``; None probes this machine for a second.

    Raises:
        ConfigError, PlanError: a bad option, no such model, a plan that the target cannot hold, or ``device="cuda"``
            where there is none and a speed is not given.
    """
    layout = layout or Layout()
    given = {k: quantity(v, k) for k, v in {"memory": memory, "disk": disk}.items() if v is not None}
    speed = {k: quantity(v, k) for k, v in {"flops": flops, "bandwidth": bandwidth}.items() if v is not None}
    model = _Model(options, layout)
    if not model.there and len(speed) < 2:
        raise ConfigError(
            "--device cuda: there is none here to probe; give --flops and --bandwidth, such as 400T and 2T"
        )
    machine = _machine(options, model.device, given, speed, bf16=model.bf16, processes=layout.processes)
    run = job(
        options,
        tokens=model.tokens,
        batch=model.batch,
        steps=model.steps,
        processes=layout.processes,
        trains=model.plan.trains,
    )
    files = file_sizes(
        model.plan,
        model.kept,
        model.dtype,
        vocabulary=model.sizes.vocabulary,
        folder=model.folder,
        head=options.head,
        fallback=options.fallback or any(map(model.plan.falls_back, model.plan.targets)),
        refused=refusals(model.config, Path(model.source.location)),
    )
    exported = {row.target: row.bytes for row in files if row.target in model.plan.targets and row.bytes is not None}
    others = [
        dataclasses.replace(stage, name=f"train, {label}")
        for label, sharded in (("DDP", False), ("FSDP2", True))
        if layout.processes > 1
        for stage in model.stages(sharded)
        if stage.name == "train"
    ]
    return Estimate(
        model={**loading.describe(model.source, model.config), "dtype": str(model.dtype).removeprefix("torch.")},
        parameters=model.sizes.parameters,
        quantized=model.sizes.quantized,
        alike=model.alike,
        job=run,
        layout=layout,
        stages=model.stages(layout.sharded),
        alternatives=others,
        seconds=seconds(run, model.passes, model.sizes, machine),
        files=files,
        folder=run_folder(model.plan, model.kept, model.dtype, model.sizes, exported),
        machine=machine,
    )


def _machine(
    options: Options,
    device: torch.device,
    given: Mapping[str, float],
    speed: Mapping[str, float],
    *,
    bf16: bool,
    processes: int,
) -> Machine:
    flops, bandwidth = speed.get("flops"), speed.get("bandwidth")
    exact = None if flops is None else flops * (FP32_SHARE if bf16 else 1.0)
    source = "given"
    if flops is None or bandwidth is None:
        probed = probe(device, bf16=bf16)
        source = f"probed here, {device.type}, {torch.get_num_threads()} threads" if not speed else "given and probed"
        flops, exact, bandwidth = flops or probed[0], exact or probed[1], bandwidth or probed[2]
    assert exact is not None
    return Machine(
        flops=flops,
        exact=exact,
        bandwidth=bandwidth,
        memory=int(given["memory"]) if "memory" in given else _share(memory_of(device), device, processes),
        disk=int(given["disk"]) if "disk" in given else free_disk(Path(options.out or ".")),
        source=source,
    )


def _device(options: Options) -> tuple[torch.device, bool]:
    """The device that is reckoned for, and whether it is here: a GPU need not be."""
    if options.device == "cuda" and not torch.cuda.is_available():
        return torch.device("cuda"), False
    return choose_device(options), True


def _share(there: int | None, device: torch.device, processes: int) -> int | None:
    """What one of ``processes`` may use of the memory there is: on a CPU they share it."""
    return there if there is None or device.type != "cpu" else there // processes


def _alike(options: Options) -> float | None:
    """The recipe's width nearest to a budget of bits that no sensitivity is there for; None for any other plan."""
    if options.plan is not None or options.sensitivity is not None or not widths_may_differ(options):
        return None
    return min(recipe_of(options).widths, key=lambda width: abs(width - options.bits))


def _plan(empty: Any, options: Options, alike: float | None) -> Plan:
    """The plan of the options, or the one that gives all tensors the width ``alike``."""
    _, given = given_plan(options)
    if given is not None:
        return given
    instead = {} if alike is None else {"bits": alike, "widths": None, "max_kl": None}
    return plan_of(empty, options, **instead)


def _sizes(empty: Any, plan: Plan, options: Options, vocabulary: int, tokens: int, teacher: int) -> Sizes:
    counts = {name: parameter.numel() for name, parameter in empty.named_parameters()}
    blocks: dict[str, int] = {}
    for name, n in counts.items():
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if number is not None:
            path = ".".join(parts[: number + 1])
            blocks[path] = blocks.get(path, 0) + n
    total = sum(counts.values())
    frozen = 0
    if options.embeddings == "freeze":
        frozen = sum(kept.weights for kept in plan.kept.values() if kept.reason.startswith(EMBEDDING))
    return Sizes(
        parameters=total,
        trained=total - frozen if plan.trains else 0,
        quantized=plan.quantized_weights,
        candidates=_candidates(plan, options),
        largest_block=max(blocks.values(), default=total),
        outside=total - sum(blocks.values()),
        vocabulary=vocabulary,
        logits=blocks_at_once(tokens, vocabulary) * tokens * vocabulary,
        compared=math.prod(probe_shape(tokens, vocabulary)) * vocabulary,
        text=0,
        importance=sum(v.weights for v in plan.layers.values() if isinstance(v.spec.scale, WeightedRule)),
        teacher=teacher,
    )


def _candidates(plan: Plan, options: Options) -> int:
    """How many quantizers calibration looks at in one pass, as the main job gives them to it."""
    if widths_may_differ(options):
        return len(candidates(recipe_of(options), options.group(), options.mix()))
    return len({layer.spec.grid.name for layer in plan.layers.values()})


def _held(teacher: Any, bf16: bool) -> int:
    """Bytes of the teacher's weights, as ``training.teacher`` holds them."""
    halved = rounded_anyway(teacher) if bf16 else []
    return 4 * sum(p.numel() for p in teacher.parameters()) - 2 * sum(p.numel() for p in halved)


def _empty(config: Any, options: Options) -> Any:
    source = loading.config_source(options.model if options.teacher == "parent" else str(options.teacher))
    return loading.empty_model(source, config, trust_remote_code=options.trust_remote_code)


def _teacher(options: Options, parent: Any) -> Any:
    """The configuration of the teacher, or None."""
    if options.teacher in (None, "parent"):
        return parent if options.teacher else None
    return loading.load_config(loading.config_source(str(options.teacher)), trust_remote_code=options.trust_remote_code)


def _kept(empty: Any, plan: Plan) -> Kept:
    matrices = head = vectors = 0
    for name, parameter in empty.named_parameters():
        if name not in plan.kept:
            continue
        if parameter.ndim < 2:
            vectors += parameter.numel()
        elif plan.kept[name].reason.startswith((EMBEDDING, HEAD)):
            head += parameter.numel()
        else:
            matrices += parameter.numel()
    return Kept(matrices=matrices, head=head, vectors=vectors)


__all__ = ["Estimate", "Layout", "Passes", "estimate", "memory"]
