"""What an allocation may choose from: groups of tied tensors, their widths, true bytes and damages."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import PlanError

KEPT = 16.0
"""The width of a tensor that is not quantized. Its damage is 0; its bytes are those of the parent's dtype."""

Damage = Mapping[str, Mapping[float, float]]
"""Module path -> width -> predicted damage, in nats per token where damages are to be added up and bounded."""

Interactions = Mapping[tuple[str, float, str, float], float]
"""(path, width, other path, its width) -> damage of quantizing both, less the sum of either alone; may be negative."""

_FUSED = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}, {"w1", "w3"}, {"query", "key", "value"})
_EXPERT = re.compile(r"^(.*\.experts)\.\d+\.")


def tie_of(path: str) -> str:
    """The name of the group that must have one width: what engines fuse into one kernel.

    q, k and v of one attention layer, gate and up of one feed-forward layer, all experts of one layer.

    >>> tie_of("model.layers.3.self_attn.k_proj")
    'model.layers.3.self_attn.{k,q,v}_proj'
    >>> tie_of("model.layers.3.mlp.experts.7.down_proj")
    'model.layers.3.mlp.experts.*'
    >>> tie_of("model.layers.3.mlp.down_proj")
    'model.layers.3.mlp.down_proj'
    """
    expert = _EXPERT.match(path)
    if expert:
        return f"{expert[1]}.*"
    parent, dot, name = path.rpartition(".")
    for members in _FUSED:
        if name in members:
            if all(member.endswith("_proj") for member in members):
                return f"{parent}{dot}{{{','.join(sorted(m.removesuffix('_proj') for m in members))}}}_proj"
            return f"{parent}{dot}{{{','.join(sorted(members))}}}"
    return path


@dataclass(frozen=True, order=True)
class Choice:
    """One width of a group: what it costs and what it hurts."""

    width: float
    stored: int
    damage: float


@dataclass(frozen=True)
class Group:
    """Tensors that share a width.

    Attributes:
        name: see ``tie_of``.
        paths: module paths, sorted.
        weights: of all of them.
        choices: one a width, the widest last.
    """

    name: str
    paths: tuple[str, ...]
    weights: int
    choices: tuple[Choice, ...]

    def at(self, width: float) -> Choice:
        """The choice of one width."""
        return next(choice for choice in self.choices if choice.width == width)


@dataclass(frozen=True)
class Problem:
    """Groups in the order of their names, so that the order of the input decides nothing."""

    groups: tuple[Group, ...]

    @classmethod
    def of(cls, stored: Mapping[str, Mapping[float, int]], weights: Mapping[str, int], damage: Damage) -> Problem:
        """Tie the tensors together; a group may have the widths that all its members have.

        Args:
            stored: module path -> width -> bytes in the file, scales and padding included; ``KEPT`` if it may be kept.
            weights: module path -> number of weights.
            damage: see ``Damage``; that of ``KEPT`` is 0 where it is not given.

        Raises:
            PlanError: no tensor, a width without damage, a damage that is negative or not finite, or tied tensors
                that share no width; the tensor is named.
        """
        if not stored:
            raise PlanError("there is no tensor to spend bits on")
        members: dict[str, list[str]] = {}
        for path in sorted(stored):
            members.setdefault(tie_of(path), []).append(path)
        groups: list[Group] = []
        for name, paths in sorted(members.items()):
            widths = set.intersection(*(set(stored[path]) for path in paths))
            if not widths:
                raise PlanError(f"{name}: no width is stored exactly for all of {', '.join(paths)}")
            choices = tuple(
                Choice(
                    width,
                    sum(stored[path][width] for path in paths),
                    math.fsum(_damage(damage, path, width) for path in paths),
                )
                for width in sorted(widths)
            )
            groups.append(Group(name, tuple(paths), sum(weights[path] for path in paths), choices))
        return cls(tuple(groups))

    @property
    def weights(self) -> int:
        """Weights of all tensors."""
        return sum(group.weights for group in self.groups)

    @property
    def smallest(self) -> int:
        """Bytes of the smallest allocation there is."""
        return sum(min(choice.stored for choice in group.choices) for group in self.groups)

    @property
    def largest(self) -> int:
        """Bytes with the least damaging choice of every group, the cheapest of equals."""
        best = (min(group.choices, key=lambda c: (c.damage, c.stored)) for group in self.groups)
        return sum(choice.stored for choice in best)

    def bits(self, stored: int) -> float:
        """Bytes as bits per weight."""
        return 8.0 * stored / self.weights

    def bytes_for(self, bits: float) -> int:
        """Whole bytes that ``bits`` a weight allow; a hair more, so that a file's own bits are always enough."""
        return math.floor(bits * self.weights / 8.0 * (1.0 + 1e-12) + 1e-9)

    def require(self, budget: int) -> None:
        """Refuse a budget that nothing fits.

        Raises:
            PlanError: with the smallest bits per weight that would do.
        """
        if budget < self.smallest:
            raise PlanError(
                f"{self.bits(budget):.4g} bits per weight cannot be reached: with scales and padding the smallest plan "
                f"that is stored exactly takes {up(self.bits(self.smallest)):.4f}; "
                f"ask for --bits {up(self.bits(self.smallest)):.4f} or more"
            )

    def allocation(self, widths: Mapping[str, float], interactions: Interactions | None = None) -> Allocation:
        """The allocation that gives every group, by name, a width."""
        chosen = [(group, group.at(widths[group.name])) for group in self.groups]
        damage = math.fsum(choice.damage for _, choice in chosen)
        by_path = {path: choice.width for group, choice in chosen for path in group.paths}
        for (a, wa, b, wb), extra in (interactions or {}).items():
            if by_path.get(a) == wa and by_path.get(b) == wb:
                damage += extra
        return Allocation(by_path, sum(choice.stored for _, choice in chosen), self.weights, damage)


@dataclass(frozen=True)
class Allocation:
    """A width for every tensor.

    Attributes:
        widths: module path -> width, sorted by path; ``KEPT`` where it stays as it is.
        stored: bytes of all tensors in the file, kept ones included.
        weights: of all tensors.
        damage: predicted; the KL to the parent in nats per token where the damages are.
    """

    widths: Mapping[str, float]
    stored: int
    weights: int
    damage: float

    @property
    def bits(self) -> float:
        """Stored bits per weight."""
        return 8.0 * self.stored / self.weights


def up(bits: float) -> float:
    """Rounded up to four decimals: what is printed is always enough."""
    return math.ceil(bits * 1e4 - 1e-9) / 1e4


def _damage(damage: Damage, path: str, width: float) -> float:
    found = damage.get(path, {}).get(width, 0.0 if width == KEPT else None)
    if found is None:
        raise PlanError(f"{path}: no damage is known for {width:g} bits")
    if not (math.isfinite(found) and found >= 0.0):
        raise PlanError(f"{path}: the damage at {width:g} bits must be 0 or a positive number, got {found}")
    return found
