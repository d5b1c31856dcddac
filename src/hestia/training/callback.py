"""The only clock: a Trainer callback that moves the knobs to t = step / total.

It works with any Trainer, TRL's included:

    plan = hestia.plan(model, recipe="hestia", target="gguf:tq2_0")
    hestia.apply(model, plan)
    trainer = Trainer(model, ..., callbacks=[hestia.QATCallback(plan)])
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import ConfigError
from ..nn import QuantLinear, knobs_of, quantized_modules
from ..nn.shards import whole
from ..plans import Plan
from ..quant import Correction, WeightedRule


class QATCallback(TrainerCallback):
    """Sets pressure and base temperature before every step; nothing else in hestia knows the step.

    After the optimizer's step it serves two ports, where the plan has them: the layers get the optimizer's second
    moment as importance, and the correction pulls their latent weights.

    Args:
        plan: the plan that was applied; its schedule is followed.

    Step k of N (from 0) trains at t = k / N; after the last step the knobs stand at t = 1.
    """

    def __init__(self, plan: Plan) -> None:
        self.schedule = plan.schedule
        self.correction = plan.correction
        self._weighted = any(isinstance(layer.spec.scale, WeightedRule) for layer in plan.layers.values())

    def _move(self, model: Any, state: TrainerState) -> None:
        knobs_of(model).set(**self.schedule.at(_share(state)))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Refill the knobs: a resumed run starts in the middle of its schedule."""
        self._move(model, state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Move the knobs to this step."""
        self._move(model, state)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Hand over importance, then pull; ``state.global_step`` is still the step that was just taken."""
        if not self._weighted and self.correction is None:
            return
        skipped = getattr(optimizer, "step_was_skipped", False)  # an fp16 gradient overflowed: no moment yet
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        layers = [layer for _, layer in quantized_modules(model)]
        if self._weighted and not skipped:
            hand_over_importance(layers, optimizer, state.global_step)
        t = _share(state)
        if self.correction is not None and self.correction.active(t):
            correct(layers, optimizer, self.correction, t)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Leave the knobs where the run ended."""
        self._move(model, state)


def _share(state: TrainerState) -> float:
    return state.global_step / state.max_steps if state.max_steps > 0 else 1.0


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
        correction(layer.weight, layer.hard(), state, rates[id(layer.weight)], t)


def _rates(optimizer: torch.optim.Optimizer) -> dict[int, float]:
    """id of every parameter that the optimizer trains -> its learning rate."""
    return {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
