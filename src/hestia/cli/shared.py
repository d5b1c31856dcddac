"""What the verbs share: command-line options made from ``Options``, and printing results."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import click

from ..errors import ConfigError
from ..files import finite, require_writable
from ..options import PLANNING, SECTIONS, Options, load_config

F = TypeVar("F", bound=Callable[..., Any])

DATA = ("data", "eval_data", "separator", "text_column", "joiner", "held_out_share", "seq_len", "seed")
MACHINE = ("device", "threads", "trust_remote_code")
A_RUNS_OWN = ("out", "plan", "plan_sha256")
"""Keys of a run's file that a verb with an output of its own does not follow."""


class JobCommand(click.Command):
    """A verb whose help page lists the job's options by what they are about, and its own behind them."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = [parameter for parameter in self.get_params(ctx) if isinstance(parameter, click.Option)]
        rows = {o.name: record for o in options if (record := o.get_help_record(ctx)) is not None}
        sections = {title: [rows.pop(name) for name in names if name in rows] for title, names in SECTIONS.items()}
        for title, listed in {**sections, "Options of this command": list(rows.values())}.items():
            if listed:
                with formatter.section(title):
                    formatter.write_dl(listed)


def job_options(names: Iterable[str] | None = None, leave_out: Iterable[str] = (), **texts: str) -> Callable[[F], F]:
    """Add an option for every named field of ``Options`` (all without ``names``), with the field's help text.

    ``texts`` are those of a verb that means something else by a field.

    Nothing is filled in for an option that was not typed, so that ``--config`` can.
    """
    hints = typing.get_type_hints(Options)
    wanted = None if names is None else set(names)
    left_out = {"model", *leave_out}

    def decorate(function: F) -> F:
        for item in reversed(fields(Options)):
            if item.name in left_out or (wanted is not None and item.name not in wanted):
                continue
            text = texts.get(item.name, str(item.metadata["help"]))
            function = _option(item.name, hints[item.name], item.default, text)(function)
        return function

    return decorate


def _option(name: str, hint: Any, default: Any, text: str) -> Callable[[F], F]:
    flag = "--option" if name == "options" else f"--{name.replace('_', '-')}"
    kinds = [
        k for k in (typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)) if k is not type(None)
    ]
    kind = kinds[0]
    if kind is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=text)
    shown = "" if default in (None, "", ()) or name == "options" else f"  [default: {_shown(default)}]"
    if typing.get_origin(kind) is not None:
        metavar = "KEY=VALUE" if name == "options" else None
        return click.option(flag, name, multiple=True, default=None, metavar=metavar, help=text + shown)
    click_type = kind if kind in (int, float) else str
    return click.option(flag, name, type=click_type, default=None, help=text + shown)


def _shown(default: Any) -> str:
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def options_from(config: str | None, typed: dict[str, Any], leave_out: Iterable[str] = ()) -> Options:
    """The options: what was typed, over the configuration file, over the defaults.

    Recipe options are taken one by one; those of a file that names another recipe than was typed are left out. A typed
    --tokens or --bits also takes the place of the file's steps or max_kl.

    Args:
        config: the file, if there is one.
        typed: option -> value; None and () were not typed.
        leave_out: keys of the file that mean something else to this verb.

    Raises:
        ConfigError: an unknown key or a bad value; options that leave each other nothing to say.
    """
    if config == "":
        raise ConfigError("--config is empty; name a YAML file, or leave it out")
    values = {} if config is None else load_config(Path(config))
    typed = {key: value for key, value in typed.items() if value is not None and value != ()}
    if "plan" in leave_out and values.get("plan") is not None and not typed.keys() & set(PLANNING):
        raise ConfigError(
            f"{config} follows {values['plan']}, and says nothing of what that plan decided; give those options here, "
            "or take `plan` out of it"
        )
    values = {key: value for key, value in values.items() if key not in leave_out}
    _check_typed(typed, plan=typed.get("plan", values.get("plan")))
    for key, rival in {"tokens": "steps", "bits": "max_kl"}.items():
        if key in typed:
            values.pop(rival, None)
    if typed.get("recipe") not in (None, values.get("recipe", Options.recipe)):
        values.pop("options", None)
    for key, value in typed.items():
        if key == "options":
            there = values.get(key) or {}
            value = {**there, **recipe_options(value)} if isinstance(there, Mapping) else there  # refused with a reason
        values[key] = value
    options = Options(**values)
    _check_effect(options, typed)
    return options


def _check_typed(typed: Mapping[str, Any], *, plan: Any) -> None:
    """Refuse what was typed in vain: two answers to one question, or an answer that something else has given.

    Raises:
        ConfigError: it was.
    """
    for one, other in (("steps", "tokens"), ("max_kl", "bits")):
        if one in typed and other in typed:
            raise ConfigError(f"--{one.replace('_', '-')} is instead of --{other}; leave one of them out")
    decided = ["--option" if k == "options" else f"--{k.replace('_', '-')}" for k in typed if k in PLANNING]
    if plan is not None and decided:
        raise ConfigError(f"--plan {plan} has decided {', '.join(decided)}; leave it out, or plan again with it")


def _check_effect(options: Options, typed: Iterable[str]) -> None:
    """Refuse what was typed and nothing reads, as the other options are.

    Raises:
        ConfigError: there is such an option.
    """
    gguf = options.plan is not None or any(name.startswith("gguf:") for name in options.target)  # without torch
    unread = (
        (not gguf, ("head",), "no .gguf file is asked for"),
        (options.teacher is None, ("distill", "distill_weight", "distill_noise"), "there is no teacher"),
        (options.second_stage is None, ("second_factor",), "there is no --second-stage"),
        (options.embeddings == "freeze", ("embedding_rate",), "embeddings are frozen"),
        (bool(options.eval_data), ("held_out_share",), "--eval-data is the held-out text"),
        (options.sensitivity is not None, ("estimator",), "--sensitivity is read instead of measured"),
    )
    for holds, names, why in unread:
        vain = [f"--{name.replace('_', '-')}" for name in names if name in typed]
        if holds and vain:
            raise ConfigError(f"{why}, so {', '.join(vain)} says nothing; leave it out")


def recipe_options(pairs: Iterable[str]) -> dict[str, Any]:
    """``("alpha=0", "centred=true")`` as values: JSON where it parses, text otherwise.

    Raises:
        ConfigError: a pair without an equals sign.
    """
    out: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(f"--option wants KEY=VALUE, got {pair!r}")
        try:
            out[key.strip()] = json.loads(text)
        except json.JSONDecodeError:
            out[key.strip()] = text
    return out


def show(record: dict[str, Any], as_json: bool, text: str) -> None:
    """The result on standard output: one JSON object, or text for people."""
    click.echo(json.dumps(finite(record), ensure_ascii=False, allow_nan=False) if as_json else text)


def require_model(options: Options) -> None:
    """Refuse options, typed and of a file, that name no model.

    Raises:
        ConfigError: they do not.
    """
    if not options.model:
        raise ConfigError("MODEL is missing: a folder or a hub id, here or in --config")


def output_file(name: str, beside: Iterable[str] = ()) -> Path:
    """The JSON file that a verb writes when its work is done; refused now rather than then.

    Args:
        name: what --out says.
        beside: endings of further files that the verb writes; those of an earlier NAME.json are replaced, others not.

    Raises:
        ConfigError: it is a folder or no .json, cannot be created, or something else's file would be overwritten.
    """
    path = Path(name)
    if path.is_dir():
        raise ConfigError(f"--out {path} is a folder; name a file in it")
    if path.suffix != ".json":
        raise ConfigError(f"--out {path}: the file is JSON; name it {path.with_suffix('.json')}")
    taken = next((other for ending in beside if (other := path.with_suffix(ending)).exists()), None)
    if taken is not None and not path.exists():
        raise ConfigError(
            f"--out {path}: {taken}, which would be written beside it, is there already; choose another name"
        )
    require_writable(path)
    return path


json_option = click.option("--json", "as_json", is_flag=True, help="print the result as one JSON object")
threads_option = click.option("--threads", type=click.IntRange(min=1), help="CPU threads  [default: all it may use]")
gpu_layers_option = click.option(
    "--gpu-layers", type=click.IntRange(min=-1), default=0, show_default=True, help="layers on the GPU; -1: all"
)
config_option = click.option("--config", metavar="FILE", help="YAML file with the same keys as these options")
dry_run_option = click.option("--dry-run", is_flag=True, help="check everything, say what would be done, write nothing")
resume_option = click.option("--resume", is_flag=True, help="continue the run in --out, or start it where none is")
