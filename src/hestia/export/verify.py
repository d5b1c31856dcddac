"""Verification: the written file is read back and compared with the frozen model, then run.

Three questions, in this order:

1. Is every byte what the frozen model says? Codes and scales of quantized tensors, bytes of kept ones, metadata:
   ``huggingface_check``, ``gguf_check``, ``mlx_check``. One line a difference.
2. Does its tokenizer cut text as the parent's does? ``tokenizer_check``, on strings that break tokenizers.
3. Do others who load the file compute the same? ``engines``: transformers must give the frozen model's logits to
   ``LOGIT_TOLERANCE``; engines that round what weights are multiplied with must stay within the divergence that a
   PyTorch emulation of just that rounding gives for this model and text (``activations``), in KL and in perplexity.

A file that cannot be read at all raises VerifyError at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import VerifyError
from ..files import read_json
from ..targets import is_gguf
from ..targets import target as target_named
from .frozen import CODES_FILE, REFITS_FOLDER, FrozenModel

PROBE_FILE = "verification_text.json"
"""Held-out tokens that the run keeps, on which files are run."""

_PROBE_TOKENS = 32


@dataclass(frozen=True)
class Verification:
    """What a verification found.

    Attributes:
        target: the file format, ``hf`` or ``gguf:...``.
        codes_equal: the file holds exactly the frozen model: codes, scales, kept tensors, configuration, tokenizer.
        differences: one line each, naming the tensor or file; empty when all is well.
        max_abs_logit_diff: largest difference of a logit, frozen model against engine; None if none was run.
        kl: mean KL(frozen || engine) in nats a position; None if none was run.
        engine: what ran the file, with its version.
        notes: what was not checked, and why; files in a folder that no loader reads.
        details: what else was measured: ``kl_emulated`` and ``kl_bound``, ``nll`` of frozen model, engine and emulation
            with its bound, ``tokens``, ``tokenizer`` (strings compared), ``head_nll_change`` where embeddings or head
            are rounded.
    """

    target: str
    codes_equal: bool
    differences: tuple[str, ...]
    max_abs_logit_diff: float | None
    kl: float | None
    engine: str | None
    notes: tuple[str, ...]
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """No difference was found, neither in the file nor in what the engine computed."""
        return self.codes_equal and not self.differences

    def to_json(self) -> dict[str, Any]:
        """The ``verify`` object of report.json."""
        return {
            "ok": self.ok,
            "codes_equal": self.codes_equal,
            "max_abs_logit_diff": self.max_abs_logit_diff,
            "kl": self.kl,
            "engine": self.engine,
            "differences": list(self.differences),
            "notes": list(self.notes),
            **self.details,
        }


def verify(
    path: Path, run: Path, *, target: str | None = None, token_ids: Tensor | None = None, engine: bool = True
) -> Verification:
    """Compare an exported file with the frozen model of a run, then compare what it computes.

    Args:
        path: an exported folder or .gguf file.
        run: the run's folder.
        target: its file format; None finds out (a folder says it itself, a .gguf file is what the run recorded or, if
            it recorded none, what the file says).
        token_ids: int64 ``[B, T]`` of text to compute logits on; None takes the held-out text that the run keeps, or 32
            fixed pseudo-random tokens where it keeps none.
        engine: False compares the bytes alone.

    Raises:
        VerifyError: the file is missing, damaged, not hestia's, or cannot be loaded by its engine.
        ConfigError: the run has no frozen model.
    """
    path, run = Path(path), Path(run)
    if not path.exists():
        raise VerifyError(f"{path}: no such file or folder")
    name = target_named(target).name if target else detect_target(path, run)
    frozen = FrozenModel(_home(path, run))
    if path.is_dir() != (not is_gguf(name)):
        raise VerifyError(f"{path}: a {'folder' if path.is_dir() else 'single file'} cannot be {name}")
    differences = check(path, frozen, name)
    codes_equal = not differences
    notes = _bystanders(path, frozen) if path.is_dir() else []
    largest = kl = used = None
    details: dict[str, Any] = {}
    if not codes_equal:
        notes.append("the file differs: it was not run")
    elif not engine:
        notes.append("engine check skipped on request")
    else:
        from . import engines  # here, because it imports transformers

        if frozen.run != run:
            notes.append(f"compared with the refitted model in {frozen.run}, as the run recorded")
        text = token_ids if token_ids is not None else kept_text(run)
        ran = engines.run(path, frozen, name, probe(frozen) if text is None else text)
        largest, kl, used = ran.max_abs_logit_diff, ran.kl, ran.engine
        differences += ran.differences
        notes += ran.notes
        details |= ran.details
        if text is None and used is not None:
            details = {key: value for key, value in details.items() if key not in ("nll", "head_nll_change")}
            notes.append(f"run on pseudo-random tokens, because {run} keeps no {PROBE_FILE}: no perplexity")
    if is_gguf(name) and codes_equal and "head_nll_change" not in details:
        from .gguf_check import rounded_tensors  # where no engine has told what that costs

        notes += rounded_tensors(path, frozen, name)
    return Verification(
        target=name,
        codes_equal=codes_equal,
        differences=tuple(differences),
        max_abs_logit_diff=largest,
        kl=kl,
        engine=used,
        notes=tuple(notes),
        details=details,
    )


def require_ok(verification: Verification) -> None:
    """Do nothing for a good file.

    Raises:
        VerifyError: the file differs; the message holds the first difference, which names the tensor.
    """
    if not verification.ok:
        first, *rest = verification.differences
        more = f" (and {len(rest)} more)" if rest else ""
        raise VerifyError(f"{verification.target} is not the frozen model: {first}{more}")


def check(path: Path, frozen: FrozenModel, target: str) -> list[str]:
    """All differences between a file and the frozen model, one line each; empty if there is none.

    Raises:
        VerifyError: the file cannot be read.
    """
    if is_gguf(target):
        from .gguf_check import check_gguf

        return check_gguf(path, frozen, target)
    if target == "mlx":
        from .mlx_check import check_mlx

        return check_mlx(path, frozen)
    from .huggingface_check import check_hf

    return check_hf(path, frozen, bits=4 if target == "hf:int4" else 2)


def _bystanders(path: Path, frozen: FrozenModel) -> list[str]:
    from .huggingface_check import file_notes

    return file_notes(path, frozen.folder)


def detect_target(path: Path, run: Path) -> str:
    """The target of an exported file.

    A folder says it in its config.json. A .gguf file is looked up in the run's report.json, then asked itself.

    Raises:
        VerifyError: neither a folder with a config.json nor a .gguf file that says what it is.
    """
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise VerifyError(f"{path}: no config.json in this folder, so it is not an exported model")
        return _folder_target(path)
    if path.suffix != ".gguf":
        raise VerifyError(f"{path}: neither an exported folder nor a .gguf file")
    entry = _recorded(path, run)
    if entry is not None:
        return target_named(str(entry.get("target"))).name
    from .gguf_check import file_target

    return file_target(path)


def _recorded(path: Path, run: Path) -> dict[str, Any] | None:
    """The entry of the run's report.json for a file."""
    report = run / "report.json"
    exports = read_json(report).get("exports") if report.is_file() else None
    for entry in exports if isinstance(exports, list) else []:
        if not isinstance(entry, dict):
            continue
        recorded = Path(str(entry.get("path")))
        if path.resolve() in (recorded.resolve(), (run / recorded).resolve()):
            return entry
    return None


def _home(path: Path, run: Path) -> Path:
    """The folder of the frozen model that a file holds: the run, or a refit of it that was made for this file."""
    refit = (_recorded(path, run) or {}).get("refit")
    return run / REFITS_FOLDER / str(refit["folder"]) if isinstance(refit, dict) else run


def _folder_target(path: Path) -> str:
    try:
        config = read_json(path / "config.json")
    except ValueError as error:
        raise VerifyError(str(error)) from None
    if "quantization" in config:
        return "mlx"
    try:
        bits = config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"]
    except (KeyError, TypeError):
        return "hf"
    return "hf:int4" if bits == 4 else "hf"


def run_of(path: Path) -> Path | None:
    """The run whose folder a file lies in, RUN/exports/...; None for a file elsewhere."""
    return next((parent for parent in path.resolve().parents if (parent / CODES_FILE).is_file()), None)


def kept_text(run: Path) -> Tensor | None:
    """The held-out tokens ``[B, T]`` that the run keeps for this; None where it keeps none."""
    file = run / PROBE_FILE
    return torch.tensor(read_json(file, schema=1)["input_ids"]) if file.is_file() else None


def probe(frozen: FrozenModel) -> Tensor:
    """Pseudo-random tokens ``[1, 32]``, the same on every machine: what is compared is arithmetic, not language."""
    vocabulary = int(frozen.config.get("vocab_size", 256))
    return (torch.arange(_PROBE_TOKENS) * 7919 % vocabulary).unsqueeze(0)
