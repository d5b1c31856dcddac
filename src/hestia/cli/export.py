"""``hestia export RUN --to TARGET --out PATH``: a frozen model in another file format, read back and compared."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import ConfigError
from ..files import require_writable
from .shared import json_option, show


@click.command(name="export")
@click.argument("run")
@click.option("--to", "target", required=True, metavar="TARGET", help="file format, such as hf or gguf:tq2_0")
@click.option("--out", required=True, metavar="PATH", help="the folder (hf) or .gguf file to write")
@click.option("--fallback", is_flag=True, help="let single tensors use another exact type of the format")
@json_option
def command(run: str, target: str, out: str, fallback: bool, as_json: bool) -> None:
    """Write the frozen model of RUN as TARGET and verify the written file."""
    from ..export.frozen import FrozenModel
    from ..pipeline import export_and_verify
    from ..targets import target as find_target

    name = find_target(target).name
    path = Path(out)
    if path.exists():
        raise ConfigError(f"{path} exists already; choose another --out")
    require_writable(path)
    entry = export_and_verify(FrozenModel(Path(run)), name, path, fallback)
    checked = entry["verify"]
    engine = f", run in {checked['engine']}: KL {checked['kl']:.2g}" if checked["engine"] else ""
    show(entry, as_json, f"{path}: {entry['bytes']:,} bytes, codes equal{engine}")
