"""model + recipe + target + sensitivity -> Plan; refuses before any training what could not be delivered after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from . import recipes
from .curvature import Sensitivity
from .errors import PlanError
from .nn.biases import OPTIONS, biased_layers, options_for
from .nn.select import Selection, select
from .plans import LayerPlan, Plan
from .quant import GroupSize
from .recipes import Recipe
from .targets import LLAMA_CPP_BIASES
from .targets import target as find_target

SMALLEST_COVERAGE = 0.5


def plan(
    model: nn.Module,
    recipe: str | Recipe = "hestia",
    target: str | Sequence[str] = "hf",
    sensitivity: str | Path | Sensitivity | Mapping[str, float] | None = None,
    *,
    bits: float = 1.58,
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
        bits: 1, 1.58 or 2, as far as the recipe does them.
        group_size: weights that share a scale: an int, "row" or "tensor".
        skip: shell pattern or patterns of module paths to keep.
        fallback: let single tensors use another exact storage type of the target.
        allow_partial: accept a plan that leaves more than half of the non-embedding weights as they are.
        options: options of a recipe given by name.

    Raises:
        ConfigError: an unknown recipe, option, target or width.
        PlanError: a tensor that group size or target cannot hold, a pattern that matches nothing, a sensitivity of
            another model, or too few quantizable weights.
    """
    chosen = recipe if isinstance(recipe, Recipe) else recipes.get(recipe, **(options or {}))
    spec = chosen.spec_for(bits, group_size)
    targets = [find_target(name) for name in ([target] if isinstance(target, str) else target)]
    selection = select(model, skip)
    if not selection.candidates or (selection.coverage() < SMALLEST_COVERAGE and not allow_partial):
        raise PlanError(_refusal(selection))
    layers: dict[str, LayerPlan] = {}
    problems: dict[str, list[str]] = {}
    for path, linear in selection.candidates.items():
        shape = (linear.out_features, linear.in_features)
        try:
            spec.check_shape(shape)
            stored = {t.name: t.storage(spec.grid, group_size, shape, fallback=fallback).name for t in targets}
        except ValueError as error:
            problems.setdefault(str(error), []).append(path)
            continue
        layers[path] = LayerPlan(spec=spec, shape=shape, stored=stored)
    if problems:
        raise PlanError(_summary(problems))
    if spec.output_shift is not None:
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
    )
    if isinstance(sensitivity, (str, Path)):
        sensitivity = Sensitivity.load(Path(sensitivity))
    traces = sensitivity.values if isinstance(sensitivity, Sensitivity) else sensitivity
    if traces is None:
        return result
    _check_same_model(result, traces, sensitivity)
    return result.with_factors(chosen.temperature_factors({path: traces[path] for path in layers}))


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
