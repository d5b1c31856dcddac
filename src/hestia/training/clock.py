"""The only clock: what moves a converted model's knobs to t = step / steps, and serves two ports after every step.

``QATCallback`` is this in a Trainer; a loop of one's own calls it like a scheduler of the learning rate:

    clock = hestia.Clock(model, plan, steps)
    model.train()
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        clock.step(optimizer)
        optimizer.zero_grad()
    codes = hestia.freeze(model)
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..nn import QuantLinear, knobs_of, quantized_modules
from ..nn.shards import whole
from ..plans import LayerPlan, Plan
from ..quant import Correction, WeightedRule

_NARROW = (torch.bfloat16, torch.float16)


class Clock:
    """Pressure and temperature of one model over its training; nothing else in hestia knows the step.

    Step k of ``steps`` (from 0) trains at t = k / steps; after the last the knobs stand at t = 1.

    Args:
        model: converted by ``hestia.apply(model, plan)``.
        plan: that very plan; its schedule is followed.
        steps: optimizer steps of the whole training, or 0 where all of it lies behind.
        done: steps that were taken before: of a run that goes on.

    Raises:
        ConfigError: the model was not converted, or by another plan; steps under 0.

    Warns:
        UserWarning: parameters train in bf16 or fp16.
    """

    def __init__(self, model: nn.Module, plan: Plan, steps: int, done: int = 0) -> None:
        _require_same(model, plan)
        if steps < 0 or done < 0:
            raise ConfigError(f"a clock of {steps} steps, {done} of them done: neither can be negative")
        self.plan, self.steps, self.done = plan, steps, done
        self._layers = [layer for _, layer in quantized_modules(model)]
        self._unseen = dict(quantized_modules(model))  # until the first step has been looked at
        self._knobs = knobs_of(model)
        self._weighted = any(isinstance(layer.quantizer.spec.scale, WeightedRule) for layer in self._layers)
        narrow = sum(p.numel() for p in model.parameters() if p.requires_grad and p.dtype in _NARROW)
        if narrow:
            warnings.warn(
                f"{narrow:,} of the parameters that train are bf16 or fp16, in which small updates vanish: load the "
                "parent with dtype=torch.float32; autocast (bf16=True of the Trainer) computes in bf16 all the same",
                stacklevel=2,
            )
        self.at(done)

    @property
    def t(self) -> float:
        """The share of training that is done, 0 to 1."""
        return self.done / self.steps if self.steps > 0 else 1.0

    def at(self, done: int) -> None:
        """Move the knobs to where ``done`` steps have been taken."""
        self.done = done
        self._knobs.set(**self.plan.schedule.at(self.t))

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """After the optimizer's step, before gradients are dropped: serve the ports, and move on to the next step.

        Raises:
            ConfigError: the model is in eval mode, where quantized weights get no gradient; or as ``serve``.
        """
        if not any(layer.training for layer in self._layers):
            raise ConfigError("model.train() first: in eval mode quantized weights are rounded, and get no gradient")
        self.serve(optimizer)
        self.at(self.done + 1)

    def serve(self, optimizer: Any) -> None:
        """Hand Adam's second moment to the layers that weigh by it, then pull, each where the plan asks for it.

        Raises:
            ConfigError: a weight trains unrounded (after the first step); see ``hand_over_importance`` and ``correct``.
        """
        if getattr(optimizer, "step_was_skipped", False):  # an fp16 gradient overflowed: nothing moved
            return
        _require_asked(self._unseen)
        self._unseen = {}
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        if self._weighted:
            hand_over_importance(self._layers, optimizer, self.done)
        correction = self.plan.correction
        if correction is not None and correction.active(self.t):
            correct(self._layers, optimizer, correction, self.t)


def _require_same(model: nn.Module, plan: Plan) -> None:
    knobs, ours = knobs_of(model), dict(quantized_modules(model))
    paths = list(plan.layers)
    if set(paths) == set(ours):  # wrappers, as of activation checkpoints, put their own names into the paths
        ours = {path: ours[path] for path in paths}
    for (path, layer), planned in zip_longest(ours.items(), plan.layers.values(), fillvalue=("", None)):
        if not isinstance(layer, QuantLinear) or not isinstance(planned, LayerPlan) or not _alike(layer, planned):
            raise ConfigError(f"{path}: the model was converted by another plan than the one given here; give its own")
    if (knobs.residual is not None) != ("residual" in plan.schedule.at(0.0)):
        raise ConfigError("the model was converted by a plan of another schedule than the one given here; give its own")


def _require_asked(layers: Mapping[str, QuantLinear]) -> None:
    """Refuse a weight that got a gradient past its layer: fused kernels take weights and leave the layer out.

    Only where a layer beside it was asked: in a compiled graph none says that it was. The children of a list may rest,
    and get the gradient of another process.
    """
    asked = {path.rpartition(".")[0] for path, layer in layers.items() if layer.asked}
    for path, layer in layers.items():
        parent, _, name = path.rpartition(".")
        if layer.weight.grad is not None and not layer.asked and parent in asked and not name.isdecimal():
            raise ConfigError(
                f"{path}: the module around it reads its weight past the layer, as fused kernels do, so it would train "
                f"unrounded and be rounded at the end; plan without it: --skip '*.{name}' (skip='*.{name}' in Python)"
            )


def _alike(layer: QuantLinear, planned: LayerPlan) -> bool:
    shape = (layer.out_features, layer.in_features)
    ours = (shape, layer.quantizer.spec, layer.temperature_factor)
    return ours == (planned.shape, planned.spec, planned.temperature_factor)


@torch.no_grad()
def hand_over_importance(layers: Iterable[QuantLinear], optimizer: torch.optim.Optimizer, step: int) -> None:
    """Copy Adam's second moment of every weight into the layer that weighs by it, every so many steps of its rule.

    The copy is part of the layer's state, so evaluation, freezing and a resumed run see the very same numbers.

    Args:
        layers: those without an importance are passed over.
        optimizer: one that keeps ``exp_avg_sq``; layers that it does not train keep a uniform importance.
        step: the step that was just taken, from 0.

    Raises:
        ConfigError: it moved a weight and keeps no ``exp_avg_sq`` of it.
    """
    for layer in layers:
        rule, held = layer.quantizer.spec.scale, layer.held
        if not isinstance(rule, WeightedRule) or held is None or step + 1 < rule.warmup or (step + 1) % rule.every:
            continue
        moment = optimizer.state.get(layer.weight, {}).get("exp_avg_sq")
        if moment is not None:
            held.copy_(whole(moment))
        elif layer.weight.grad is not None and id(layer.weight) in _rates(optimizer):
            raise ConfigError(
                f"the scale rule {rule.name!r} weighs by Adam's second moment, and {type(optimizer).__name__} keeps no "
                f"exp_avg_sq of a weight {tuple(layer.weight.shape)} that it trains: use torch.optim.AdamW, or a "
                "recipe without importance"
            )


@torch.no_grad()
def correct(layers: Iterable[QuantLinear], optimizer: torch.optim.Optimizer, correction: Correction, t: float) -> None:
    """Apply a correction to the weights that the optimizer trains, each at the rate of its own group.

    Raises:
        ConfigError: it trains none of them.
    """
    layers, rates = list(layers), _rates(optimizer)
    trained = [layer for layer in layers if id(layer.weight) in rates]
    if layers and not trained:
        raise ConfigError(
            f"the correction {correction.name!r} moves the weights that the optimizer trains, and "
            f"{type(optimizer).__name__} has none of the {len(layers)} quantized ones in its param_groups: give it "
            "the model's own parameters, or plan without a correction"
        )
    for layer in trained:
        state = optimizer.state.get(layer.weight, {})
        correction(layer.weight, layer.unsnapped(), state, rates[id(layer.weight)], t)


def _rates(optimizer: torch.optim.Optimizer) -> dict[int, float]:
    """id of every parameter that the optimizer trains -> its learning rate."""
    return {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
