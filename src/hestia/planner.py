"""model + recipe + target + sensitivity -> Plan; refuses before any training what could not be delivered after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import recipes
from .curvature import Sensitivity
from .curvature.allocation import KEPT, Damage, Interactions
from .errors import PlanError
from .mixed import KEPT_REASON, allocate, is_mixed, layers_of, measured_damage, offer, quantizers, spending, stored_bits
from .nn.biases import OPTIONS, biased_layers, options_for
from .nn.select import Selection, select
from .plans import Kept, LayerPlan, Plan, Spending
from .quant import GroupSize, QuantSpec
from .recipes import Recipe
from .targets import LLAMA_CPP_BIASES, Target
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
        max_kl: instead of a budget, the cheapest plan whose predicted KL is at most this many nats a token.
        damages: module path -> width -> predicted KL, for the allocation; None takes those of the sensitivity.
        interactions: pairwise terms of the damages (``allocation.Interactions``).
        group_size: weights that share a scale: an int, "row" or "tensor".
        skip: shell pattern or patterns of module paths to keep.
        fallback: let single tensors use another exact storage type of the target.
        allow_partial: accept a plan that leaves more than half of the non-embedding weights as they are.
        options: options of a recipe given by name.

    Raises:
        ConfigError: an unknown recipe, option, target or width.
        PlanError: a tensor that group size or target cannot hold, a pattern that matches nothing, a sensitivity of
            another model, too few quantizable weights, or a budget that nothing fits (the smallest is named).
    """
    chosen = recipe if isinstance(recipe, Recipe) else recipes.get(recipe, **(options or {}))
    if isinstance(sensitivity, (str, Path)):
        sensitivity = Sensitivity.load(Path(sensitivity))
    targets = [find_target(name) for name in ([target] if isinstance(target, str) else target)]
    selection = select(model, skip)
    if not selection.candidates or (selection.coverage() < SMALLEST_COVERAGE and not allow_partial):
        raise PlanError(_refusal(selection))
    traces = sensitivity.values if isinstance(sensitivity, Sensitivity) else sensitivity
    itemsize = _itemsize(model, selection)
    spent: Spending | None = None
    if is_mixed(chosen, bits, widths, max_kl):
        if damages is None and isinstance(sensitivity, Sensitivity):
            _check_same_model(_bare(chosen, targets, selection), sensitivity.values, sensitivity)
        specs = quantizers(chosen, group_size, widths)
        damages, source = _damages(chosen, bits, sensitivity, damages, specs)
        offered = offer(
            selection.candidates,
            specs,
            targets,
            damages,
            keep=widths is None or KEPT in widths,
            fallback=fallback,
            itemsize=itemsize,
        )
        elsewhere = "" if all(t.name == _SMALLEST_TYPES for t in targets) else f", or try --target {_SMALLEST_TYPES}"
        found, points = allocate(
            selection.candidates,
            offered,
            damages,
            bits=bits,
            max_kl=max_kl,
            interactions=interactions,
            elsewhere=elsewhere,
        )
        layers = layers_of(selection.candidates, specs, offered, damages, found)
        spent = spending(
            found,
            stored_bits(selection.candidates, layers, targets[0], itemsize),
            target=targets[0].name,
            bits=bits,
            max_kl=max_kl,
            source=source,
            left_out=offered.left_out,
            curve=points,
        )
        selection = _keeping(model, selection, layers)
        if not layers or (selection.coverage() < SMALLEST_COVERAGE and not allow_partial):
            raise PlanError(f"{spent.summary()}: {_refusal(selection)}")
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
    if traces is None:
        return result
    _check_same_model(result, traces, sensitivity)
    if isinstance(sensitivity, Sensitivity):
        _check_same_shape(model, sensitivity)
    return result.with_factors(chosen.temperature_factors({path: traces[path] for path in layers}))


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
        raise PlanError(
            f"recipe {recipe.name!r} does not do {bits:g} bits for all tensors alike (it does {listed}); a plan of "
            "several widths needs a sensitivity: run `hestia calibrate MODEL --data TEXT --out sensitivity.json` and "
            "give --sensitivity sensitivity.json"
        )
    return measured_damage(sensitivity, specs)


def _bare(recipe: Recipe, targets: Sequence[Target], selection: Selection) -> Plan:
    """All candidates without a thought to the target, to be compared with a sensitivity."""
    spec = QuantSpec()
    layers = {
        path: LayerPlan(spec=spec, shape=(linear.out_features, linear.in_features))
        for path, linear in selection.candidates.items()
    }
    return Plan(
        recipe=recipe.to_json(),
        trains=recipe.trains,
        targets=tuple(t.name for t in targets),
        schedule=recipe.schedule(),
        layers=layers,
        kept=selection.kept,
    )


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


def _check_same_model(
    made: Plan, traces: Mapping[str, float], sensitivity: Sensitivity | Mapping[str, float] | None
) -> None:
    """Refuse a sensitivity that speaks of other tensors, or of tensors of another size, than this plan's."""
    missing = [path for path in made.layers if path not in traces]
    strange = [path for path in traces if path not in made.layers and f"{path}.weight" not in made.kept]
    if missing:
        problem = f"lacks {len(missing)} of {len(made.layers)} tensors, the first is {missing[0]}"
    elif strange:
        problem = f"speaks of {len(strange)} tensors that the model has not, the first is {strange[0]}"
    elif isinstance(sensitivity, Sensitivity):
        sizes = {path: sensitivity.tensors[path].weights for path in made.layers}
        differing = [path for path, layer in made.layers.items() if sizes[path] != layer.weights]
        if not differing:
            return
        first = differing[0]
        problem = f"measured {sizes[first]:,} weights in {first}, the model has {made.layers[first].weights:,}"
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
    """Refuse a shift where the frozen model could not hold it as a bias, in transformers or in llama.cpp."""
    config: Any = getattr(model, "config", None)
    if config is None:
        return
    advice = "Keep them with --skip, or choose a recipe without an output shift."
    if options_for(model, paths) is None:
        held = set[str]().union(*(biased_layers(model, options) or () for options in OPTIONS))
        missing = [path for path in paths if path not in held]
        raise PlanError(
            f"recipe {recipe!r} freezes its shift into biases, and {type(model).__name__} has no bias for "
            f"{len(missing)} of {len(paths)} tensors, the first is {missing[0]}. {advice}"
        )
    if any(name.startswith("gguf") for name in targets):
        allowed = LLAMA_CPP_BIASES.get(str(config.model_type), frozenset())
        missing = [path for path in paths if not any(path.endswith(suffix) for suffix in allowed)]
        if missing:
            raise PlanError(
                f"recipe {recipe!r} freezes its shift into biases, and llama.cpp loads none for {len(missing)} of "
                f"{len(paths)} tensors of {config.model_type}, the first is {missing[0]}. {advice}"
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
