"""What stops a run: NaN and Inf by name, signals with the run saved."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_training import At, converted, log_rows, trainer

import hestia
from hestia.errors import GuardError
from hestia.nn import knobs_of, quantized_modules
from hestia.training import Interrupted, checkpoints
from hestia.training.guards import StopSignals, bad_state, first_bad
from hestia.training.watch import SpikeWatch, collapsed, collapsed_layers

TENSOR = "model.layers.1.mlp.up_proj.weight"


def _poison_weight(value: float) -> Callable[[Any], None]:
    def poison(model: Any) -> None:
        with torch.no_grad():
            model.get_parameter(TENSOR)[3, 5] = value

    return poison


def _poison_gradient(value: float) -> Callable[[Any], None]:
    def poison(model: Any) -> None:
        model.get_parameter(TENSOR).register_hook(lambda grad: torch.full_like(grad, value))

    return poison


@pytest.mark.parametrize("recipe", ["hestia", "quasar"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_loss_names_the_first_bad_weight_and_the_last_checkpoint(
    tmp_path: Path, value: float, recipe: str
) -> None:
    model, plan = converted(recipe=recipe)
    work = trainer(tmp_path, model, plan, save_every=2, callbacks=[At(3, _poison_weight(value))])
    with pytest.raises(GuardError) as caught:
        work.fit()
    message = str(caught.value)
    assert caught.value.exit_status == 4
    assert "step 4: the loss is nan" in message
    assert f"the first bad weight is {TENSOR} ({'NaN' if value != value else 'infinity'})" in message
    checkpoint = checkpoints.newest(tmp_path / "checkpoints")
    assert str(checkpoint) in message
    assert checkpoint is not None
    assert checkpoint.name == "step-000002"
    fresh, _ = converted(recipe=recipe)
    checkpoints.load_model(checkpoint, fresh)
    assert first_bad(list(fresh.named_parameters())) is None
    assert [row["step"] for row in log_rows(tmp_path) if "loss" in row] == [1, 2, 3]


@pytest.mark.parametrize("clip", [1.0, 0.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_gradient_stops_before_the_weights_move(tmp_path: Path, value: float, clip: float) -> None:
    model, plan = converted()
    before: dict[str, torch.Tensor] = {}

    def remember(model: Any) -> None:
        before.update({name: p.detach().clone() for name, p in model.named_parameters()})
        _poison_gradient(value)(model)

    work = trainer(tmp_path, model, plan, save_every=1, clip=clip, callbacks=[At(2, remember)])
    with pytest.raises(GuardError) as caught:
        work.fit()
    message = str(caught.value)
    assert message.startswith("step 3: gradients are not finite; ")
    assert f"the first bad one is that of {TENSOR} ({'NaN' if value != value else 'infinity'})" in message
    assert str(tmp_path / "checkpoints" / "step-000002") in message
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_a_loss_that_is_bad_while_all_weights_are_good(tmp_path: Path) -> None:
    model, plan = converted()

    def spoil_logits(model: Any) -> None:
        model.lm_head.register_forward_hook(lambda _, __, out: out * float("nan"))

    with pytest.raises(GuardError, match=r"all weights are still finite\. No checkpoint was written yet"):
        trainer(tmp_path, model, plan, callbacks=[At(1, spoil_logits)]).fit()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_bad_weight_never_reaches_a_checkpoint(tmp_path: Path, value: float) -> None:
    """It appears after the backward pass of step 4, as an optimizer or a correction could leave it."""
    model, plan = converted()
    work = trainer(tmp_path, model, plan, save_every=2, callbacks=[At(4, _poison_weight(value), end=True)])
    with pytest.raises(GuardError) as caught:
        work.fit()
    kind = "NaN" if value != value else "infinity"
    assert f"step 4: the model is not finite; the first bad weight is {TENSOR} ({kind})" in str(caught.value)
    assert str(tmp_path / "checkpoints" / "step-000002") in str(caught.value)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]


def test_a_weight_that_turns_bad_in_the_last_step_stops_the_run_too(tmp_path: Path) -> None:
    model, plan = converted()
    with pytest.raises(GuardError, match=f"step 6: the model is not finite; the first bad weight is {TENSOR}"):
        trainer(tmp_path, model, plan, callbacks=[At(6, _poison_weight(float("nan")), end=True)]).fit()


def test_bad_knobs_buffers_and_scales_are_told_apart() -> None:
    model, _ = converted()
    assert bad_state(model) is None
    knobs_of(model).set(pressure=1.0, temperature=float("nan"))
    assert bad_state(model) == "the temperature is nan"
    knobs_of(model).set(pressure=float("inf"), temperature=0.1)
    assert bad_state(model) == "the pressure is inf"
    knobs_of(model).set(pressure=1.0, temperature=0.1)
    layer = dict(quantized_modules(model))["model.layers.1.mlp.up_proj"]
    layer.temperature_factor = float("nan")
    assert bad_state(model) == "the temperature of model.layers.1.mlp.up_proj is nan"
    layer.temperature_factor = 1.0
    with torch.no_grad():
        layer.weight.fill_(3e38)  # finite, and the mean of their absolute values is not
    assert bad_state(model) == "the first bad scale is that of model.layers.1.mlp.up_proj (infinity)"
    model, _ = converted(recipe="lsq")
    name = next(name for name, _ in model.named_parameters() if "._hestia." in name)
    with torch.no_grad():
        model.get_parameter(name).fill_(float("nan"))
    assert bad_state(model) == f"the first bad weight is {name} (NaN)"


def test_a_bad_temperature_is_named_when_it_spoils_the_loss(tmp_path: Path) -> None:
    model, plan = converted()

    def spoil(model: Any) -> None:
        for _, layer in quantized_modules(model):
            layer.temperature_factor = float("nan")

    with pytest.raises(
        GuardError, match=r"the loss is nan; the temperature of model\.layers\.0\.self_attn\.q_proj is nan"
    ):
        trainer(tmp_path, model, plan, steps=20, callbacks=[At(10, spoil)]).fit()


def test_a_loss_spike_is_reported_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("hestia.training.trainer.announce", said.append)
    model, plan = converted()

    def jolt(model: Any) -> None:
        with torch.no_grad():
            model.lm_head.weight.mul_(-3.0)

    trainer(tmp_path, model, plan, steps=24, callbacks=[At(21, jolt)]).fit()
    rows = [row for row in log_rows(tmp_path) if "loss_spike" in row]
    assert [row["step"] for row in rows][:1] == [22]
    assert rows[0]["loss_spike"] > 1.2 * rows[0]["highest_before"]
    assert said[0].startswith("step 22: the loss jumped to ")
    assert log_rows(tmp_path)[-1]["step"] == 24


def test_the_last_step_under_rising_pressure_is_not_watched(tmp_path: Path) -> None:
    """Step 6 of 10 trained at t = 5/10, where the pressure has just become 1."""
    model, plan = converted(rho=0.5)
    work = trainer(tmp_path, model, plan, steps=10)
    watched: list[int] = []
    work._spikes.add = lambda loss: watched.append(work.state.global_step)  # type: ignore[method-assign,return-value]
    work.fit()
    assert watched == [6, 7, 8, 9, 10]


@given(losses=st.lists(st.floats(0.01, 10.0), min_size=1, max_size=60))
def test_spikes_are_what_they_are_said_to_be(losses: list[float]) -> None:
    watch, again = SpikeWatch(), SpikeWatch()
    for step, loss in enumerate(losses):
        before = losses[max(0, step - 16) : step]
        expected = len(before) == 16 and loss > max(before) + 0.2 * max(before)
        found = watch.add(loss)
        assert (found is not None) == expected
        assert found is None or found == max(before)
        again.memory = watch.memory  # as a resumed run does
        assert again.memory == watch.memory


def test_a_slow_rise_is_no_spike() -> None:
    watch = SpikeWatch()
    assert all(watch.add(2.0 + 0.1 * step) is None for step in range(60))


def test_collapsed_codes_are_reported_by_name_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("hestia.training.trainer.announce", said.append)
    model, plan = converted()

    def collapse(model: Any) -> None:
        with torch.no_grad():
            model.get_parameter(TENSOR).abs_()

    trainer(tmp_path, model, plan, eval_every=1, learning_rate=1e-5, callbacks=[At(3, collapse)]).fit()
    path = TENSOR.removesuffix(".weight")
    assert said == [f"step 4: {path}: codes collapsed: none negative"]
    assert [row["collapsed"] for row in log_rows(tmp_path) if "collapsed" in row] == [{path: "none negative"}]


def test_every_way_to_collapse() -> None:
    model, _ = converted()
    knobs_of(model).set(pressure=1.0, temperature=0.0)
    paths = [path for path, _ in quantized_modules(model)][:3]
    with torch.no_grad():
        model.get_submodule(paths[0]).weight.zero_()
        model.get_submodule(paths[1]).weight.abs_().neg_()
    assert collapsed_layers(model) == {paths[0]: "all zero", paths[1]: "none positive"}
    assert collapsed(hestia.freeze(model)) == {paths[0]: "all zero", paths[1]: "none positive"}


@pytest.fixture
def heard() -> Iterator[None]:
    """SIGHUP counts, as in a terminal, also where the tests themselves run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_saves_and_stops_after_the_step(tmp_path: Path, number: int, status: int, heard: None) -> None:
    model, plan = converted()
    previous = signal.getsignal(number)
    config: dict[str, Any] = {"save_every": 100, "steps": 6}
    work = trainer(tmp_path, model, plan, callbacks=[At(2, lambda _: os.kill(os.getpid(), number))], **config)
    with pytest.raises(Interrupted) as caught:
        work.fit()
    assert caught.value.exit_status == status
    assert "stopped at step 3 of 6" in str(caught.value)
    assert "--resume" in str(caught.value)
    assert signal.getsignal(number) is previous
    checkpoint = checkpoints.newest(tmp_path / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.name == "step-000003"

    whole, plan = converted()
    trainer(tmp_path / "whole", whole, plan, **config).fit()
    resumed, plan = converted()
    trainer(tmp_path, resumed, plan, **config).fit(checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_under_nohup_a_lost_terminal_stops_nothing(tmp_path: Path) -> None:
    model, plan = converted()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        callback = At(2, lambda _: os.kill(os.getpid(), signal.SIGHUP))
        trainer(tmp_path, model, plan, callbacks=[callback], steps=4).fit()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_trainer_that_never_saves_does_not_save_on_a_signal_either(tmp_path: Path) -> None:
    """A pilot's weights must not be mistaken for the run's."""
    model, plan = converted()
    stop = At(2, lambda _: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted, match="nothing to save"):
        trainer(tmp_path, model, plan, log_every=0, callbacks=[stop]).fit()
    assert checkpoints.newest(tmp_path / "checkpoints") is None


def test_a_signal_in_the_last_step_lets_the_run_end_well(tmp_path: Path) -> None:
    model, plan = converted()
    work = trainer(tmp_path, model, plan, callbacks=[At(5, lambda _: os.kill(os.getpid(), signal.SIGINT))])
    work.fit()
    assert log_rows(tmp_path)[-1]["step"] == 6
    assert work.stopped == 130, "the caller is told, and stops after what is left to save"


def test_a_log_that_cannot_be_written_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, plan = converted()
    monkeypatch.setattr("hestia.progress._enabled", True)
    work = trainer(tmp_path, model, plan)
    (tmp_path / "log.jsonl").mkdir()
    work.fit()
    assert work.state.global_step == work.config.steps
    assert capsys.readouterr().err.count("log.jsonl: a line could not be written") == 1


@pytest.fixture
def ordinary_ctrl_c() -> Iterator[None]:
    """Python's own Ctrl-C, also where the shell that started the tests ignores it (a job in the background)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ordinary_ctrl_c")
def test_the_second_signal_is_not_caught() -> None:
    with pytest.raises(KeyboardInterrupt), StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.requested == 130
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    entered: list[bool] = []

    def work() -> None:
        with StopSignals() as signals:
            entered.append(signals.requested is None)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered == [True]


def test_a_bad_buffer_is_found_and_named() -> None:
    model, _ = converted()
    model.register_buffer("odd", torch.tensor([1.0, math.nan]))
    assert bad_state(model) == "the first bad buffer is odd (NaN)"


def test_after_a_line_that_failed_the_next_begins_on_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk takes half a line, without its end."""
    from hestia.training import logfile

    log = tmp_path / "log.jsonl"
    logfile.append_row(log, {"step": 1})

    class Full:
        def __enter__(self) -> Full:
            return self

        def __exit__(self, *exception: object) -> None:
            raise OSError(28, "No space left on device")

        def write(self, text: str) -> None:
            with log.open("a") as handle:
                handle.write(text[:4])

    said: list[str] = []
    monkeypatch.setattr(logfile, "announce", said.append)
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", lambda *given, **more: Full())
        logfile.append_row(log, {"step": 2})
        logfile.append_row(log, {"step": 3})
    logfile.append_row(log, {"step": 4})
    lines = log.read_text().splitlines()
    assert [lines[0], lines[-1]] == ['{"step": 1}', '{"step": 4}'] and len(said) == 1
