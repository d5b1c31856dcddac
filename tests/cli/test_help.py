"""Help, version and usage errors: quick, and one message that says what to write instead."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_type_hints

import click
import pytest
from toy_runs import Invoke

from hestia.cli import export, verify
from hestia.cli.main import VERBS, cli, spread
from hestia.cli.shared import options_from
from hestia.options import PLANNING, Options


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_help_page(verb: str, invoke: Invoke) -> None:
    status, out, err = invoke(verb, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"Usage: hestia {verb}")
    assert "--help" in out


def test_the_main_help_names_every_verb(invoke: Invoke) -> None:
    for flag in ("--help", "-h"):
        status, out, _ = invoke(flag)
        assert status == 0
        assert all(f"\n  {verb} " in out for verb in VERBS)


def test_quantize_takes_every_option_of_the_job(invoke: Invoke) -> None:
    _, out, _ = invoke("quantize", "--help")
    flags = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(Options)} - {"--model", "--options"}
    for flag in flags | {"--option", "--config", "--resume", "--json"}:
        assert f"{flag} " in out, flag


@pytest.mark.parametrize(
    ("verb", "flags"),
    [
        ("calibrate", "--data --calibrate --skip --out --seq-len --seed --device --json"),
        (
            "plan",
            "--sensitivity --recipe --option --target --bits --widths --max-kl --group-size --skip --fallback --out",
        ),
        ("train", "--plan --data --out --lr --tokens --resume --config --json"),
        ("export", "--to --out --list --fallback --head --refit --json"),
        ("estimate", "--processes --plan --bits --json"),
        ("bench", "--prompt-tokens --tokens --rounds --threads --out --json"),
        ("verify", "--against --target --no-engine --json"),
        ("eval", "--data --against --tasks --tasks-dir --limit --protocol --eval-tokens --json"),
        ("demo", "--out --tokens --threads --json"),
    ],
)
def test_a_verb_lists_its_options(verb: str, flags: str, invoke: Invoke) -> None:
    _, out, _ = invoke(verb, "--help")
    for flag in flags.split():
        assert f"{flag} " in out, flag


def test_train_offers_nothing_that_its_plan_has_decided(invoke: Invoke) -> None:
    _, out, _ = invoke("train", "--help")
    for name in PLANNING:
        assert f"--{name.replace('_', '-')} " not in out, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantise"], "unknown command 'quantise': did you mean 'quantize'?"),
        (["quantize", "--tokenz", "3"], "--tokens"),
        (["plan"], "MODEL is missing"),
        (["calibrate", "--data", "d.txt"], "MODEL is missing"),
        (["quantize", "m", "--seed", "x"], "--seed"),
        (["train", "m"], "--plan"),
        (["export", "run"], "--to TARGET and --out PATH, or --list"),
        (["run", "a.gguf", "--json"], "--json needs --prompt"),
        (["export", "run", "--out", "x"], "--to"),
        (["eval", "m", "--protocol", "other"], "--protocol"),
        (["quantize"], "MODEL is missing"),
        (["quantize", "m"], "--data is missing"),
        (["quantize", "m", "--data", "d.txt"], "--out is missing"),
        (["recipes", "list"], "hestia recipes show NAME"),
        (["eval", "m"], "nothing to evaluate on"),
        (["eval", "m", "--tasks", "t", "--against", "p"], "--against compares on --data"),
        (["quantize", "--data", "d.txt", "m", "--out", "r"], "MODEL is missing: write it first"),
        (["demo", "--tokens", "lots"], "--tokens must be a positive number such as 600k"),
    ],
)
def test_bad_usage_is_one_message_and_exit_status_2(arguments: list[str], message: str, invoke: Invoke) -> None:
    status, out, err = invoke(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("hestia: ")
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_no_arguments_show_the_help(invoke: Invoke) -> None:
    status, out, err = invoke()
    assert status == 2
    assert "quantize" in out + err


def test_several_values_after_one_option() -> None:
    assert spread(["quantize", "m", "--data", "a", "b", "c", "--out", "r", "--target", "hf", "gguf:q4_0"]) == [
        "quantize", "m", "--data", "a", "--data", "b", "--data", "c", "--out", "r", "--target", "hf", "--target",
        "gguf:q4_0",
    ]  # fmt: skip
    assert spread(["eval", "m", "--data", "a", "--data", "b"]) == ["eval", "m", "--data", "a", "--data", "b"]
    several = [
        f"--{name.replace('_', '-')}" for name, hint in get_type_hints(Options).items() if hint == tuple[str, ...]
    ]
    assert "--widths" in several
    for flag in several:
        assert spread(["quantize", "m", flag, "a", "b"]) == ["quantize", "m", flag, "a", flag, "b"]


def test_an_option_of_one_value_leaves_the_argument_behind_it_alone() -> None:
    words = spread(["export", "--to", "gguf:tq2_0", "RUN", "--out", "m.gguf"])
    assert export.command.make_context("export", words[1:]).params["run"] == "RUN"
    words = spread(["verify", "--target", "gguf:tq2_0", "m.gguf"])
    assert verify.command.make_context("verify", words[1:]).params["path"] == "m.gguf"


@pytest.mark.parametrize("verb", ["plan", "calibrate", "eval"])
def test_a_verb_speaks_of_its_own_output_and_text(verb: str, invoke: Invoke) -> None:
    page = " ".join(invoke(verb, "--help")[1].split())
    assert "the run's folder" not in page
    assert {
        "plan": "the JSON file to write; default plan.json",
        "calibrate": "the JSON file to write; default sensitivity.json",
        "eval": "most tokens of --data to score, evenly spread",
    }[verb] in page
    assert verb != "eval" or "training text" not in page


def test_importing_hestia_and_reading_help_load_nothing_heavy() -> None:
    code = (
        "import sys, hestia; assert not {'torch', 'transformers'} & set(sys.modules)\n"
        "assert 'quantize' in dir(hestia)\n"
        "from hestia.cli.main import main\n"
        "assert main(['--help']) == 0\n"
        "assert main(['quantize', '--help']) == 0\n"
        "assert not {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)\n"
        "import hestia.recipes; hestia.recipes.names()\n"
        "assert 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_public_name_resolves() -> None:
    import hestia

    for name in hestia.__all__:
        assert getattr(hestia, name).__module__.startswith("hestia."), name
    with pytest.raises(AttributeError, match="no attribute 'qantize'"):
        _ = hestia.qantize


def test_help_comes_at_once() -> None:
    best = min(_seconds([sys.executable, "-m", "hestia", "--help"]) for _ in range(3))
    assert best < 1.5


def test_what_a_configuration_switches_on_can_be_switched_off(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("gradient_checkpointing: true\ncompile: true\n", encoding="utf-8")
    command = cli.get_command(click.Context(cli), "quantize")
    assert command is not None
    for typed, expected in (([], True), (["--no-gradient-checkpointing"], False), (["--gradient-checkpointing"], True)):
        words = command.make_context("quantize", ["m", *typed]).params
        options = {
            key: value for key, value in words.items() if key in {field.name for field in dataclasses.fields(Options)}
        }
        found = options_from(str(file), options)
        assert (found.gradient_checkpointing, found.compile) == (expected, True)


def _seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, capture_output=True, check=True)
    return time.perf_counter() - started


def test_a_sigterm_outside_of_training_leaves_with_143(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stack unwinds, so that temporary files are removed; training itself saves first (see test_guards)."""
    from hestia.cli import main as module

    tidied: list[bool] = []

    def work() -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            tidied.append(True)
        return 0

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(module, "main", work)
    try:
        with pytest.raises(SystemExit) as caught:
            module.run()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught.value.code == 143
    assert tidied == [True]
