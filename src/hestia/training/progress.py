"""The progress line of a run: loss, tokens per second, time left, temperature, saturated weights."""

from __future__ import annotations

from typing import Any

from rich.progress import Progress
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..progress import Lines, bar


class ProgressBar(TrainerCallback):
    """One bar for the whole run, written to standard error; its note is what was last logged.

    Args:
        description: text of the bar.
        loss: what the training loss is called; with a teacher it is not comparable with the hard loss.
    """

    def __init__(self, description: str, loss: str = "loss") -> None:
        self.description, self.loss = description, loss
        self._bar: Progress | None = None
        self._task: Any = None
        self._lines = Lines(description, None)
        self._note = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar at the current step."""
        self._lines = Lines(self.description, state.max_steps, state.global_step)
        self._bar = bar()
        self._bar.start()
        self._task = self._bar.add_task(self.description, total=state.max_steps, completed=state.global_step, note="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance by one step."""
        self._lines.at(state.global_step, self._note)
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the newest numbers."""
        if self._bar is None or not logs:
            return
        parts = []
        if "loss" in logs:
            parts.append(f"{self.loss} {logs['loss']:.3f}")
        if "hard_loss" in logs:
            parts.append(f"hard loss {logs['hard_loss']:.3f}")
        if "temperature_mean" in logs:
            parts.append(f"tau {logs['temperature_mean']:.3f}")
        if "saturated" in logs:
            parts.append(f"saturated {100 * logs['saturated']:.0f} %")
        if "tokens_per_second" in logs:
            parts.append(f"{logs['tokens_per_second']:,.0f} tok/s")
        if parts:
            self._note = ", ".join(parts)
            self._bar.update(self._task, note=self._note)

    def close(self) -> None:
        """Take the bar down; also after an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        self.close()
