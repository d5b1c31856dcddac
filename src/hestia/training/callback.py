"""The clock in a Trainer, TRL's included.

    plan = hestia.plan(model, recipe="hestia", target="gguf:tq2_0")
    hestia.apply(model, plan)
    trainer = Trainer(model, ..., callbacks=[hestia.QATCallback(plan)])

Nothing else in a Trainer needs to know of hestia.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..plans import Plan
from .clock import Clock


class QATCallback(TrainerCallback):
    """Moves pressure and base temperature before every step, and serves the plan's ports after the optimizer's.

    Step k of N (from 0) trains at t = k / N; after the last step the knobs stand at t = 1. A resumed run starts in the
    middle of its schedule.

    Args:
        plan: the plan that was applied; its schedule is followed.

    Raises:
        ConfigError: when training begins: the model was not converted, or by another plan.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._clock: Clock | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Start the clock where the run stands."""
        self._clock = Clock(model, self.plan, state.max_steps, state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the knobs to this step."""
        self._started().at(state.global_step)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Serve the ports; ``state.global_step`` is still the step that was just taken."""
        self._started().serve(optimizer)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the knobs where the run ended."""
        self._started().at(state.global_step)

    def _started(self) -> Clock:
        assert self._clock is not None, "the Trainer calls on_train_begin first"
        return self._clock
