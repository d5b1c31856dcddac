"""Checkpoints without pickle: safetensors for every tensor, JSON for the rest, complete or absent.

    checkpoints/step-000300/
      model.safetensors        every parameter and persistent buffer, once (ties are stored once)
      optimizer.safetensors    PARAMETER/exp_avg, PARAMETER/exp_avg_sq, PARAMETER/step, by parameter name
      random.safetensors       generator states of torch (CPU and devices)
      trainer_state.json       the Trainer's own state: step, epoch, history
      state.json               schema, step, schedulers, python and numpy random states, fingerprint, file hashes

The folder is written under a temporary name and renamed last; ``state.json`` holds the hashes of the other files, so a
half-written or damaged checkpoint is recognised and never resumed from.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import ConfigError
from ..files import read_json, sha256, write_json

SCHEMA = 1
STATE = "state.json"


def folder_name(step: int) -> str:
    """``step-000300``: sorts by step, up to a million of them."""
    return f"step-{step:06d}"


def save(
    folder: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    trainer_state: Mapping[str, Any],
    step: int,
    fingerprint: Mapping[str, Any],
) -> None:
    """Write one checkpoint; either all of it appears at ``folder`` or nothing does."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_file(_unique(model.state_dict()), temporary / "model.safetensors")
        save_file(_optimizer_tensors(model, optimizer), temporary / "optimizer.safetensors")
        save_file(_generator_states(), temporary / "random.safetensors")
        write_json(temporary / "trainer_state.json", dict(trainer_state))
        files = sorted(p for p in temporary.iterdir())
        for path in files:
            _flush(path)
        record = {
            "schema": SCHEMA,
            "step": step,
            "scheduler": {k: v for k, v in scheduler.state_dict().items() if isinstance(v, (int, float, list))},
            "random": {"python": _to_lists(random.getstate()), "numpy": _numpy_state()},
            "fingerprint": dict(fingerprint),
            "files": {path.name: sha256(path) for path in files},
        }
        write_json(temporary / STATE, record)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        _flush(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_model(folder: Path, model: nn.Module) -> None:
    """Load the weights of a checkpoint into the model it was made from, in place.

    Raises:
        ConfigError: the checkpoint was made from another model.
    """
    tensors = load_file(folder / "model.safetensors")
    _, unexpected = model.load_state_dict(tensors, strict=False)
    missing = set(_unique(model.state_dict())) - set(tensors)
    if missing or unexpected:
        raise ConfigError(f"{folder}: made from another model ({len(missing)} missing, {len(unexpected)} unexpected)")


def load_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """Load moments, step counts and scheduler position, in place."""
    tensors = load_file(folder / "optimizer.safetensors")
    names = {id(p): n for n, p in model.named_parameters()}
    ordered = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for index, parameter in enumerate(ordered):
        prefix = names[id(parameter)] + "/"
        entry = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if entry:
            state[index] = entry
    record = optimizer.state_dict()
    record["state"] = state
    optimizer.load_state_dict(record)
    scheduler.load_state_dict({**scheduler.state_dict(), **read_json(folder / STATE, schema=SCHEMA)["scheduler"]})
    # A scheduler writes rates when it steps, not when it is loaded: the next step would take the first step's rate.
    for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate


def load_random(folder: Path) -> None:
    """Restore every random generator to where the checkpoint left it."""
    record = read_json(folder / STATE, schema=SCHEMA)["random"]
    version, internal, gauss = record["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = record["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))
    states = load_file(folder / "random.safetensors")
    torch.set_rng_state(states["cpu"])
    for index in range(torch.cuda.device_count()):
        if f"cuda.{index}" in states:
            torch.cuda.set_rng_state(states[f"cuda.{index}"], index)


def complete(folder: Path) -> bool:
    """Whether every file of a checkpoint is there with the hash its state.json names."""
    try:
        files = read_json(folder / STATE, schema=SCHEMA)["files"]
        return all(sha256(folder / name) == digest for name, digest in files.items())
    except (ConfigError, OSError, KeyError):
        return False


def newest(root: Path) -> Path | None:
    """The newest complete checkpoint under ``root``; incomplete ones are passed over."""
    return next((folder for folder in _newest_first(root) if complete(folder)), None)


def rotate(root: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints."""
    for folder in _newest_first(root)[max(1, keep) :]:
        shutil.rmtree(folder, ignore_errors=True)


def _newest_first(root: Path) -> list[Path]:
    steps = {int(step): p for p in root.glob("step-*") if (step := p.name.removeprefix("step-")).isdecimal()}
    return [steps[step] for step in sorted(steps, reverse=True)]


def _unique(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state without second names of the same storage: safetensors stores every tensor once."""
    seen: set[int] = set()
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            seen.add(tensor.data_ptr())
            out[name] = tensor.detach().contiguous()
    return out


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = {id(p): n for n, p in model.named_parameters()}
    return {
        f"{names[id(parameter)]}/{key}": value.detach().contiguous()
        for group in optimizer.param_groups
        for parameter in group["params"]
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def _generator_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    states.update({f"cuda.{i}": torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())})
    return states


def _numpy_state() -> list[Any]:
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return [name, np.asarray(keys).tolist(), position, has_gauss, cached]


def _to_lists(value: Any) -> Any:
    return [_to_lists(v) for v in value] if isinstance(value, tuple) else value


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
