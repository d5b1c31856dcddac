"""What a run began with, so that it is never resumed with something else under the same name.

RUN/inputs.json    digests of the parent, the teacher, the text and a given sensitivity.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import loading
from ..data.sources import fingerprint, resolve
from ..errors import ConfigError
from ..files import read_json, sha256, write_json
from ..training.fingerprints import differences, plain, summary
from .artefacts import INPUTS_FILE
from .workspace import Workspace

SCHEMA = 1


def check_inputs(work: Workspace) -> None:
    """Refuse to continue a run whose inputs have changed since it began.

    Raises:
        ConfigError: they have; what differs is named.
    """
    path = work.folder / INPUTS_FILE
    if not path.is_file():
        return
    before = read_json(path, schema=SCHEMA)
    found = differences(before.get("inputs"), plain(_inputs(work)))
    if found:
        raise ConfigError(
            f"{work.folder}: the run began with other inputs: {summary(found)}. Give it back what it began with, "
            "or choose another --out"
        )


def keep_inputs(work: Workspace) -> None:
    """Write down what this run begins with, unless an earlier call did."""
    path = work.folder / INPUTS_FILE
    if not path.is_file():
        write_json(path, {"schema": SCHEMA, "inputs": _inputs(work)})


def _inputs(work: Workspace) -> dict[str, Any]:
    o = work.options
    return {
        "model": loading.content(work.source),
        "teacher": None if work.teacher is None else loading.content(work.teacher),
        "data": {given: _text(given) for given in o.data},
        "eval_data": {given: _text(given) for given in o.eval_data},
        "sensitivity": None if o.sensitivity is None else sha256(Path(o.sensitivity)),
    }


def _text(given: str) -> dict[str, Any]:
    """Name -> digest of every file of a source, or what the hub says of it."""
    files = fingerprint(resolve(given))
    return {Path(str(file.get("path", "hub"))).name: file.get("sha256", file) for file in files}
