"""``hestia verify PATH [--against RUN]``: is the file the model that was trained?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import ConfigError, VerifyError
from .shared import json_option, show


@click.command(name="verify")
@click.argument("path")
@click.option("--against", "run", metavar="RUN", help="the run that the file comes from; else the one it lies in")
@click.option("--target", help="the file's format, where it cannot be told from the run")
@click.option("--samples", is_flag=True, help="also print greedy text of a .gguf file beside the frozen model's")
@click.option("--no-engine", is_flag=True, help="compare the bytes alone, run nothing")
@json_option
def command(path: str, run: str | None, target: str | None, samples: bool, no_engine: bool, as_json: bool) -> None:
    """Compare every tensor, all metadata and the tokenizer of PATH with the frozen model of RUN, then run both.

    A .gguf file without a RUN is compared with what it says of itself: the run it names, the hash of that run's codes,
    and the hash of its own bytes.
    """
    from ..export.verify import require_ok, run_of, verify

    file = Path(path)
    if not file.exists():
        raise ConfigError(f"{path}: no such file or folder")
    home = Path(run) if run is not None else run_of(file)
    if samples:
        _check_samples(file, home)
    if home is None:
        _alone(file, as_json)
        return
    result = verify(file, home, target=target, engine=not no_engine)
    lines = [f"{path}: {result.target} of run {home.name}, codes equal: {'yes' if result.codes_equal else 'NO'}"]
    if result.engine:
        lines.append(f"{result.engine}: largest logit difference {result.max_abs_logit_diff:.2g}, KL {result.kl:.2g}")
    more = result.details
    if "kl_bound" in more:
        lines[-1] += f" (its rounding explains {more['kl_emulated']:.2g}, allowed {more['kl_bound']:.2g})"
    if "nll" in more:
        nll = more["nll"]
        lines.append(
            f"NLL on {more['tokens']} held-out tokens: {nll['engine']:.5f} in the engine, {nll['frozen']:.5f} frozen "
            f"(difference allowed: {nll['bound']:.2g})"
        )
    if "tokenizer" in more:
        lines.append(
            f"tokenizer: {more['tokenizer']['equal']} of {more['tokenizer']['strings']} hard strings cut alike"
        )
    if "head_nll_change" in more:
        lines.append(f"rounding embedding and head moves the NLL by {more['head_nll_change']:+.2g} nats per token")
    lines += [*result.notes, *result.differences[:10]]
    record: dict[str, Any] = {"path": path, "run": str(home), **result.to_json()}
    if samples and result.ok:
        record["samples"] = greedy_samples(file, home)
        for sample in record["samples"]:
            lines += ["", f"prompt     {sample['prompt']}", f"frozen     {sample['frozen']}"]
            lines.append(f"llama.cpp  {sample['llama.cpp']}")
    show(record, as_json, "\n".join(lines))
    require_ok(result)


def _check_samples(file: Path, run: Path | None) -> None:
    """Refuse --samples before anything is compared, where there is nothing to continue or nothing that continues.

    Raises:
        ConfigError: it is so.
    """
    from ..export import llama_cpp

    if run is None or not (run / "diagnostics.json").is_file():
        raise ConfigError("--samples continues the prompts of a run's diagnostics.json; there is none, leave it out")
    if file.suffix != ".gguf" or not llama_cpp.available():
        raise ConfigError("--samples has llama.cpp continue them: it needs a .gguf file and llama-cpp-python")


def _alone(path: Path, as_json: bool) -> None:
    """A .gguf file against its own claims."""
    from ..export.gguf_check import claims_of

    if path.is_dir():
        raise ConfigError(f"{path}: name the run it comes from with --against; only .gguf files name it themselves")
    claims = claims_of(path)
    types = ", ".join(f"{count} {name}" for name, count in claims.tensors.items())
    lines = [f"{path}: well-formed, {types}"]
    if claims.run is None:
        lines.append("it was not written by hestia, so there is nothing to compare it with")
    else:
        words = {True: "yes", False: "NO", None: "cannot be told, some quantized tensors are stored dense"}
        lines.append(f"says it is {claims.target} of run {claims.run!r}, codes {claims.codes_sha256}")
        lines.append(f"its blocks have these codes: {words[claims.codes_match]}")
        lines.append(f"its bytes are those that were written: {words[claims.file_matches]}")
    show({"path": str(path), **claims.to_json()}, as_json, "\n".join(lines))
    if not claims.ok:
        what = "its codes" if claims.codes_match is False else "its bytes"
        raise VerifyError(f"{path}: {what} are not those of run {claims.run!r} that it names")


def greedy_samples(path: Path, run: Path) -> list[dict[str, str]]:
    """The report's prompts, continued greedily by llama.cpp, beside what the frozen model wrote.

    Raises:
        ExportError: llama-cpp-python is not installed.
    """
    from ..evaluation.diagnostics import NEW_TOKENS
    from ..export import llama_cpp
    from ..files import read_json

    return [
        {
            "prompt": sample["prompt"],
            "frozen": sample["quantized"],
            "llama.cpp": llama_cpp.generate(path, sample["prompt"], NEW_TOKENS).text,
        }
        for sample in read_json(run / "diagnostics.json").get("samples", [])
    ]
