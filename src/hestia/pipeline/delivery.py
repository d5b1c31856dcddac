"""The last stages: files in the formats that engines load, each read back, compared and run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import curvature, loading
from ..errors import ExportError, PlanError, VerifyError
from ..export import export_model, require_free
from ..export.frozen import FrozenModel
from ..export.gguf_layout import Parent
from ..export.refit import refit as refit_scales
from ..export.verify import PROBE_FILE, kept_text, require_ok, verify
from ..files import (
    read_json,
    replacing,
    replacing_folder,
    sha256,
    sha256_of_files,
    sha256_of_listing,
    write_json,
)
from ..lock import locked
from ..plans import Plan
from ..progress import announce as say
from ..report.fields import text as encodable
from ..targets import is_gguf
from ..targets import target as find_target
from .artefacts import EXPORTS_FOLDER, REPORT_FILE, SENSITIVITY_FILE
from .record import publish
from .workspace import Workspace

PROBE_TOKENS = 128
"""Held-out tokens a sequence on which an exported file's logits are compared, at most."""

PROBE_ROWS = 4
PROBE_LOGITS = 1 << 25
"""Sequences, and logits of all of them together, at most: a large vocabulary gets fewer."""


def probe_shape(tokens: int, vocabulary: int) -> tuple[int, int]:
    """Sequences and tokens of each, cut from blocks of ``tokens``, on which an exported file is run."""
    tokens = min(PROBE_TOKENS, tokens)
    return max(1, min(PROBE_ROWS, PROBE_LOGITS // (tokens * vocabulary))), tokens


def deliver(work: Workspace, plan: Plan, name: str, frozen: FrozenModel, before: Iterable[Any] = ()) -> dict[str, Any]:
    """The entry of one of the run's own files, which replaces an earlier one once it is whole and verified.

    Args:
        work: the run.
        plan: its plan.
        name: the file format.
        frozen: its frozen model.
        before: entries of report.json; one that still holds is returned as it is, and nothing is written.

    Raises:
        ExportError, PlanError, VerifyError: as ``export_and_verify``; an earlier file is as it was.
    """
    path = own_place(work, name)
    standing = next((entry for entry in before if _stands(entry, name, path, frozen)), None)
    if standing is not None:
        say(f"{name}: {path} is there, as it was verified")
        return standing
    probe, o = _verification_text(work), work.options
    fallback = o.fallback or plan.falls_back(name)  # a plan made beforehand was allowed to where it does
    parent = _parent(loading.describe(work.source, work.config), loading.license_of(work.source))

    def write() -> dict[str, Any]:
        with (replacing if is_gguf(name) else replacing_folder)(path) as beside:
            try:
                entry = export_and_verify(frozen, name, beside, fallback, probe, head=o.head, parent=parent)
            except (ExportError, PlanError, VerifyError) as error:
                raise type(error)(str(error).replace(str(beside), str(path))) from None
        return {**entry, "path": os.path.relpath(path, frozen.run)}

    try:
        return work.stopwatch.measure("export", write)
    finally:
        with contextlib.suppress(OSError):
            path.parent.rmdir()  # where nothing came of it


def own_place(work: Workspace, name: str) -> Path:
    """Where a run keeps its file of a format: a folder, or in one a .gguf file with the parent's name."""
    folder = work.folder / EXPORTS_FOLDER / name.replace(":", "-")
    if not is_gguf(name):
        return folder
    return folder / f"{loading.display_name(work.source).rpartition('/')[2]}-{name.split(':')[1]}.gguf"


def _stands(entry: Any, name: str, path: Path, frozen: FrozenModel) -> bool:
    """Whether an entry of report.json is of this very file, which was verified against this frozen model."""
    if not isinstance(entry, dict) or not isinstance(entry.get("verify"), dict) or "refit" in entry:
        return False
    wanted = {"target": name, "path": os.path.relpath(path, frozen.run), "frozen_identity": frozen.identity}
    if entry["verify"].get("ok") is not True or any(entry.get(key) != value for key, value in wanted.items()):
        return False
    if not path.exists():
        return False
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    return sum(f.stat().st_size for f in files) == entry.get("bytes") and digest(path) == entry.get("sha256")


def export_and_verify(
    frozen: FrozenModel,
    target: str,
    path: Path,
    fallback: bool,
    token_ids: Tensor | None = None,
    *,
    head: str = "auto",
    refit: bool = False,
    parent: Parent | None = None,
) -> dict[str, Any]:
    """Write one file, read it back, compare, run it on ``token_ids``, and return its entry of report.json.

    Args:
        frozen: the run's frozen model.
        target: the file format.
        path: the folder or file to write; nothing is there yet, or an empty folder.
        fallback: let single tensors use another exact type of the format.
        token_ids: text to run the file on; None takes what the run keeps.
        head: how a GGUF file stores embedding and head.
        refit: re-fit scales that are too fine for the target; the entry then says what that cost.
        parent: what a GGUF file tells of the model that was quantized; None asks the run's report.

    Raises:
        ExportError: the format cannot hold the model exactly, or ``path`` is taken; nothing was written.
        VerifyError: the written file differs from the frozen model.
    """
    require_free(path)
    run, changed = frozen.run, None
    parent = parent or _recorded_parent(run)
    if refit:
        traces = None
        if (run / SENSITIVITY_FILE).is_file():
            found = curvature.Sensitivity.load(run / SENSITIVITY_FILE)
            if found.primary == "trace":  # a divergence or an eigenvalue is none
                traces = {path: t.value if t.signed else t.trace for path, t in found.tensors.items()}
        text = token_ids if token_ids is not None else kept_text(run)
        say(f"re-fitting scales to {target}")
        changed = refit_scales(frozen, find_target(target), traces, text)
        if changed is not None:
            frozen = FrozenModel(changed.folder)
            token_ids = text
    say(f"exporting {target}")
    entry = export_model(frozen, target, path, fallback=fallback, head=head, parent=parent)
    result = verify(path, frozen.run, target=target, token_ids=token_ids if token_ids is not None else kept_text(run))
    require_ok(result)
    entry |= {"path": os.path.relpath(path, run), "verify": result.to_json(), "frozen_identity": frozen.identity}
    return entry if changed is None else {**entry, "refit": changed.to_json()}


def _recorded_parent(run: Path) -> Parent | None:
    """The parent as a finished run's report names it."""
    record = read_json(run / REPORT_FILE) if (run / REPORT_FILE).is_file() else {}
    return _parent(record.get("model"), record.get("license"))


def _parent(model: Any, license_: Any) -> Parent | None:
    """The parent by its record (``loading.fingerprint``) and licence; only what comes from the hub has a commit."""
    name = encodable(model.get("name")) if isinstance(model, dict) else ""
    if not name:
        return None
    from_hub = model.get("commit") is not None and name.count("/") == 1
    return Parent(name.split("/")[-1], name if from_hub else None, encodable(license_) or None)


def record_export(run: Path, entry: dict[str, Any]) -> None:
    """Put an export that was made after the run into its report and model card, if it has them."""
    if not (run / REPORT_FILE).is_file():
        return
    with locked(run, wait=30.0):
        _record(run, entry)


def _record(run: Path, entry: dict[str, Any]) -> None:
    record = read_json(run / REPORT_FILE)
    there = record.get("exports", [])
    exports = [entry if e.get("path") == entry["path"] else e for e in there]
    exports += [] if entry in exports else [entry]
    refused = {name: why for name, why in (record.pop("refused", None) or {}).items() if name != entry["target"]}
    publish(run, {**record, "exports": exports, **({"refused": refused} if refused else {})})


def digest(path: Path) -> str:
    """The ``sha256`` of an export: of a file its own, of a folder that of its listing."""
    return sha256(path) if path.is_file() else sha256_of_listing(sha256_of_files(path))


def _verification_text(work: Workspace) -> Tensor:
    """Held-out tokens on which exported files are run; the run keeps them for ``hestia verify``."""
    kept = kept_text(work.folder)
    if kept is not None:
        return kept
    vocabulary = int(getattr(work.config.get_text_config(), "vocab_size", 1 << 17))
    rows, tokens = probe_shape(work.scored.input_ids.shape[1], vocabulary)
    probe = work.scored.input_ids[:rows, :tokens].long()
    write_json(work.folder / PROBE_FILE, {"schema": 1, "input_ids": probe.tolist()})
    return probe
