"""Doctor: is this machine fit for a run, and what to do where it is not.

Three kinds of checks: what is here (versions, device, memory, disk, engines), what is wrong with it, and a self-test of
the parts that a run stands on (quantizer, packer, trainer) on toy inputs, in seconds.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from . import files, resources
from .errors import HestiaError
from .provenance import cpu_name, versions

Status = Literal["ok", "note", "problem"]

SMALL_MEMORY, SMALL_DISK = 4e9, 5e9
"""Bytes under which a run of a model of a few hundred million parameters is likely to fail."""

OLDEST = {"torch": (2, 11), "transformers": (5, 5), "compressed-tensors": (0, 15), "gguf": (0, 17)}


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        status: "ok", "note" (works, could be better) or "problem" (a run would fail or mislead).
        found: what is there.
        advice: what to do about it; empty where there is nothing to do.
    """

    name: str
    status: Status
    found: str
    advice: str = ""

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)


def examine(folder: Path = Path()) -> Iterator[Check]:
    """All checks, one after another; ``folder`` is where runs would be written."""
    yield from _versions()
    yield _device()
    yield _threads()
    yield _bf16()
    yield _memory()
    yield _disk(folder)
    yield from _engines()
    yield self_test("quantizer", _quantizer)
    yield self_test("packer", _packer)
    yield self_test("trainer", _trainer)


def self_test(name: str, work: Callable[[], str]) -> Check:
    """Run one self-test; whatever it raises is the finding."""
    started = time.perf_counter()
    try:
        found = work()
    except (HestiaError, RuntimeError, ValueError, TypeError, OSError, AssertionError, ImportError) as error:
        first = str(error).strip().splitlines()[:1]
        return Check(
            f"self-test: {name}",
            "problem",
            f"{type(error).__name__}: {''.join(first) or 'no message'}",
            "reinstall hestia-lm with the versions of its requirements.txt; if it stays, report this line",
        )
    return Check(f"self-test: {name}", "ok", f"{found}, {time.perf_counter() - started:.1f} s")


def _versions() -> Iterator[Check]:
    found = versions()
    yield Check("python", "ok", f"{found.pop('python')} on {platform.system()} {platform.machine()}")
    for name, version in found.items():
        oldest = OLDEST.get(name)
        if oldest is not None and _numbers(version) < oldest:
            wanted = ".".join(map(str, oldest))
            yield Check(name, "problem", version, f"too old: pip install '{name}>={wanted}'")
        else:
            yield Check(name, "ok", version)
    for name in OLDEST:
        if name not in found:
            yield Check(name, "problem", "not installed", f"pip install '{name}'")


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split("+")[0].split(".")
    return tuple(int(part) for part in parts[:2] if part.isdigit())


def _device() -> Check:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
        free = torch.cuda.mem_get_info()[0]
        return Check("device", "ok", f"{', '.join(names)}; {free / 1e9:.1f} GB free on the first")
    built = "a CUDA build" if torch.version.cuda else "the CPU build"
    if shutil.which("nvidia-smi"):
        return Check(
            "device",
            "problem",
            f"a GPU is here and torch ({built}) does not see it",
            "install the CUDA build of torch that fits the driver (nvidia-smi names it)",
        )
    return Check(
        "device", "note", f"{cpu_name()}, no GPU", "small models train here in minutes; `hestia demo` shows how fast"
    )


def _threads() -> Check:
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:
        allowed = cores
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    found = f"{threads} of {allowed} cores, load {load:.1f}"
    if threads > allowed:
        return Check("threads", "problem", found, f"more threads than cores crawl: --threads {allowed}")
    if load > 0.75 * allowed and threads > 1:
        return Check("threads", "note", found, "other work keeps the cores busy: --threads 1 is often faster then")
    return Check("threads", "ok", found)


def _bf16() -> Check:
    """Whether bf16 matrix products are worth it here: measured, because a flag says nothing about speed."""
    if torch.cuda.is_available():
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
        advice = "" if supported else "use --precision fp32"
        return Check("bf16", "ok" if supported else "note", "native" if supported else "emulated", advice)
    seconds = {dtype: _product_time(dtype) for dtype in (torch.float32, torch.bfloat16)}
    ratio = seconds[torch.float32] / seconds[torch.bfloat16]
    found = f"matrix products {ratio:.1f} x the speed of fp32"
    if ratio < 1.0:
        return Check("bf16", "note", found, "--precision fp32 is faster on this processor")
    return Check("bf16", "ok", found)


def _product_time(dtype: torch.dtype) -> float:
    a, b = torch.ones(512, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    torch.mm(a, b)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - started)
    return min(times)


def _memory() -> Check:
    free = resources.available_memory()
    if free is None:
        return Check("memory", "note", "unknown on this system")
    found = f"{free / 1e9:.1f} GB free"
    if free < SMALL_MEMORY:
        return Check(
            "memory",
            "note",
            found,
            "enough for small models: training takes about 16 bytes per parameter and activations",
        )
    return Check("memory", "ok", found)


def _disk(folder: Path) -> Check:
    here, free = resources.place_of(folder), resources.free_disk(folder)
    found = f"{free / 1e9:.1f} GB free in {here}"
    if free < SMALL_DISK:
        return Check("disk", "note", found, "a checkpoint takes 12 bytes per parameter; two are kept: --out elsewhere")
    try:
        with tempfile.TemporaryDirectory(dir=here) as scratch:
            files.write_text(Path(scratch) / "probe", "written, flushed, renamed")
    except OSError as error:
        return Check("disk", "problem", f"{here} cannot be written ({error.strerror})", "choose --out elsewhere")
    return Check("disk", "ok", found)


def _engines() -> Iterator[Check]:
    for package, module, gives, install in (
        ("llama-cpp-python", "llama_cpp", "runs and verifies .gguf files", "pip install 'hestia-lm[run]'"),
        ("lm-eval", "lm_eval", "hestia eval --tasks", "pip install 'hestia-lm[eval]'"),
    ):
        if importlib.util.find_spec(module) is None:
            yield Check(package, "note", f"not installed ({gives})", install)
        elif package not in versions():  # else it stands among the versions
            yield Check(package, "ok", f"version unknown ({gives})")


def _quantizer() -> str:
    """Hard forward equals the frozen codes, pressure 0 is the identity, gradients are finite at every temperature."""
    from .quant import Quantizer, QuantSpec, Softmax

    generator = torch.Generator().manual_seed(0)
    w = torch.randn(64, 256, generator=generator).mul_(0.02).requires_grad_()
    quantizer = Quantizer(QuantSpec(estimator=Softmax()))
    one, zero = torch.ones(()), torch.zeros(())
    if not torch.equal(quantizer.codes(w).dense(), quantizer.hard(w)):
        raise AssertionError("codes times scales is not the hard weight")
    if not torch.equal(quantizer.fake(w, zero, one), w):
        raise AssertionError("pressure 0 is not the identity")
    for temperature in (1e-6, 0.05, 0.3, 10.0):
        (gradient,) = torch.autograd.grad(quantizer.fake(w, one, torch.tensor(temperature)).sum(), w)
        if not bool(gradient.isfinite().all()):
            raise AssertionError(f"the gradient at temperature {temperature} is not finite")
    return "codes exact, gradients finite"


def _packer() -> str:
    """TQ2_0 bytes: ours read back, and gguf's own dequantizer gives the same weights."""
    import numpy as np
    from gguf import GGMLQuantizationType, quants

    from .export import packing

    codes = (np.arange(4 * 256).reshape(4, 256) * 7919 % 3 - 1).astype(np.int8)
    scales = np.array([[0.5], [0.015625], [2.0], [1.0]], np.float32)
    rows = packing.pack_tq2_0(codes, scales)
    back = packing.unpack_tq2_0(rows)
    if not (np.array_equal(back[0], codes) and np.array_equal(back[1], scales)):
        raise AssertionError("TQ2_0 does not read back what was packed")
    theirs = quants.dequantize(np.ascontiguousarray(rows), GGMLQuantizationType.TQ2_0)
    if not np.array_equal(theirs, codes * scales):
        raise AssertionError("gguf's dequantizer reads other weights from our TQ2_0 bytes")
    return "TQ2_0 exact, gguf agrees"


def _trainer() -> str:
    """Eight steps of a toy model: the loss falls, and what is frozen is what was evaluated."""
    import transformers

    from .data import Blocks
    from .evaluation import model_logits, score
    from .nn import apply, freeze
    from .planner import plan as make_plan
    from .training import HestiaTrainer, TrainConfig

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model: Any = transformers.LlamaForCausalLM(config)
    ids = 3 + (torch.arange(16)[:, None] + torch.arange(32)) % 61
    blocks = Blocks(ids, torch.ones_like(ids, dtype=torch.bool))
    plan = make_plan(model)
    apply(model, plan)
    before = score(model_logits(model), blocks, description="").nll
    with tempfile.TemporaryDirectory() as scratch:
        settings = TrainConfig(steps=8, batch_size=8, learning_rate=1e-2, bf16=False, log_every=0)
        folder = Path(scratch)
        HestiaTrainer(
            model, plan=plan, config=settings, train=blocks, tuning=blocks, folder=folder, description="self-test"
        ).fit()
    after = score(model_logits(model), blocks, description="").nll
    freeze(model)
    frozen = score(model_logits(model.eval()), blocks, description="").nll
    if not after < before:
        raise AssertionError(f"the loss did not fall: {before:.3f} before, {after:.3f} after")
    if frozen != after:
        raise AssertionError(f"the frozen model scores {frozen}, the evaluated one {after}")
    return f"loss {before:.2f} to {after:.2f}, frozen equals evaluated"
