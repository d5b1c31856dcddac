"""``hestia eval MODEL_OR_FILE --data PATH... [--tasks ...] [--protocol hestia]``: how good is it."""

from __future__ import annotations

from typing import Any

import click

from .shared import DATA, MACHINE, JobCommand, job_options, json_option, options_from, show


@click.command(name="eval", cls=JobCommand)
@click.argument("model")
@click.option("--against", metavar="PARENT", help="also KL and top-1 agreement to this model")
@click.option("--tasks", multiple=True, help="lm-eval tasks (repeatable)")
@click.option("--tasks-dir", metavar="DIR", help="folder of NAME.jsonl files that --tasks names")
@click.option("--limit", type=int, help="items a task")
@click.option("--protocol", type=click.Choice(["hestia"]), help="the paper's packing of all of --data")
@job_options(
    (*DATA, *MACHINE, "eval_tokens"),
    leave_out=("eval_data", "held_out_share", "seed"),
    data="text to score: files, saved data sets or hub ids",
    eval_tokens="most tokens of --data to score, evenly spread",
    seq_len="tokens per block; default min(1024, the model's maximum), with --protocol hestia 2048",
)
@json_option
def command(
    model: str,
    against: str | None,
    tasks: tuple[str, ...],
    tasks_dir: str | None,
    limit: int | None,
    protocol: str | None,
    as_json: bool,
    **typed: Any,
) -> None:
    """Score MODEL (a folder, hub id, run or .gguf file) on --data, up to --eval-tokens of it, and on lm-eval tasks."""
    from ..jobs import evaluate_model

    if protocol is not None:
        compared = None if model.endswith(".gguf") else against  # a .gguf file takes its tokenizer from there
        others = {"--against": compared, "--joiner": typed["joiner"], "--eval-tokens": typed["eval_tokens"]}
        _check_protocol(bool(typed["data"]), others)
    options = options_from(None, {"model": model, **typed})
    record = evaluate_model(options, against=against, tasks=tasks, tasks_dir=tasks_dir, limit=limit, protocol=protocol)
    lines = []
    for name, value in record.items():
        if isinstance(value, dict):
            lines += [f"{name} {key}: {_number(item)}" for key, item in value.items()]
        else:
            lines.append(f"{name}: {_number(value)}")
    show(record, as_json, "\n".join(lines))


def _check_protocol(data: bool, others: dict[str, Any]) -> None:
    """Refuse what the paper's protocol would ignore."""
    if not data:
        raise click.UsageError("--protocol says how --data is scored; give that too")
    ignored = [flag for flag, value in others.items() if value is not None]
    if ignored:
        raise click.UsageError(f"--protocol packs and scores all of --data its own way; leave out {', '.join(ignored)}")


def _number(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_number(item)}" for key, item in value.items())
    return f"{value:.4f}" if isinstance(value, float) else str(value)
