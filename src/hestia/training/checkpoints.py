"""Checkpoints without pickle: safetensors for every tensor, JSON for the rest, complete or absent.

    checkpoints/step-000300/
      model.safetensors        every parameter and persistent buffer, once (ties are stored once)
      optimizer.safetensors    PARAMETER/exp_avg, PARAMETER/exp_avg_sq, PARAMETER/step, by parameter name
      random.safetensors       generator states of torch (CPU and devices)
      trainer_state.json       the Trainer's own state: step, epoch, history
      state.json               schema, step, schedulers, python and numpy random states, fingerprint, what the guards
                               remember, bytes and hashes of the other files, and the hash of all this itself

The folder is written under a temporary name, ``.step-000300.tmp``, flushed, and renamed last, so a process that dies at
any moment leaves a whole checkpoint or none; a damaged one is recognised by its hashes and never resumed from.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import ConfigError, DiskSpaceError
from ..files import finite, flush, read_json, save_file, sha256, write_json
from ..nn import knobs_of, refuse_others, unwrapped
from ..progress import announce
from ..resources import free_disk

SCHEMA = 2
STATE = "state.json"
_FILES = ("model.safetensors", "optimizer.safetensors", "random.safetensors", "trainer_state.json")
_ROOM = 1 << 20
"""Bytes that a checkpoint needs beside its tensors, at most, and a little air."""


def space(parameters: int, trained: int, importance: int = 0) -> int:
    """Bytes that the checkpoints of a run take at most: the two that rotation leaves, and one that is being written.

    Args:
        parameters, trained: counts; a trained one has two moments.
        importance: numbers that a weighted scale rule holds.
    """
    return 3 * (4 * parameters + 8 * trained + 4 * importance)


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
    memory: Mapping[str, Any] | None = None,
) -> None:
    """Write one checkpoint; either all of it appears at ``folder`` or nothing does.

    Args:
        folder: where; an incomplete checkpoint there is replaced.
        model, optimizer, scheduler, trainer_state, step: what is kept.
        fingerprint: what a resumed run must share (``fingerprints.py``).
        memory: whatever else the trainer wants back, as JSON.

    Raises:
        DiskSpaceError: the disk has too little room for it; nothing was written.
        OSError: it could not be written; nothing of it is left.
    """
    weights, moments = _unique(model.state_dict()), _optimizer_tensors(model, optimizer)
    _require_space(folder, bytes_of([*weights.values(), *moments.values()]) + _ROOM)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_file(weights, temporary / "model.safetensors")
        save_file(moments, temporary / "optimizer.safetensors")
        save_file(_generator_states(), temporary / "random.safetensors")
        write_json(temporary / "trainer_state.json", dict(trainer_state))
        for name in _FILES:
            flush(temporary / name)
        record = {
            "schema": SCHEMA,
            "step": step,
            "scheduler": {k: v for k, v in scheduler.state_dict().items() if isinstance(v, (int, float, list))},
            "random": {"python": _to_lists(random.getstate()), "numpy": _numpy_state()},
            "fingerprint": dict(fingerprint),
            "memory": dict(memory or {}),
            "files": {
                name: {"bytes": (temporary / name).stat().st_size, "sha256": sha256(temporary / name)}
                for name in _FILES
            },
        }
        write_json(temporary / STATE, {**record, "sha256": _own_hash(record)})
        flush(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        flush(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes that tensors take in a file."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _require_space(folder: Path, needed: int) -> None:
    free = free_disk(folder)
    if free < needed:
        raise DiskSpaceError(
            f"{folder}: a checkpoint needs {needed / 1e6:,.1f} MB, the disk has {free / 1e6:,.1f} MB left; "
            "earlier checkpoints are intact: make room, then continue with --resume"
        )


def load_latents(model: nn.Module, folder: str | Path) -> None:
    """Load what a Trainer saved of a converted model (``save_model``, its checkpoints) back into one, in place.

    That is latent weights and what scale rules hold beside them: ``from_pretrained`` on such a folder passes over the
    latter, and rounds the former to the dtype of its config.json. The model is the parent after
    ``hestia.apply(model, plan)`` by the same plan; then it freezes to what the Trainer evaluated, bit for bit.

    Args:
        model: converted; its own weights are replaced.
        folder: with model.safetensors, in one piece or several.

    Raises:
        ConfigError: no such files, damaged ones, or those of another model or plan; the model is as it was.
    """
    model, folder = unwrapped(model), Path(folder)
    knobs_of(model)
    refuse_others(model, folder)
    load_model(folder, model)


def load_model(folder: Path, model: nn.Module) -> None:
    """Load the weights of a checkpoint into the model it was made from, in place.

    Raises:
        ConfigError: no such files, damaged ones, or those of another model.
    """
    tensors = _weights(folder)
    state = model.state_dict()
    names: dict[int, list[str]] = {}  # a tie has several, and one of them is in the file
    for name, tensor in state.items():
        names.setdefault(tensor.data_ptr() if tensor.numel() else id(tensor), []).append(name)
    missing = [tied[0] for tied in names.values() if not any(name in tensors for name in tied)]
    unexpected = tensors.keys() - state.keys()
    if missing or unexpected:
        raise ConfigError(f"{folder}: made from another model ({len(missing)} missing, {len(unexpected)} unexpected)")
    for name, tensor in tensors.items():
        if tensor.shape != state[name].shape:
            shapes = f"{list(tensor.shape)} there and {list(state[name].shape)} here"
            raise ConfigError(f"{folder}: made from another model ({name} is {shapes})")
    model.load_state_dict(tensors, strict=False)


def _weights(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    try:
        pieces = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
        return {name: tensor for piece in pieces for name, tensor in load_file(folder / piece).items()}
    except (OSError, SafetensorError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"{folder}: no weights can be read from it ({error})") from None


def load_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """Load moments, step counts and scheduler position, in place."""
    tensors = load_file(folder / "optimizer.safetensors")
    names = {id(p): n for n, p in model.named_parameters()}
    ordered = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for index, parameter in enumerate(ordered):
        prefix = names[id(parameter)] + "/"
        # copies: what was loaded is a map of the file, whose blocks a deleted checkpoint would keep
        entry = {k.removeprefix(prefix): v.clone() for k, v in tensors.items() if k.startswith(prefix)}
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


def damage(folder: Path) -> str | None:
    """Why a folder is no complete checkpoint, in words; None for a complete one."""
    try:
        record = read_json(folder / STATE, schema=SCHEMA)
        if record.get("sha256") != _own_hash({k: v for k, v in record.items() if k != "sha256"}):
            return f"{STATE} is damaged"
        for name in _FILES:
            kept, path = record["files"][name], folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != kept["bytes"] or sha256(path) != kept["sha256"]:
                return f"{name} is damaged"
    except ConfigError as error:
        return str(error).removeprefix(f"{folder / STATE}: ").replace("no such file", f"{STATE} is missing")
    except (OSError, KeyError, TypeError, AttributeError) as error:
        return f"{STATE} cannot be used ({error})"
    return None


def complete(folder: Path) -> bool:
    """Whether every file of a checkpoint is there with the hash its state.json names."""
    return damage(folder) is None


def newest(root: Path) -> Path | None:
    """The newest complete checkpoint under ``root``; None where there is none at all.

    Incomplete ones are passed over, and named on standard error.

    Raises:
        ConfigError: one is of another version of hestia, or none is complete: training again from the first step, and
            deleting them on the way, is nothing to do unasked.
    """
    for folder in _unfinished(root):
        announce(f"{folder}: not a checkpoint; the process ended while it was being written")
    there = _newest_first(root)
    for folder in there:
        other = _other_schema(folder)
        if other is not None:
            raise ConfigError(
                f"{folder}: a checkpoint of schema {other}, and this version of hestia reads {SCHEMA}; go on with the "
                f"version that wrote it, or delete {root} to train from the first step"
            )
        why = damage(folder)
        if why is None:
            return folder
        announce(f"{folder}: passed over, it is incomplete: {why}")
    if there:
        raise ConfigError(f"{root}: no checkpoint in it is complete; delete it to train from the first step")
    return None


def _other_schema(folder: Path) -> int | None:
    """The schema number of a checkpoint's state.json where it can be read and is not today's."""
    try:
        found = json.loads((folder / STATE).read_text(encoding="utf-8")).get("schema")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, int) and found != SCHEMA else None


def sweep(root: Path) -> None:
    """Remove what processes that ended while they wrote a checkpoint left behind."""
    for folder in _unfinished(root):
        shutil.rmtree(folder, ignore_errors=True)


def rotate(root: Path, keep: int, good: Path) -> None:
    """Delete all but ``good``, which was just written, and the ``keep - 1`` checkpoints before it.

    A later one can only be what was passed over on resuming, or stand from before a restart at an earlier step: it is
    deleted where it is incomplete and left where it is not. So the last good checkpoint is never deleted, whatever
    else lies there.
    """
    ordered = _newest_first(root)
    if good not in ordered or not (good / STATE).is_file():
        return
    place = ordered.index(good)
    for folder in ordered[:place]:
        if not complete(folder):
            shutil.rmtree(folder, ignore_errors=True)
    for folder in ordered[place + max(1, keep) :]:
        shutil.rmtree(folder, ignore_errors=True)


def _newest_first(root: Path) -> list[Path]:
    steps = {int(step): p for p in root.glob("step-*") if (step := p.name.removeprefix("step-")).isdecimal()}
    return [steps[step] for step in sorted(steps, reverse=True)]


def _unfinished(root: Path) -> list[Path]:
    return sorted(p for p in root.glob(".step-*.tmp") if p.is_dir() and not p.is_symlink())


def _own_hash(record: Mapping[str, Any]) -> str:
    """SHA-256 of a record as it comes back from its file."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(finite(record))), sort_keys=True).encode()).hexdigest()


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
