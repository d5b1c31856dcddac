"""The only clock: a Trainer callback that moves the knobs to t = step / total.

It works with any Trainer, TRL's included:

    plan = hestia.plan(model, recipe="hestia", target="gguf:tq2_0")
    hestia.apply(model, plan)
    trainer = Trainer(model, ..., callbacks=[hestia.QATCallback(plan)])
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..nn import knobs_of
from ..plans import Plan


class QATCallback(TrainerCallback):
    """Sets pressure and base temperature before every step; nothing else in hestia knows the step.

    Args:
        plan: the plan that was applied; its schedule is followed.

    Step k of N (from 0) trains at t = k / N; after the last step the knobs stand at t = 1.
    """

    def __init__(self, plan: Plan) -> None:
        self.schedule = plan.schedule

    def _move(self, model: Any, state: TrainerState) -> None:
        t = state.global_step / state.max_steps if state.max_steps > 0 else 1.0
        knobs_of(model).set(pressure=self.schedule.pressure(t), temperature=self.schedule.base_temperature(t))

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

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Leave the knobs where the run ended."""
        self._move(model, state)
