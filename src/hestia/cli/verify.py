"""``hestia verify PATH --against RUN``: is the file the model that was trained?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import ConfigError
from .shared import json_option, show


@click.command(name="verify")
@click.argument("path")
@click.option("--against", "run", required=True, metavar="RUN", help="the run that the file comes from")
@click.option("--target", help="the file's format, where it cannot be told from the run")
@click.option("--samples", is_flag=True, help="also print greedy text of a .gguf file beside the frozen model's")
@click.option("--no-engine", is_flag=True, help="compare the bytes alone, run nothing")
@json_option
def command(path: str, run: str, target: str | None, samples: bool, no_engine: bool, as_json: bool) -> None:
    """Compare every tensor, all metadata and the tokenizer of PATH with the frozen model of RUN, then run both."""
    from ..export.verify import require_ok, verify

    if not Path(path).exists():
        raise ConfigError(f"{path}: no such file or folder")
    result = verify(Path(path), Path(run), target=target, engine=not no_engine)
    lines = [f"{path}: {result.target}, codes equal: {'yes' if result.codes_equal else 'NO'}"]
    if result.engine:
        lines.append(f"{result.engine}: largest logit difference {result.max_abs_logit_diff:.2g}, KL {result.kl:.2g}")
    lines += [*result.notes, *result.differences[:10]]
    record: dict[str, Any] = {"path": path, **result.to_json()}
    if samples and result.ok:
        record["samples"] = greedy_samples(Path(path), Path(run))
        for sample in record["samples"]:
            lines += ["", f"prompt     {sample['prompt']}", f"frozen     {sample['frozen']}"]
            lines.append(f"llama.cpp  {sample['llama.cpp']}")
    show(record, as_json, "\n".join(lines))
    require_ok(result)


def greedy_samples(path: Path, run: Path, tokens: int = 48) -> list[dict[str, str]]:
    """The report's prompts, continued greedily by llama.cpp, beside what the frozen model wrote.

    Raises:
        ExportError: llama-cpp-python is not installed.
    """
    from ..export import llama_cpp
    from ..files import read_json

    return [
        {
            "prompt": sample["prompt"],
            "frozen": sample["quantized"],
            "llama.cpp": llama_cpp.generate(path, sample["prompt"], tokens).text,
        }
        for sample in read_json(run / "diagnostics.json").get("samples", [])
    ]
