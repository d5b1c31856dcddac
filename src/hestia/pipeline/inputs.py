"""What a run began with, so that it is never resumed with something else under the same name.

RUN/inputs.json    digests of the parent, the teacher, the text and a given sensitivity.json
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import loading
from ..data.sources import Source, fingerprint, resolve
from ..errors import ConfigError
from ..files import read_json, sha256, write_json
from ..training.fingerprints import differences, plain, summary
from .artefacts import INPUTS_FILE
from .workspace import HUB, Workspace

SCHEMA = 1


def check_inputs(work: Workspace) -> None:
    """Refuse to continue a run whose inputs have changed since it began.

    Raises:
        ConfigError: they have; what differs is named.
    """
    path = work.folder / INPUTS_FILE
    if not path.is_file():
        return
    before: Any = read_json(path, schema=SCHEMA).get("inputs")
    o, kept = work.options, work.hub_data()
    data, eval_data = ({given: _text(given, kept) for given in names} for names in (o.data, o.eval_data))
    now = plain(_inputs(work, data, eval_data))
    for key in ("data", "eval_data") if isinstance(before, dict) else ():
        now[key] = _as_before(before.get(key), now[key])
    found = differences(before, now)
    if found:
        raise ConfigError(
            f"{work.folder}: the run began with other inputs: {summary(found)}. Give it back what it began with, "
            "or choose another --out"
        )


def keep_inputs(work: Workspace) -> None:
    """Write down what this run begins with, unless an earlier call did."""
    path = work.folder / INPUTS_FILE
    if not path.is_file():
        record = work.text.record  # its digests are those of the text that was read
        data, eval_data = (
            {entry["given"]: _named(resolve(entry["given"]), entry["files"]) for entry in record[key] or ()}
            for key in ("data", "eval_data")
        )
        write_json(path, {"schema": SCHEMA, "inputs": _inputs(work, data, eval_data)})


def _inputs(work: Workspace, data: dict[str, Any], eval_data: dict[str, Any]) -> dict[str, Any]:
    o = work.options
    return {
        "model": loading.fingerprint(work.source),
        "teacher": None if work.teacher is None else loading.fingerprint(work.teacher),
        "data": data,
        "eval_data": eval_data,
        "sensitivity": None if o.sensitivity is None else sha256(Path(o.sensitivity)),
    }


def _text(given: str, kept: Mapping[str, Any]) -> dict[str, Any]:
    """What pins a source today; a hub data set is read at the commit that the run began with, so it is that."""
    source = resolve(given)
    return _named(source, [kept[given]] if source.kind == "hub" and given in kept else fingerprint(source))


def _named(source: Source, files: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Digest by path within the source, or what the hub says of it."""
    if source.path is None:
        return {HUB: files[0]}
    folder = source.path if source.path.is_dir() else source.path.parent
    return {Path(file["path"]).relative_to(folder).as_posix(): file["sha256"] for file in files}


def _as_before(before: Any, now: dict[str, Any]) -> dict[str, Any]:
    """``now`` as it was named before: sources as they were typed then, files by their last names where they were."""
    if not isinstance(before, dict):
        return now
    typed = {Path(given).resolve(): given for given in before}
    named: dict[str, Any] = {}
    for given, files in now.items():
        then = given if given in before else typed.get(Path(given).resolve(), given)
        kept = before.get(then)
        by_last_name = isinstance(kept, dict) and not any("/" in name for name in kept)
        named[then] = {Path(name).name: digest for name, digest in files.items()} if by_last_name else files
    return named
