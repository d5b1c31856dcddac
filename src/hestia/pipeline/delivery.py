"""The last stages: files in the formats that engines load, each read back, compared and run."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import curvature, loading
from ..export import export_model
from ..export.frozen import FrozenModel
from ..export.refit import refit as refit_scales
from ..export.verify import PROBE_FILE, kept_text, require_ok, verify
from ..files import read_json, sha256, write_json
from ..lock import locked
from ..plans import Plan
from ..progress import announce as say
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


def deliver(work: Workspace, plan: Plan, name: str, frozen: FrozenModel) -> dict[str, Any]:
    path = work.folder / EXPORTS_FOLDER / name.replace(":", "-")
    if name.startswith("gguf"):
        model = loading.display_name(work.source).rpartition("/")[2]
        path = path / f"{model}-{name.split(':')[1]}.gguf"
    probe, o = _verification_text(work), work.options
    fallback = o.fallback or plan.falls_back(name)  # a plan made beforehand was allowed to where it does
    return work.clock.measure("export", lambda: export_and_verify(frozen, name, path, fallback, probe, head=o.head))


def export_and_verify(
    frozen: FrozenModel,
    target: str,
    path: Path,
    fallback: bool,
    token_ids: Tensor | None = None,
    *,
    head: str = "auto",
    refit: bool = False,
) -> dict[str, Any]:
    """Write one file, read it back, compare, run it on ``token_ids``, and return its entry of report.json.

    Args:
        frozen: the run's frozen model.
        target: the file format.
        path: the folder or file to write.
        fallback: let single tensors use another exact type of the format.
        token_ids: text to run the file on; None takes what the run keeps.
        head: how a GGUF file stores embedding and head.
        refit: re-fit scales that are too fine for the target; the entry then says what that cost.

    Raises:
        ExportError: the format cannot hold the model exactly; nothing was written.
        VerifyError: the written file differs from the frozen model.
    """
    if path.is_dir():
        shutil.rmtree(path)  # an earlier attempt of this very run
    path.unlink(missing_ok=True)
    run, changed = frozen.run, None
    if refit:
        traces = None
        if (run / SENSITIVITY_FILE).is_file():
            traces = curvature.Sensitivity.load(run / SENSITIVITY_FILE).traces
        text = token_ids if token_ids is not None else kept_text(run)
        say(f"re-fitting scales to {target}")
        changed = refit_scales(frozen, find_target(target), traces, text)
        if changed is not None:
            frozen = FrozenModel(changed.folder)
            token_ids = text
    say(f"exporting {target}")
    entry = export_model(frozen, target, path, fallback=fallback, head=head)
    result = verify(path, frozen.run, target=target, token_ids=token_ids if token_ids is not None else kept_text(run))
    require_ok(result)
    entry |= {"path": os.path.relpath(path, run), "sha256": digest(path), "verify": result.to_json()}
    return entry if changed is None else {**entry, "refit": changed.to_json()}


def record_export(run: Path, entry: dict[str, Any]) -> None:
    """Put an export that was made after the run into its report and model card, if it has them."""
    if not (run / REPORT_FILE).is_file():
        return
    with locked(run, wait=30.0):
        _record(run, entry)


def _record(run: Path, entry: dict[str, Any]) -> None:
    record = read_json(run / REPORT_FILE)
    others = [e for e in record.get("exports", []) if e.get("path") != entry["path"]]
    publish(run, {**record, "exports": [*others, entry]})


def digest(path: Path) -> str:
    """SHA-256 of a file; of a folder, over the names and hashes of its files."""
    if path.is_file():
        return sha256(path)
    listing = "".join(f"{p.relative_to(path)} {sha256(p)}\n" for p in sorted(path.rglob("*")) if p.is_file())
    return hashlib.sha256(listing.encode()).hexdigest()


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
