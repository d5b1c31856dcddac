"""model + recipe + target + sensitivity -> Plan; refuses before any training what could not be delivered after it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import recipes
from .curvature import Sensitivity
from .curvature.allocation import KEPT, Damage, Interactions
from .errors import ConfigError, PlanError
from .mixed import KEPT_REASON, allocate, is_mixed, layers_of, measured_damage, offer, quantizers, stored_bits
from .nn.biases import OPTIONS, biased_layers, options_for
from .nn.select import Selection, select, unwrapped
from .plans import Kept, LayerPlan, Plan, Spending
from .quant import GroupSize, QuantSpec
from .recipes import Recipe
from .targets import BIASES, Target
from .targets import target as find_target

SMALLEST_COVERAGE = 0.5
_SMALLEST_TYPES = "gguf:mixed"  # the target that stores every tensor in the smallest type that holds it


def plan(
    model: nn.Module,
    recipe: str | Recipe = "hearth",
    target: str | Sequence[str] = "hf",
    sensitivity: str | Path | Sensitivity | Mapping[str, float] | None = None,
    *,
    bits: float = 1.58,
    widths: Sequence[float] | None = None,
    max_kl: float | None = None,
    damages: Damage | None = None,
    interactions: Interactions | None = None,
    group_size: GroupSize = "row",
    skip: str | Sequence[str] = (),
    fallback: bool = False,
    allow_partial: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Plan:
    """Decide for every parameter of the model whether and how it becomes low-bit.

    Args:
        model: a transformers causal LM (weights may be on the meta device).
        recipe: a recipe or its name.
        target: file format or formats that must hold the result exactly.
        sensitivity: a sensitivity.json, its object, or module path -> curvature; None ignores curvature.
        bits: one of the recipe's widths for every tensor; any other number, such as 1.9, is a budget of stored bits a
            weight (scales and padding included) that an exact allocation spends where the damage falls most.
        widths: what the allocation may choose from, 16 for keeping a tensor; with it every ``bits`` is a budget.
        max_kl: instead of a budget, the cheapest plan whose predicted KL is at most this many nats per token.
        damages: module path -> width -> predicted KL, for the allocation; None takes those of the sensitivity.
        interactions: pairwise terms of the damages (``allocation.Interactions``).
        group_size: weights that share a scale: an int, "row" or "tensor".
        skip: shell pattern or patterns of module paths to keep.
        fallback: let single tensors use another exact storage type of the target.
        allow_partial: accept a plan that leaves more than half of the non-embedding weights as they are.
        options: options of a recipe given by name.

    Raises:
        ConfigError: an unknown recipe, option, target or width, no target, bits that are no number, or options beside a
            recipe that is no name.
        PlanError: a tensor that group size or target cannot hold, a pattern that matches nothing, a sensitivity of
            another model, or of no curvature where the recipe reads one, too few quantizable weights, or a budget that
            nothing fits (the smallest is named).
    """
    model = unwrapped(model)
    chosen = _chosen(recipe, options)
    if isinstance(sensitivity, (str, Path)):
        sensitivity = Sensitivity.load(Path(sensitivity))
    if isinstance(sensitivity, Sensitivity):
        require_curvature(chosen, sensitivity.primary, sensitivity.estimator)
    targets = [find_target(name) for name in ([target] if isinstance(target, str) else target)]
    if not targets:
        raise ConfigError("target: no file format is given; name one, such as hf")
    if isinstance(bits, str):
        raise ConfigError(f"bits must be a number, got {bits!r}")
    selection = select(model, skip)
    _check_coverage(selection, allow_partial)
    itemsize = _itemsize(model, selection)
    spent: Spending | None = None
    if is_mixed(chosen, bits, widths, max_kl):
        layers, selection, spent = _mixed(
            model,
            selection,
            chosen,
            targets,
            sensitivity,
            bits=bits,
            widths=widths,
            max_kl=max_kl,
            damages=damages,
            interactions=interactions,
            group_size=group_size,
            fallback=fallback,
            itemsize=itemsize,
        )
        _check_coverage(selection, allow_partial, f"{spent.summary()}: ")
    else:
        layers = _uniform(selection, chosen.spec_for(bits, group_size), targets, fallback=fallback)
    if any(layer.spec.output_shift is not None for layer in layers.values()):
        _check_biases(model, chosen.name, list(layers), [t.name for t in targets])
    result = Plan(
        recipe=chosen.to_json(),
        trains=chosen.trains,
        targets=tuple(t.name for t in targets),
        schedule=chosen.schedule(),
        layers=layers,
        kept=selection.kept,
        warnings=selection.warnings,
        correction=chosen.correction(),
        spending=spent,
        itemsize=itemsize,
    )
    if sensitivity is None:
        return result
    traces = sensitivity.values if isinstance(sensitivity, Sensitivity) else sensitivity
    _check_same_model({path: layer.weights for path, layer in layers.items()}, selection.kept, traces, sensitivity)
    if isinstance(sensitivity, Sensitivity):
        _check_same_shape(model, sensitivity)
    return result.with_factors(chosen.temperature_factors({path: traces[path] for path in layers}))


def _chosen(recipe: str | Recipe, options: Mapping[str, Any] | None) -> Recipe:
    if not isinstance(recipe, Recipe):
        return recipes.get(recipe, **(options or {}))
    if options:
        raise ConfigError(
            f"options {dict(options)} beside a recipe that is made already: give them to "
            f"hestia.recipes.get({recipe.name!r}, ...), or give the name"
        )
    return recipe


def _uniform(
    selection: Selection, spec: QuantSpec, targets: Sequence[Target], *, fallback: bool
) -> dict[str, LayerPlan]:
    """Every candidate under one quantizer; refused as a whole where a target cannot hold one of them."""
    layers: dict[str, LayerPlan] = {}
    problems: dict[str, list[str]] = {}
    for path, linear in selection.candidates.items():
        shape = (linear.out_features, linear.in_features)
        try:
            spec.check_shape(shape)
            stored = {t.name: t.storage(spec.grid, spec.group_size, shape, fallback=fallback).name for t in targets}
        except ValueError as error:
            problems.setdefault(str(error), []).append(path)
            continue
        layers[path] = LayerPlan(spec=spec, shape=shape, stored=stored)
    if problems:
        raise PlanError(_summary(problems))
    return layers


def _mixed(
    model: nn.Module,
    selection: Selection,
    recipe: Recipe,
    targets: Sequence[Target],
    sensitivity: Sensitivity | Mapping[str, float] | None,
    *,
    bits: float,
    widths: Sequence[float] | None,
    max_kl: float | None,
    damages: Damage | None,
    interactions: Interactions | None,
    group_size: GroupSize,
    fallback: bool,
    itemsize: int,
) -> tuple[dict[str, LayerPlan], Selection, Spending]:
    """Tensors of several widths, the selection without those that the allocation keeps, and how the bits were spent."""
    linears = selection.candidates
    if damages is None and isinstance(sensitivity, Sensitivity):
        sizes = {path: linear.weight.numel() for path, linear in linears.items()}
        _check_same_model(sizes, selection.kept, sensitivity.values, sensitivity)
    specs = quantizers(recipe, group_size, widths)
    damages, source = _damages(recipe, bits, sensitivity, damages, specs)
    keep = widths is None or KEPT in widths
    offered = offer(linears, specs, targets, damages, keep=keep, fallback=fallback, itemsize=itemsize)
    elsewhere = "" if all(t.name == _SMALLEST_TYPES for t in targets) else f", or try --target {_SMALLEST_TYPES}"
    found, points = allocate(
        linears, offered, damages, bits=bits, max_kl=max_kl, interactions=interactions, elsewhere=elsewhere
    )
    layers = layers_of(linears, specs, offered, damages, found)
    spent = Spending(
        target=targets[0].name,
        asked_bits=None if max_kl is not None else bits,
        asked_kl=max_kl,
        bits=stored_bits(linears, layers, targets[0], itemsize),
        predicted_kl=found.damage,
        source=source,
        left_out=offered.left_out,
        curve=points,
    )
    return layers, _keeping(model, selection, layers), spent


def _damages(
    recipe: Recipe,
    bits: float,
    sensitivity: Sensitivity | Mapping[str, float] | None,
    damages: Damage | None,
    specs: Mapping[float, QuantSpec],
) -> tuple[Damage, str]:
    if damages is not None:
        return damages, "the caller's numbers"
    if not isinstance(sensitivity, Sensitivity):
        listed = ", ".join(f"{width:g}" for width in recipe.widths)
        why = f"recipe {recipe.name!r} does not do {bits:g} bits for all tensors alike (it does {listed})"
        if bits in recipe.widths:
            why = "--max-kl and --widths spend bits tensor by tensor"
        raise PlanError(
            f"{why}; a plan of several widths needs a sensitivity: run `hestia calibrate MODEL --data TEXT --out "
            "sensitivity.json` and give --sensitivity sensitivity.json"
        )
    return measured_damage(sensitivity, specs)


def _keeping(model: nn.Module, selection: Selection, layers: Mapping[str, LayerPlan]) -> Selection:
    """The selection after the allocation: candidates that got no grid are kept, in the order of the model."""
    kept = dict(selection.kept)
    for path, linear in selection.candidates.items():
        if path not in layers:
            kept[f"{path}.weight"] = Kept(reason=KEPT_REASON, weights=linear.weight.numel())
    ordered = {name: kept[name] for name, _ in model.named_parameters() if name in kept}
    return Selection(
        candidates={path: linear for path, linear in selection.candidates.items() if path in layers},
        kept=ordered,
        warnings=selection.warnings,
    )


def _itemsize(model: nn.Module, selection: Selection) -> int:
    """Bytes of a number in the parent's dtype, in which weights are kept, whatever dtype they were loaded in."""
    dtype = getattr(getattr(model, "config", None), "dtype", None)
    loaded = next(iter(selection.candidates.values())).weight.dtype
    return (dtype if isinstance(dtype, torch.dtype) else loaded).itemsize


def require_curvature(recipe: Recipe, primary: str, estimator: str) -> None:
    """Refuse to pace temperatures by a damage, which is no curvature.

    Args:
        recipe: of the plan.
        primary: the quantity that the sensitivity holds, or will hold.
        estimator: who measures it.

    Raises:
        PlanError: the recipe reads curvature, and the quantity is a KL.
    """
    if recipe.uses_curvature and primary.partition(":")[0] == "kl":
        raise PlanError(
            f"recipe {recipe.name!r} paces its temperatures by curvature, and the estimator {estimator!r} measures "
            f"{primary!r}, a damage: calibrate with --estimator gnb, or choose a recipe that reads no curvature, such "
            "as hearth"
        )


def _check_coverage(selection: Selection, allow_partial: bool, after: str = "") -> None:
    """Refuse a plan that quantizes next to nothing; ``after`` is said before the reason."""
    if not selection.candidates or (selection.coverage() < SMALLEST_COVERAGE and not allow_partial):
        raise PlanError(after + _refusal(selection))


def _check_same_model(
    weights: Mapping[str, int],
    kept: Collection[str],
    traces: Mapping[str, float],
    sensitivity: Sensitivity | Mapping[str, float],
) -> None:
    """Refuse a sensitivity that speaks of other tensors, or of tensors of another size.

    Args:
        weights: module path -> number of weights of every tensor that must have been measured.
        kept: names of the parameters that may have been.
        traces: what was measured.
        sensitivity: where it comes from.
    """
    missing = [path for path in weights if path not in traces]
    strange = [path for path in traces if path not in weights and f"{path}.weight" not in kept]
    if missing:
        problem = f"lacks {len(missing)} of {len(weights)} tensors, the first is {missing[0]}"
    elif strange:
        problem = f"speaks of {len(strange)} tensors that the model has not, the first is {strange[0]}"
    elif isinstance(sensitivity, Sensitivity):
        sizes = {path: sensitivity.tensors[path].weights for path in weights}
        differing = [path for path, count in weights.items() if sizes[path] != count]
        if not differing:
            return
        first = differing[0]
        problem = f"measured {sizes[first]:,} weights in {first}, the model has {weights[first]:,}"
    else:
        return
    raise PlanError(f"the sensitivity {problem}: was it calibrated on another model?")


def _check_same_shape(model: nn.Module, sensitivity: Sensitivity) -> None:
    """Refuse a sensitivity whose model says of itself that it is another architecture or size."""
    config = getattr(model, "config", None)
    for name, there in sensitivity.model.items():
        here = getattr(config, name, None)
        if name not in ("name", "commit") and here is not None and here != there:
            raise PlanError(
                f"the sensitivity was measured on a model with {name} {there!r}, this one has {here!r}: "
                "was it calibrated on another model?"
            )


def _check_biases(model: nn.Module, recipe: str, paths: Sequence[str], targets: Sequence[str]) -> None:
    """Refuse a shift where the frozen model could not hold it as a bias, in transformers or in an engine."""
    config: Any = getattr(model, "config", None)
    if config is None:
        return
    advice = "Keep them with --skip, or choose a recipe without an output shift."
    options = options_for(model, paths)
    if options is None:
        held = set[str]().union(*(biased_layers(model, some) or () for some in OPTIONS))
        missing = [path for path in paths if path not in held]
        raise PlanError(
            f"recipe {recipe!r} freezes its shift into biases, and {type(model).__name__} has no bias for "
            f"{len(missing)} of {len(paths)} tensors, the first is {missing[0]}. {advice}"
        )
    stored = sorted(biased_layers(model, options) or ())  # zeros too, where an option brings more than is shifted
    for container, engine in (("gguf", "llama.cpp"), ("mlx", "mlx-lm")):
        if not any(name.startswith(container) for name in targets):
            continue
        allowed = BIASES[engine].get(str(config.model_type), frozenset())
        missing = [path for path in stored if not any(path.endswith(suffix) for suffix in allowed)]
        if missing:
            raise PlanError(
                f"recipe {recipe!r} freezes its shift into biases, and {engine} loads none for {len(missing)} of "
                f"{len(stored)} tensors of {config.model_type}, the first is {missing[0]}. {advice}"
            )


def _refusal(selection: Selection) -> str:
    """Too little of the model is made of linear layers: how little, and what the rest is."""
    rest = "; ".join(f"{weights:,} weights kept: {reason}" for reason, weights in selection.kept_body().items())
    if not selection.candidates:
        return f"no weight of this model could become low-bit: hestia quantizes nn.Linear layers ({rest})"
    return (
        f"only {100 * selection.coverage():.0f} % of the non-embedding weights could become low-bit ({rest}). "
        "Allow it with --allow-partial (allow_partial=True)."
    )


def _summary(problems: Mapping[str, list[str]], most: int = 4) -> str:
    """Each problem once, with the tensors that have it."""
    lines = ["this plan cannot be exported exactly:"]
    for problem, paths in problems.items():
        more = f" and {len(paths) - most} more" if len(paths) > most else ""
        lines.append(f"  {problem}\n    in {', '.join(paths[:most])}{more}")
    return "\n".join(lines)
