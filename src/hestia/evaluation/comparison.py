"""Finished runs against each other: which differences may be claimed, and about what.

Two runs can be paired where the parent scored the same on every held-out block: that is the same parent and the same
text, whatever the records call them. Then

    over blocks    d_i = nll(run, block i) - nll(first run, block i), weighted by the block's tokens, in stretches of
                   consecutive blocks: these two very models, on other such text
    over seeds     d_k = nll(arm, seed k) - nll(first run's arm, seed k): the two methods, trained again

An arm is what the run was told (run.yaml) but its seed and what decides no number (``_FREE``); the rate that a pilot
chooses is one setting. A run without its run.yaml is an arm of its own. Seeds are what a claim about a method needs;
they are compared where two arms share at least two of them, with Holm's correction over all arms compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from ..errors import ConfigError
from ..options import BYSTANDERS, count
from .paired import PairedDifference, holm, over_blocks, paired_difference, paired_p_value

_SAME = 1e-3  # nats per block: one model scored twice in fp32, on any two machines, differs by less

SEEDS_TO_CLAIM = 3
"""Common seeds that a claim about two methods takes, at least: an interval of two has one degree of freedom."""

_FREE = BYSTANDERS | {"seed", "plan", "model"}
"""Options that make no other arm; of a plan its digest counts, and runs of another parent are not paired anyway."""


@dataclass(frozen=True, kw_only=True)
class ScoredRun:
    """What of a run a comparison reads.

    Attributes:
        name: of the run.
        arm: everything that was chosen but the seed, as one string.
        seed: of the run.
        nll: nats per token of the frozen model, as reported.
        block_nll, parent_block_nll: of every held-out block, the frozen model's and the parent's.
        block_tokens: counted tokens of every block; None: all alike.
    """

    name: str
    arm: str
    seed: int
    nll: float
    block_nll: tuple[float, ...]
    parent_block_nll: tuple[float, ...]
    block_tokens: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One run or arm minus the first one; negative is better.

    Attributes:
        over: what a pair is: stretches of blocks (see ``over_blocks``) or seeds.
        name, reference: run names over blocks; over seeds, the first run of either arm.
        difference: mean and 95 % t interval.
        adjusted_p: Holm's p over all arms compared; None over blocks.
    """

    over: Literal["blocks", "seeds"]
    name: str
    reference: str
    difference: PairedDifference
    adjusted_p: float | None = None

    @property
    def claimed(self) -> bool:
        """Whether a difference may be claimed at the interval's level: over seeds, of methods, with three or more."""
        if self.adjusted_p is not None:
            return self.difference.n >= SEEDS_TO_CLAIM and self.adjusted_p < 1.0 - self.difference.level
        return self.difference.excludes_zero

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {**asdict(self), "claimed": self.claimed}


def compare_runs(runs: Sequence[ScoredRun]) -> list[Comparison]:
    """Every run against the first over blocks, every arm against the first over seeds.

    Runs that cannot be paired with the first are left out; ``pairable`` tells which. Two runs of one arm and seed count
    once over seeds.

    Raises:
        ConfigError: a loss that is not finite, or a block that counts no token.
    """
    if not runs:
        return []
    first, *others = runs
    others = [run for run in others if pairable(first, run)]
    found = [
        Comparison(
            over="blocks",
            name=run.name,
            reference=first.name,
            difference=over_blocks(run.block_nll, first.block_nll, run.block_tokens or first.block_tokens),
        )
        for run in others
        if len(first.block_nll) > 1
    ]
    arms: dict[str, dict[int, ScoredRun]] = {}
    for run in (first, *others):
        arms.setdefault(run.arm, {}).setdefault(run.seed, run)
    reference = arms.pop(first.arm)
    seeds: list[tuple[Comparison, float]] = []
    for arm in arms.values():
        shared = sorted(arm.keys() & reference.keys())
        if len(shared) < 2:
            continue
        ours, theirs = [arm[k].nll for k in shared], [reference[k].nll for k in shared]
        comparison = Comparison(
            over="seeds",
            name=arm[shared[0]].name,
            reference=reference[shared[0]].name,
            difference=paired_difference(ours, theirs),
        )
        seeds.append((comparison, paired_p_value(ours, theirs)))
    for (comparison, _), p in zip(seeds, holm([p for _, p in seeds]), strict=True):
        found.append(replace(comparison, adjusted_p=p))
    return found


def pairable(a: ScoredRun, b: ScoredRun) -> bool:
    """Whether the same parent was scored on the same blocks in both runs."""
    ours, theirs = a.parent_block_nll, b.parent_block_nll
    return len(ours) == len(theirs) and all(abs(x - y) < _SAME for x, y in zip(ours, theirs, strict=True))


def scored_run(
    name: str, report: dict[str, Any], scores: dict[str, Any], options: Mapping[str, Any] | None
) -> ScoredRun:
    """From the report.json and scores.json of a run, and what it was told; None where that is not known.

    Raises:
        ConfigError: they lack what a comparison needs.
    """
    try:
        settings = {"run": name} if options is None else _settings(report, options)
        quantized, parent = scores["quantized"], scores["parent"]
        tokens = quantized.get("block_tokens")
        return ScoredRun(
            name=name,
            arm=json.dumps(settings, sort_keys=True),
            seed=int(report["seed"]),
            nll=float(quantized["nll"]),
            block_nll=tuple(map(float, quantized["block_nll"])),
            parent_block_nll=tuple(map(float, parent["block_nll"])),
            block_tokens=None if tokens is None else tuple(map(float, tokens)),
        )
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ConfigError(f"{name}: no per-block losses to compare by ({type(error).__name__}: {error})") from None


def _settings(report: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """What makes an arm: the options by their meaning, not as they were typed.

    Of the recipe all its options as they were, whatever today's defaults are; of text the digests; of numbers values.
    """
    settings = {key: value for key, value in options.items() if key not in _FREE}
    settings["options"] = report.get("recipe_options", settings.get("options"))
    read = report.get("data")
    for key in ("data", "eval_data"):
        if isinstance(read, dict) and key in read:
            settings[key] = _without_places(read[key])
    for key in ("tokens", "eval_tokens"):
        if key in settings:
            settings[key] = count(str(settings[key]), key)
    if settings.get("lr", "auto") != "auto":
        settings["lr"] = float(settings["lr"])
    return settings


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_places(v) for k, v in value.items() if k not in ("given", "path")}
    return [_without_places(v) for v in value] if isinstance(value, list) else value
