"""What a resumed run must share with the one it continues, in words that say what differs where it does not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from typing import Any

import torch

from ..data import Blocks
from ..plans import Plan

_CHUNK = 1 << 20
_SHOWN = 4
"""Differences that a message names, at most."""


def of_plan(plan: Plan) -> dict[str, Any]:
    """Everything of a plan that moves a weight; each layer as a short hash of its quantizer and temperature factor."""
    record = plan.to_json()
    return {
        "recipe": record["recipe"],
        "schedule": record["schedule"],
        "correction": record.get("correction"),
        "layers": {path: _short({k: v for k, v in layer.items() if k not in ("stored", "damage")})
                   for path, layer in record["layers"].items()},
    }  # fmt: skip


def of_blocks(blocks: Blocks) -> dict[str, Any]:
    """Number, length and SHA-256 of the training blocks: ids and loss mask, in order."""
    digest = hashlib.sha256()
    for start in range(0, len(blocks), max(1, _CHUNK // max(1, blocks.input_ids.shape[1]))):
        rows = blocks[start : start + max(1, _CHUNK // max(1, blocks.input_ids.shape[1]))]
        digest.update(rows.input_ids.to(torch.int32).contiguous().numpy().tobytes())
        digest.update(rows.loss_mask.contiguous().numpy().tobytes())
    return {"blocks": len(blocks), "tokens_a_block": blocks.input_ids.shape[1], "sha256": digest.hexdigest()}


def plain(value: Any) -> Any:
    """``value`` as JSON would give it back: tuples are lists, dataclasses mappings, keys are text."""
    return json.loads(json.dumps(value, default=asdict))


def completed(record: Mapping[str, Any], options: Any) -> dict[str, Any]:
    """``record``, written from a dataclass, with defaults for the fields that the version which wrote it did not have.

    Args:
        record: what an earlier version wrote of its ``options``, as JSON.
        options: the dataclass today; those within it that ``record`` has too are completed likewise.
    """
    new = {f.name: _default(f) for f in fields(options) if f.name not in record and _default(f) is not MISSING}
    within = {
        name: completed(value, getattr(options, name))
        for name, value in record.items()
        if isinstance(value, Mapping) and is_dataclass(getattr(options, name, None))
    }
    return {**record, **new, **within}


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """What differs between two JSON values, one line a leaf: ``learning_rate is 0.01 there and 0.02 here``."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = list(dict.fromkeys([*before, *now]))
        parts = (differences(before.get(k), now.get(k), f"{name}.{k}" if name else str(k)) for k in keys)
        return [line for part in parts for line in part]
    if before == now:
        return []
    return [f"{name} is {_shown(before)} there and {_shown(now)} here"]


def summary(lines: list[str]) -> str:
    """The first few differences, and how many more there are."""
    more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return "; ".join(lines[:_SHOWN]) + more


def _default(field: Field[Any]) -> Any:
    """A field's default as JSON would give it back, or MISSING."""
    value = field.default if field.default_factory is MISSING else field.default_factory()
    return value if value is MISSING else plain(value)


def _shown(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return f'{text[:9]}..."' if isinstance(value, str) and len(value) == 64 else text[:80]


def _short(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
