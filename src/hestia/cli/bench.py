"""``hestia bench FILE...``: how fast .gguf files run in llama.cpp, side by side, and what memory allows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import ConfigError
from .shared import gpu_layers_option, json_option, output_file, show, threads_option


@click.command(name="bench")
@click.argument("files", nargs=-1, required=True)
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="tokens read at once")
@click.option("--tokens", type=click.IntRange(min=2), default=32, show_default=True, help="tokens written, one by one")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="times every file is measured")
@threads_option
@gpu_layers_option
@click.option("--out", metavar="FILE", help="also write the result as JSON")
@json_option
def command(
    files: tuple[str, ...],
    prompt_tokens: int,
    tokens: int,
    rounds: int,
    threads: int | None,
    gpu_layers: int,
    out: str | None,
    as_json: bool,
) -> None:
    """Measure prompt and decode speed of FILES in turn, several times, best of all rounds, in llama.cpp."""
    import torch

    from ..export.speed import compare_speed
    from ..files import write_json
    from ..provenance import command_line, machine, versions

    for file in files:
        if Path(file).suffix != ".gguf":
            raise ConfigError(f"{file}: not a .gguf file")
    path = None if out is None else output_file(out)
    record = compare_speed(
        [Path(f) for f in files],
        prompt_tokens=prompt_tokens,
        tokens=tokens,
        rounds=rounds,
        threads=threads,
        gpu_layers=gpu_layers,
    )
    if path is not None:
        where = {"command": command_line(), "versions": versions(), "machine": machine(torch.device("cpu"))}
        write_json(path, {**record, **where})
    show(record, as_json, table(record))


def table(record: dict[str, Any]) -> str:
    """The record of ``compare_speed`` for people."""
    threads, bandwidth = record["threads"], record["bandwidth_gb_per_s"]
    place = f"{threads} thread{'s' if threads > 1 else ''}"
    if bandwidth is None and not record["gpu_layers"]:
        place += ", memory's speed could not be measured: no bound is known"
    elif bandwidth is None:
        place += f", {'all' if record['gpu_layers'] < 0 else record['gpu_layers']} layers on the GPU: no bound is known"
    else:
        place += f", memory read at {bandwidth:.1f} GB/s; bound: bandwidth over the bytes that a token reads"
    width = max(len(row["name"]) for row in record["files"])
    lines = [
        place,
        f"{'file':<{width}} {'MB':>7} {'decode tok/s':>13} {'bound':>7} {'%':>4} {'x first':>8} {'prompt tok/s':>13}",
    ]
    for row in record["files"]:
        bound, share = ("-", "-")
        if row["share_of_bound"] is not None:
            bound, share = f"{row['bound_tokens_per_second']:.0f}", f"{100 * row['share_of_bound']:.0f}"
        lines.append(
            f"{row['name']:<{width}} {row['bytes'] / 1e6:>7.0f} {row['decode_tokens_per_second']:>13.1f} "
            f"{bound:>7} {share:>4} {row['times_first']:>8.2f} {row['prompt_tokens_per_second']:>13.0f}"
        )
    return "\n".join(lines)
