"""Verification: the written file is read back and compared with the frozen model, then run.

Two questions, in this order:

1. Is every byte what the frozen model says? Codes and scales of quantized tensors, bytes of kept ones, metadata,
   tokenizer: ``check_hf`` here, ``check_gguf`` beside its writer. One line a difference.
2. Do others who load the file compute the same? The folder through transformers, in fp32, must give the frozen
   model's logits to ``LOGIT_TOLERANCE``; llama.cpp rounds activations to 8 bits and must stay within the KL divergence
   that this explains (``llama_cpp.activation_kl_bound``).

``check_hf`` reads safetensors and JSON alone and decodes with its own arithmetic, so that a mistake of the exporter is
not repeated here. A file that cannot be read at all raises VerifyError at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ConfigError, ExportError, VerifyError
from ..files import read_json
from ..targets import target as target_named
from .frozen import FrozenModel
from .huggingface import choose_scheme, logits, quantization_config

LOGIT_TOLERANCE = 1e-5  # equal weights and kernels give 0; this leaves room for another thread count

_PROBE_TOKENS = 32


@dataclass(frozen=True)
class Verification:
    """What a verification found.

    Attributes:
        target: the file format, ``hf`` or ``gguf:...``.
        codes_equal: the file holds exactly the frozen model: codes, scales, kept tensors, metadata, tokenizer.
        differences: one line each, naming the tensor or file; empty when all is well.
        max_abs_logit_diff: largest difference of a logit, frozen model against engine; None if none was run.
        kl: mean KL(frozen || engine) in nats a position; None if none was run.
        engine: what ran the file, with its version.
        notes: what was not checked, and why.
    """

    target: str
    codes_equal: bool
    differences: tuple[str, ...]
    max_abs_logit_diff: float | None
    kl: float | None
    engine: str | None
    notes: tuple[str, ...]

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
        }


def verify(
    path: Path, run: Path, *, target: str | None = None, token_ids: Tensor | None = None, engine: bool = True
) -> Verification:
    """Compare an exported file with the frozen model of a run, then compare what it computes.

    Args:
        path: an exported folder or .gguf file.
        run: the run's folder.
        target: its file format; None finds out (a folder is ``hf``, a .gguf file is what the run recorded).
        token_ids: int64 ``[B, T]`` to compute logits on; None takes 32 fixed pseudo-random tokens.
        engine: False compares the bytes alone.

    Raises:
        VerifyError: the file is missing, damaged, or cannot be loaded by its engine.
        ConfigError: the run has no frozen model, or the target of a .gguf file is not known.
    """
    if not path.exists():
        raise VerifyError(f"{path}: no such file or folder")
    frozen = FrozenModel(run)
    name = target_named(target).name if target else detect_target(path, run)
    if path.is_dir() != (name == "hf"):
        raise VerifyError(f"{path}: a {'folder' if path.is_dir() else 'single file'} cannot be {name}")
    differences = check(path, frozen, name)
    codes_equal = not differences
    notes: list[str] = []
    largest = kl = used = None
    if not codes_equal:
        notes.append("the file differs: it was not run")
    elif not engine:
        notes.append("engine check skipped on request")
    else:
        ids = _probe(frozen) if token_ids is None else token_ids
        ran = _run_hf(path, ids) if name == "hf" else _run_gguf(path, name, ids)
        if ran is None:
            notes.append("llama-cpp-python not installed: engine check skipped")
        else:
            used = ran.engine
            largest, kl = compare_logits(logits(frozen.folder, ids), ran.logits)
            differences += ran.judge(largest, kl)
    return Verification(
        target=name,
        codes_equal=codes_equal,
        differences=tuple(differences),
        max_abs_logit_diff=largest,
        kl=kl,
        engine=used,
        notes=tuple(notes),
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
    if target == "hf":
        return check_hf(path, frozen)
    from .gguf_check import check_gguf

    return check_gguf(path, frozen, target)


def detect_target(path: Path, run: Path) -> str:
    """The target of an exported file.

    A folder with a config.json is ``hf``. A .gguf file is looked up in the run's report.json, then asked itself.

    Raises:
        VerifyError: neither a folder with a config.json nor a .gguf file that says what it is.
    """
    if path.is_dir():
        if (path / "config.json").is_file():
            return "hf"
        raise VerifyError(f"{path}: no config.json in this folder, so it is not an exported model")
    if path.suffix != ".gguf":
        raise VerifyError(f"{path}: neither an exported folder nor a .gguf file")
    report = run / "report.json"
    if report.is_file():
        for entry in read_json(report).get("exports", []):
            recorded = Path(str(entry.get("path")))
            if path.resolve() in (recorded.resolve(), (run / recorded).resolve()):
                return target_named(str(entry.get("target"))).name
    from .gguf_check import file_target

    return file_target(path)


# --- what the engines compute --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Ran:
    """Logits ``[B, T, V]`` of an engine, and what it is held to: a largest difference or a largest divergence."""

    engine: str
    logits: Tensor
    max_diff: float | None = None
    max_kl: float | None = None

    def judge(self, diff: float, kl: float) -> list[str]:
        # "not <=" rather than ">": a NaN must fail
        if self.max_diff is not None and not diff <= self.max_diff:
            return [f"logits: differ by {diff:.3g} in {self.engine} from the frozen model, allowed {self.max_diff:g}"]
        if self.max_kl is not None and not kl <= self.max_kl:
            return [f"logits: KL(frozen || {self.engine}) is {kl:.3g} nats a position, allowed {self.max_kl:g}"]
        return []


def compare_logits(reference: Tensor, other: Tensor) -> tuple[float, float]:
    """Largest absolute difference, and mean KL(reference || other) in nats a position, of logits ``[B, T, V]``.

    Raises:
        VerifyError: the vocabularies differ.
    """
    if reference.shape != other.shape:
        raise VerifyError(f"logits: the file gives {list(other.shape)}, the frozen model {list(reference.shape)}")
    p, q = (x.double().log_softmax(dim=-1) for x in (reference, other))
    return float((reference - other).abs().max()), float((p.exp() * (p - q)).sum(dim=-1).mean())


def _probe(frozen: FrozenModel) -> Tensor:
    """Pseudo-random tokens ``[1, 32]``, the same on every machine: what is compared is arithmetic, not language."""
    vocabulary = int(frozen.config.get("vocab_size", 256))
    return (torch.arange(_PROBE_TOKENS) * 7919 % vocabulary).unsqueeze(0)


def _run_hf(path: Path, token_ids: Tensor) -> _Ran:
    return _Ran(f"transformers {version('transformers')}", logits(path, token_ids), max_diff=LOGIT_TOLERANCE)


def _run_gguf(path: Path, target: str, token_ids: Tensor) -> _Ran | None:
    from . import llama_cpp

    if not llama_cpp.available():
        return None
    try:
        computed = torch.as_tensor(llama_cpp.logits_all(path, token_ids.tolist()))
    except ExportError as error:
        raise VerifyError(str(error)) from None
    # fallbacks may store single tensors as any of the target's types, so the bound covers them all
    bound = llama_cpp.activation_kl_bound([t.name for t in target_named(target).types])
    return _Ran(f"llama-cpp-python {version('llama-cpp-python')}", computed.float(), max_kl=bound)


# --- the Hugging Face folder ---------------------------------------------------------------------------------------


def check_hf(path: Path, frozen: FrozenModel) -> list[str]:
    """Every difference between a compressed-tensors folder and the frozen model, one line each.

    Compared are the codes and scales of every quantized tensor, the bytes of every kept one, config.json, the shard
    index, and every file beside them; tensors and files that are missing or too many are differences.

    Raises:
        VerifyError: the folder has no weights, or a file of it is damaged.
    """
    scheme = choose_scheme(frozen)
    expected = {**frozen.config, "quantization_config": quantization_config(frozen, scheme)}
    stored = _Stored(path)
    lines = list(_json_differences("config.json", _read(path / "config.json"), expected))
    lines += stored.index_differences()

    quantized = {f"{name}.weight": name for name in frozen.quantized}
    names: set[str] = set()
    for name in frozen.names():
        if name in quantized:
            names |= {f"{name}_packed", f"{name}_scale", f"{name}_shape"}
        else:
            names.add(name)
    lines += [f"{name}: missing" for name in sorted(names - stored.names)]
    lines += [f"{name}: unexpected tensor" for name in sorted(stored.names - names)]

    for name in frozen.names():
        if name not in quantized:
            if name in stored.names:
                lines += _bytes_differences(name, stored.tensor(name), frozen.tensor(name))
        elif {f"{name}_packed", f"{name}_scale", f"{name}_shape"} <= stored.names:
            lines += _weight_differences(name, stored, frozen, quantized[name], scheme.group_size)
    return lines + list(_file_differences(path, frozen.folder, set(stored.files)))


class _Stored:
    """The safetensors files of a folder, opened for reading tensor by tensor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise VerifyError(f"{path}: no .safetensors file")
        self._where: dict[str, Any] = {}
        self.files: dict[str, list[str]] = {}
        for file in files:
            try:
                handle = safe_open(file, framework="pt")
                self.files[file.name] = list(handle.keys())
                metadata = handle.metadata()
            except (SafetensorError, OSError) as error:
                raise VerifyError(f"{file}: damaged or cut short ({error})") from None
            if metadata != {"format": "pt"}:
                raise VerifyError(f"{file}: metadata {metadata}, transformers wants {{'format': 'pt'}}")
            self._where.update(dict.fromkeys(self.files[file.name], handle))

    @property
    def names(self) -> set[str]:
        return set(self._where)

    def tensor(self, name: str) -> Tensor:
        try:
            return self._where[name].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise VerifyError(f"{self.path}: {name}: cannot be read ({error})") from None

    def index_differences(self) -> list[str]:
        """One file needs no index; of several, the index must send every tensor to the file that has it."""
        name = "model.safetensors.index.json"
        if list(self.files) == ["model.safetensors"]:
            return [f"{name}: unexpected file"] if (self.path / name).exists() else []
        if len(self.files) == 1:
            return [f"{next(iter(self.files))}: unexpected name, loaders look for model.safetensors"]
        expected = {
            "metadata": {"total_size": sum(self.tensor(tensor).nbytes for tensor in self._where)},
            "weight_map": {tensor: file for file, tensors in self.files.items() for tensor in tensors},
        }
        lines = list(_json_differences(name, _read(self.path / name), expected))
        if len(self._where) < sum(map(len, self.files.values())):
            lines.append(f"{name}: a tensor is stored in two files")
        return lines


def _weight_differences(
    name: str, stored: _Stored, frozen: FrozenModel, path: str, group_size: int | None
) -> Iterator[str]:
    """Differences of one quantized weight ``name`` (``path.weight``), decoded here from words and stored scales."""
    truth = frozen.codes(path)
    rows, columns = truth.codes.shape
    words, scale, shape = (stored.tensor(f"{name}_{part}") for part in ("packed", "scale", "shape"))
    per_row = 1 if group_size is None else columns // group_size
    layout = {
        "packed": (words, torch.int32, [rows, -(-columns // 16)]),
        "scale": (scale, frozen.tensor(name).dtype, [rows, per_row]),
        "shape": (shape, torch.int64, [2]),
    }
    for part, (tensor, dtype, size) in layout.items():
        if tensor.dtype != dtype or list(tensor.shape) != size:
            yield f"{name}_{part}: {tensor.dtype} {list(tensor.shape)}, expected {dtype} {size}"
            return
    if shape.tolist() != [rows, columns]:
        yield f"{name}_shape: {shape.tolist()}, expected {[rows, columns]}"

    digits = (words.unsqueeze(-1) >> torch.arange(0, 32, 2, dtype=torch.int32)) & 3
    digits = digits.reshape(rows, -1)
    yield from _value_differences(f"{name}_packed", "code", digits[:, :columns] - 2, truth.codes.to(torch.int32))
    if digits[:, columns:].any():
        row = int(digits[:, columns:].any(dim=1).to(torch.uint8).argmax())
        yield f"{name}_packed: row {row} has bits set after its last code"

    # both sides are spread over single weights, so no rule about groups is shared with the exporter
    got = scale.float().repeat_interleave(columns // per_row, dim=1)
    want = truth.scales.repeat_interleave(columns // truth.scales.shape[1], dim=1).expand(rows, columns)
    yield from _value_differences(f"{name}_scale", "the scale of weight", got, want)


def _value_differences(name: str, what: str, got: Tensor, want: Tensor) -> Iterator[str]:
    unequal = got != want
    if count := int(unequal.sum()):
        row, column = divmod(int(unequal.flatten().to(torch.uint8).argmax()), got.shape[1])
        yield (
            f"{name}: {what} [{row}, {column}] is {got[row, column].item():g}, the frozen model has "
            f"{want[row, column].item():g} ({count} of {got.numel()} weights)"
        )


def _bytes_differences(name: str, got: Tensor, want: Tensor) -> Iterator[str]:
    if got.dtype != want.dtype or got.shape != want.shape:
        yield f"{name}: {got.dtype} {list(got.shape)}, expected {want.dtype} {list(want.shape)}"
        return
    a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (got, want))
    if torch.equal(a, b):
        return
    flat = int((a != b).to(torch.uint8).argmax()) // got.element_size()
    index = [int(i) for i in torch.unravel_index(torch.tensor(flat), got.shape)]
    values = (float(t.reshape(-1)[flat]) for t in (got, want))
    yield "{}: element {} is {:.9g}, the frozen model has {:.9g}".format(name, index, *values)


def _file_differences(path: Path, source: Path, weights: set[str]) -> Iterator[str]:
    """Every file beside the weights is a copy of the frozen folder's."""

    def others(folder: Path, skip: set[str]) -> dict[str, Path]:
        found = {f.relative_to(folder).as_posix(): f for f in folder.rglob("*") if f.is_file()}
        return {name: file for name, file in found.items() if name not in skip}

    dense = {f.name for f in source.glob("*.safetensors")}
    own = {"config.json", "model.safetensors.index.json"}
    theirs, ours = others(path, own | weights), others(source, own | dense)
    for name in sorted(theirs.keys() | ours.keys()):
        if name not in theirs:
            yield f"{name}: file missing"
        elif name not in ours:
            yield f"{name}: unexpected file"
        else:
            a, b = theirs[name].read_bytes(), ours[name].read_bytes()
            if a != b:
                first = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
                yield f"{name}: byte {first} differs from the frozen model's file ({len(a)} against {len(b)} bytes)"


def _json_differences(where: str, got: Any, want: Any) -> Iterator[str]:
    """The places where two JSON values differ, as dotted paths."""
    if isinstance(got, dict) and isinstance(want, dict):
        for key in [*want, *(k for k in got if k not in want)]:
            place = f"{where}: {key}" if ": " not in where else f"{where}.{key}"
            if key not in got:
                yield f"{place} is missing, expected {json.dumps(want[key])}"
            elif key not in want:
                yield f"{place} is unexpected"
            else:
                yield from _json_differences(place, got[key], want[key])
    elif json.dumps(got) != json.dumps(want):  # as text: 1, 1.0 and true are three things in a configuration
        yield f"{where} is {json.dumps(got)}, expected {json.dumps(want)}"


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except ConfigError as error:
        raise VerifyError(str(error)) from None
