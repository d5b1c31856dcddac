"""``hestia export RUN --to TARGET --out PATH``: a frozen model in another file format, read back and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import ConfigError
from ..files import require_writable
from .shared import json_option, show


@click.command(name="export")
@click.argument("run", required=False)
@click.option("--to", "target", metavar="TARGET", help="file format, such as hf or gguf:tq2_0")
@click.option("--out", metavar="PATH", help="the folder (hf, mlx) or .gguf file to write")
@click.option("--list", "listing", is_flag=True, help="show what every target holds, and whether RUN fits")
@click.option("--fallback", is_flag=True, help="let single tensors use another exact type of the format")
@click.option(
    "--head", default="auto", show_default=True, help="embedding and head of a .gguf: auto, f16, bf16, q8_0, f32"
)
@click.option(
    "--refit", is_flag=True, help="re-fit scales that are too fine for TARGET; changes the model, and says how"
)
@json_option
def command(
    run: str | None,
    target: str | None,
    out: str | None,
    listing: bool,
    fallback: bool,
    head: str,
    refit: bool,
    as_json: bool,
) -> None:
    """Write the frozen model of RUN as TARGET and verify the written file."""
    from ..targets import head_type, is_gguf
    from ..targets import target as find_target

    if listing:
        rows = target_rows(run, fallback)
        show({"targets": rows}, as_json, target_table(rows))
        return
    if run is None or target is None or out is None:
        raise click.UsageError("export needs RUN, --to TARGET and --out PATH, or --list")
    from ..export.frozen import FrozenModel
    from ..pipeline import export_and_verify, record_export

    name, path = find_target(target).name, Path(out)
    if head_type(head) is not None and not is_gguf(name):
        raise ConfigError(f"--head {head} is of .gguf files, and {name} is a folder; leave it out")
    if is_gguf(name) != (path.suffix == ".gguf"):
        kind = "a file; name it NAME.gguf" if is_gguf(name) else "a folder; leave out .gguf"
        raise ConfigError(f"--out {path}: {name} is {kind}")
    if path.exists():
        raise ConfigError(f"{path} exists already; choose another --out")
    require_writable(path)
    frozen = FrozenModel(Path(run))
    entry = export_and_verify(frozen, name, path, fallback, head=head, refit=refit)
    try:
        record_export(frozen.run, entry)
    except (OSError, ConfigError) as error:  # someone else's run, or one that another process works on
        entry["not_recorded"] = str(error)
    show(entry, as_json, "\n".join(summary(path, entry)))


def summary(path: Path, entry: dict[str, Any]) -> list[str]:
    """The lines for people: size, proof, and whatever was given up."""
    checked = entry["verify"]
    engine = ""
    if checked["engine"]:
        engine = f", run in {checked['engine']}: largest logit difference {checked['max_abs_logit_diff']:.2g}"
        if checked.get("kl_bound"):
            engine += f", KL {checked['kl']:.2g} (its rounding explains {checked['kl_emulated']:.2g})"
    lines = [f"{path}: {entry['bytes']:,} bytes, codes equal{engine}"]
    kept = entry.get("head")
    if kept and not kept["exact"]:
        change = checked.get("head_nll_change")
        measured = "not measured" if change is None else f"{change:+.2g} nats per token"
        types = ", ".join(f"{name} {t['type']}" for name, t in kept["tensors"].items())
        lines.append(f"embedding and head are rounded ({types}): NLL {measured}")
    if entry.get("refit"):
        change = entry["refit"]["nll_change"]
        measured = "not measured, the run keeps no text" if change is None else f"{change:+.3g} nats per token"
        lines.append(
            f"REFITTED: {entry['refit']['tensors']} tensors to groups of {entry['refit']['group_size']}; NLL {measured}"
        )
    lines += [entry["caution"]] if "caution" in entry else []
    if "not_recorded" in entry:
        lines.append(f"written and verified; not entered into the run's report: {entry['not_recorded']}")
    return lines + list(checked["notes"])


def target_rows(run: str | None, fallback: bool) -> list[dict[str, Any]]:
    """The rows of ``hestia.targets.matrix``, with the quantized tensors and the model of a run if one is named.

    Raises:
        ConfigError: no plan there, or a frozen model that cannot be read.
    """
    from .. import loading
    from ..export.frozen import MODEL_FOLDER
    from ..export.precheck import refusals
    from ..plans import Plan
    from ..targets import matrix

    if run is None:
        return matrix()
    plan = Plan.load(Path(run) / "plan.json")
    tensors: list[tuple[str, Any, Any, tuple[int, int]]] = [
        (path, layer.spec.grid, layer.spec.group_size, layer.shape) for path, layer in plan.layers.items()
    ]
    rows = matrix(tensors, fallback=fallback, itemsize=plan.itemsize)
    model = Path(run) / MODEL_FOLDER
    if (model / "config.json").is_file():  # before training ends only the plan can be asked
        source = loading.config_source(str(model))
        refused = refusals(loading.load_config(source), model, model if (model / "tokenizer.json").is_file() else None)
        for row in rows:
            if row["fits"] is True:
                row["fits"] = refused.get(row["target"], True)
    return rows


def target_table(rows: list[dict[str, Any]]) -> str:
    """The matrix for people."""
    lines = [f"{'target':<11} {'levels':<30} {'groups held exactly':<28} {'bits':>6}  loads in"]
    for row in rows:
        groups = " ".join(map(str, row["groups"]))
        lines.append(
            f"{row['target']:<11} {row['levels']:<30} {groups:<28} {row['bits_per_weight']:>6.3f}  {row['engines']}"
        )
        if row["caution"]:
            lines.append(f"{'':<11} {row['caution']}")
        if row["fits"] is not None:
            lines.append(f"{'':<11} this run: {'fits' if row['fits'] is True else row['fits']}")
    return "\n".join(lines)
