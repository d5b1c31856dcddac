"""A plan of several widths: what each tensor may have in the target, what it would cost and hurt, and the choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from .curvature import Sensitivity
from .curvature.allocation import (
    KEPT,
    Allocation,
    Damage,
    Interactions,
    Problem,
    cheapest,
    curve,
    optimum,
)
from .curvature.damage import damages
from .errors import ConfigError, PlanError
from .plans import LayerPlan, stored_bytes
from .quant import FittedLevel, GroupSize, QuantSpec, ScaleRule
from .recipes import GRIDS, Recipe
from .targets import StorageType, Stored, Target, file_bytes, span

KEPT_REASON = "kept by the allocation: it hurts more than its bits are worth"


def is_mixed(recipe: Recipe, bits: float, widths: Sequence[float] | None, max_kl: float | None) -> bool:
    """Whether tensors may differ in width: asked for outright, or by a number of bits that is no width."""
    return bool(widths) or max_kl is not None or bits not in recipe.widths


def quantizers(recipe: Recipe, group_size: GroupSize, widths: Sequence[float] | None) -> dict[float, QuantSpec]:
    """Width -> quantizer of every width that a mixed plan of this recipe may use.

    Raises:
        ConfigError: a width that the recipe does not do.
    """
    chosen = [width for width in widths or recipe.widths if width != KEPT]
    return {width: recipe.mixed_spec(width, group_size) for width in sorted(chosen)}


def candidates(recipe: Recipe, group_size: GroupSize, widths: Sequence[float] | None) -> dict[str, QuantSpec]:
    """Label -> quantizer of every such width: what calibration has to measure.

    Raises:
        ConfigError: see ``quantizers``.
    """
    return {spec.grid.name: spec for spec in quantizers(recipe, group_size, widths).values()}


def measured_damage(sensitivity: Sensitivity, specs: Mapping[float, QuantSpec]) -> tuple[Damage, str]:
    """Damages in nats per token, and where they come from in words: see ``curvature.damage``.

    A width whose own grid was not measured (Sherry's, with the sensitivity of ``hestia calibrate``) has the damage of
    the plain grid; the words say so.

    Raises:
        PlanError: none of ``specs`` was measured, or with another group size; what to type is said.
    """
    damage: dict[str, dict[float, float]] = {path: {} for path in sensitivity.tensors}
    grids: list[str] = []
    rules: list[str] = []
    kinds: list[str] = []
    for width, spec in specs.items():
        own, plain = spec.grid.name, GRIDS[width].name
        label = own if own in sensitivity.candidates else plain
        read = damages(sensitivity, label) if label in sensitivity.candidates else None
        if read is None:
            continue
        means, words = read
        found = QuantSpec.from_json(dict(sensitivity.candidates[label]))
        if found.group_size != spec.group_size:
            raise PlanError(
                f"the sensitivity measured {label} in groups of {found.group_size}, the plan wants {spec.group_size}: "
                f"calibrate again with --group-size {spec.group_size}"
            )
        if found.grid != spec.grid:
            grids.append(f"{found.grid.name}, not {own}")
        if _as_frozen(found.scale) != _as_frozen(spec.scale):
            rules.append(f"{label} ({found.scale.name}, not {spec.scale.name})")
        kinds.append(words)
        for path, mean in means.items():
            damage[path][width] = mean
    if not kinds:
        listed = ", ".join(spec.grid.name for spec in specs.values())
        raise PlanError(
            f"the sensitivity measured no damage of {listed}, which a plan of several widths needs: "
            "calibrate again with `hestia calibrate MODEL --data TEXT --out sensitivity.json` (estimator gnb or kl)"
        )
    source = f"{' and '.join(dict.fromkeys(kinds))} ({sensitivity.estimator}, {sensitivity.sequences} sequences)"
    if grids:
        source += f"; other grids measured: {', '.join(grids)}"
    return damage, source + (f"; other scale rules measured: {', '.join(rules)}" if rules else "")


@dataclass(frozen=True)
class Offer:
    """What every tensor may have.

    Attributes:
        stored: module path -> width -> bytes in the first target.
        types: module path -> width -> target -> storage type.
        left_out: width -> why no tensor has it.
    """

    stored: Mapping[str, Mapping[float, int]]
    types: Mapping[str, Mapping[float, Mapping[str, str]]]
    left_out: Mapping[str, str]


def offer(
    linears: Mapping[str, nn.Linear],
    specs: Mapping[float, QuantSpec],
    targets: Sequence[Target],
    damage: Damage,
    *,
    keep: bool,
    fallback: bool,
    itemsize: int,
) -> Offer:
    """Every width that all targets hold exactly and whose damage is known, with its bytes.

    Bytes are those of the file; where a format without blocks has a group length for the whole file, which depends on
    what is kept, they are the most that any choice makes of them.

    Args:
        linears: the tensors to spend bits on.
        specs: width -> quantizer.
        targets: the first one's bytes count.
        damage: see ``Damage``.
        keep: a tensor may also stay as it is.
        fallback: single tensors may use another exact type of a target.
        itemsize: bytes of a number of the parent's dtype.

    Raises:
        ConfigError: a group size or a grid's block that does not divide a row; the tensor is named.
        PlanError: a tensor for which no width is left.
    """
    stored: dict[str, dict[float, int]] = {}
    kinds: dict[str, dict[float, StorageType]] = {}
    types: dict[str, dict[float, dict[str, str]]] = {}
    problems: dict[float, str] = {}
    for path, linear in linears.items():
        shape = (linear.out_features, linear.in_features)
        stored[path], kinds[path], types[path] = {}, {}, {}
        for width, spec in specs.items():
            try:
                spec.check_shape(shape)
            except ConfigError as error:
                raise ConfigError(f"{path}: {error}") from None
            try:
                held = [t.storage(spec.grid, spec.group_size, shape, fallback=fallback) for t in targets]
            except PlanError as error:
                problems.setdefault(width, str(error))
                continue
            if width not in damage.get(path, {}):
                problems.setdefault(width, f"its damage was not measured ({path})")
                continue
            kinds[path][width] = held[0]
            types[path][width] = {t.name: kind.name for t, kind in zip(targets, held, strict=True)}
        if keep:
            stored[path][KEPT] = shape[0] * shape[1] * itemsize
        if not (stored[path] or kinds[path]):
            raise PlanError(f"{path}: {'; '.join(problems.values())}")
    for width, spec in specs.items():
        held_by = {path: choices[width] for path, choices in kinds.items() if width in choices}
        for path, size in _most_bytes(linears, held_by, spec.group_size, itemsize).items():
            stored[path][width] = size
    used = {width for choices in types.values() for width in choices}
    return Offer(stored, types, {f"{width:g}": problems[width] for width in specs if width not in used})


def _most_bytes(
    linears: Mapping[str, nn.Linear], kinds: Mapping[str, StorageType], group_size: GroupSize, itemsize: int
) -> dict[str, int]:
    """Module path -> bytes of a tensor in the file, whichever of the others are kept.

    Fewer tensors have longer groups in common, so all of them together take the most; but one whose group no usual
    length divides gives all others one scale per row, and without it they take more.
    """
    alike: dict[bool, dict[str, Stored]] = {True: {}, False: {}}
    for path, kind in kinds.items():
        shape = (linears[path].out_features, linears[path].in_features)
        usual = any(span(group_size, shape) % length == 0 for length in kind.usual)
        alike[usual][path] = (kind, group_size, shape)
    out: dict[str, int] = {}
    for tensors in alike.values():
        out |= dict(zip(tensors, file_bytes(list(tensors.values()), itemsize), strict=True))
    return out


def allocate(
    linears: Mapping[str, nn.Linear],
    offered: Offer,
    damage: Damage,
    *,
    bits: float,
    max_kl: float | None,
    interactions: Interactions | None,
    elsewhere: str = "",
) -> tuple[Allocation, tuple[tuple[float, float], ...]]:
    """The best allocation, and (bits, damage) of the best at other budgets.

    Raises:
        PlanError: a budget or a bound that nothing fits; the smallest feasible one is named, and of a budget
            ``elsewhere``, what else to do.
    """
    if not 0.0 < bits <= 32.0:
        raise PlanError(f"bits must be a positive number of bits per weight, got {bits:g}")
    weights = {path: linear.weight.numel() for path, linear in linears.items()}
    problem = Problem.of(offered.stored, weights, damage)
    if max_kl is not None:
        found = cheapest(problem, max_kl, interactions)
    else:
        budget = problem.bytes_for(bits)
        try:
            problem.require(budget)
        except PlanError as error:
            raise PlanError(f"{error}{elsewhere}") from None
        found = optimum(problem, budget, interactions)
    return found, tuple((point.bits, point.damage) for point in curve(problem, None, interactions))


def layers_of(
    linears: Mapping[str, nn.Linear],
    specs: Mapping[float, QuantSpec],
    offered: Offer,
    damage: Damage,
    found: Allocation,
) -> dict[str, LayerPlan]:
    """The quantized tensors of an allocation, in the order of the model."""
    layers: dict[str, LayerPlan] = {}
    for path, linear in linears.items():
        width = found.widths[path]
        if width != KEPT:
            layers[path] = LayerPlan(
                spec=specs[width],
                shape=(linear.out_features, linear.in_features),
                stored=offered.types[path][width],
                damage=float(damage[path][width]),
            )
    return layers


def stored_bits(
    linears: Mapping[str, nn.Linear], layers: Mapping[str, LayerPlan], target: Target, itemsize: int
) -> float:
    """Bits per weight that all ``linears`` take in the file: ``layers`` quantized, the others kept."""
    quantized = sum(stored_bytes(layers, target.name, itemsize).values())
    kept = itemsize * sum(linear.weight.numel() for path, linear in linears.items() if path not in layers)
    weights = sum(linear.weight.numel() for linear in linears.values())
    return 8.0 * (quantized + kept) / weights


def _as_frozen(scale: ScaleRule) -> ScaleRule:
    """A scale rule as it freezes: whether training fits the level to soft values changes no rounded weight."""
    return replace(scale, soft=False) if isinstance(scale, FittedLevel) else scale
