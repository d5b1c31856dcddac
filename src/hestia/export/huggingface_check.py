"""Is a compressed-tensors folder the frozen model?

It reads safetensors and JSON alone and decodes with its own arithmetic, so that a mistake of the exporter is not
repeated here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ConfigError, VerifyError
from ..files import read_json
from .frozen import FrozenModel
from .huggingface import choose_scheme, quantization_config

_NO_LOADER_READS = re.compile(
    r"(.*/)?(\..*|(licen[cs]e|copying|notice)([-_][^/.]*)?(\.txt)?|[^/]*\.(md|html|pdf|png|jpe?g|gif|svg|webp))",
    re.IGNORECASE,
)
"""Paths of hidden files and folders (.gitattributes, .cache/), licences, cards and pictures."""


def check_hf(path: Path, frozen: FrozenModel, bits: int = 2) -> list[str]:
    """Every difference between a compressed-tensors folder and the frozen model, one line each.

    Compared are the codes and scales of every quantized tensor, the bytes of every kept one, config.json, the shard
    index, and every file beside them that a loader may read; tensors and files that are missing or too many are
    differences.

    Args:
        path: the folder.
        frozen: the frozen model.
        bits: of a code: 2, or 4 for ``hf:int4``.

    Raises:
        VerifyError: the folder has no weights, or a file of it is damaged.
    """
    scheme = choose_scheme(frozen, bits)
    expected = {**frozen.config, "quantization_config": quantization_config(frozen, scheme)}
    stored = Stored(path)
    lines = list(json_differences("config.json", read_config(path), expected))
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
                lines += bytes_differences(name, stored.tensor(name), frozen.tensor(name))
        elif {f"{name}_packed", f"{name}_scale", f"{name}_shape"} <= stored.names:
            lines += _weight_differences(name, stored, frozen, quantized[name], scheme.group_size, bits)
    return lines + list(file_differences(path, frozen.folder, set(stored.files)))


class Stored:
    """The safetensors files of a folder, opened for reading tensor by tensor."""

    def __init__(self, path: Path, file_format: str = "pt") -> None:
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
            if metadata != {"format": file_format}:
                raise VerifyError(f"{file}: metadata {metadata}, expected {{'format': {file_format!r}}}")
            self._where.update(dict.fromkeys(self.files[file.name], handle))

    @property
    def names(self) -> set[str]:
        """Of all tensors in the folder."""
        return set(self._where)

    def tensor(self, name: str) -> Tensor:
        """One of them, as it is stored.

        Raises:
            VerifyError: it cannot be read.
        """
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
        lines = list(json_differences(name, _read(self.path / name), expected))
        if len(self._where) < sum(map(len, self.files.values())):
            lines.append(f"{name}: a tensor is stored in two files")
        return lines


def _weight_differences(
    name: str, stored: Stored, frozen: FrozenModel, path: str, group_size: int | None, bits: int
) -> Iterator[str]:
    """Differences of one quantized weight ``name`` (``path.weight``), decoded here from words and stored scales."""
    truth = frozen.codes(path)
    rows, columns = truth.codes.shape
    words, scale, shape = (stored.tensor(f"{name}_{part}") for part in ("packed", "scale", "shape"))
    per_row = 1 if group_size is None else columns // group_size
    layout = {
        "packed": (words, torch.int32, [rows, -(-columns * bits // 32)]),
        "scale": (scale, frozen.tensor(name).dtype, [rows, per_row]),
        "shape": (shape, torch.int64, [2]),
    }
    for part, (tensor, dtype, size) in layout.items():
        if tensor.dtype != dtype or list(tensor.shape) != size:
            yield f"{name}_{part}: {tensor.dtype} {list(tensor.shape)}, expected {dtype} {size}"
            return
    if shape.tolist() != [rows, columns]:
        yield f"{name}_shape: {shape.tolist()}, expected {[rows, columns]}"

    digits = (words.unsqueeze(-1) >> torch.arange(0, 32, bits, dtype=torch.int32)) & (2**bits - 1)
    digits = digits.reshape(rows, -1)
    yield from value_differences(
        f"{name}_packed", "code", digits[:, :columns] - 2 ** (bits - 1), truth.codes.to(torch.int32)
    )
    if digits[:, columns:].any():
        row = int(digits[:, columns:].any(dim=1).to(torch.uint8).argmax())
        yield f"{name}_packed: row {row} has bits set after its last code"

    # both sides are spread over single weights, so no rule about groups is shared with the exporter
    got = scale.float().repeat_interleave(columns // per_row, dim=1)
    want = truth.scales.repeat_interleave(columns // truth.scales.shape[1], dim=1).expand(rows, columns)
    yield from value_differences(f"{name}_scale", "the scale of weight", got, want)


def value_differences(name: str, what: str, got: Tensor, want: Tensor) -> Iterator[str]:
    """Where two matrices of one shape first differ, and in how many places; nothing where they are equal."""
    unequal = got != want
    if count := int(unequal.sum()):
        row, column = divmod(int(unequal.flatten().to(torch.uint8).argmax()), got.shape[1])
        yield (
            f"{name}: {what} [{row}, {column}] is {got[row, column].item():g}, the frozen model has "
            f"{want[row, column].item():g} ({count} of {got.numel()} weights)"
        )


def bytes_differences(name: str, got: Tensor, want: Tensor) -> Iterator[str]:
    """How two tensors differ in dtype, shape or a single bit; nothing where they are the same."""
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


def file_differences(path: Path, source: Path, weights: set[str]) -> Iterator[str]:
    """Every file beside the weights that a loader may read is a copy of the frozen folder's."""
    for name, what in _unlike(path, source, weights, read=True):
        yield f"{name}: {what}"


def file_notes(path: Path, source: Path) -> list[str]:
    """What else lies in an exported folder, or was changed there, though no loader reads it: one note or none."""
    weights = {file.name for file in path.glob("*.safetensors")}
    names = [name for name, _ in _unlike(path, source, weights, read=False)]
    if not names:
        return []
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return [f"not as in the frozen model, but read by no loader: {', '.join(names[:5])}{more}"]


def _unlike(path: Path, source: Path, weights: set[str], *, read: bool) -> Iterator[tuple[str, str]]:
    """Files beside the weights, read by loaders or not, that are no copies of the frozen folder's, and in what."""

    def others(folder: Path, skip: set[str]) -> dict[str, Path]:
        found = {f.relative_to(folder).as_posix(): f for f in folder.rglob("*") if f.is_file()}
        return {
            name: file
            for name, file in found.items()
            if name not in skip and (_NO_LOADER_READS.fullmatch(name) is None) == read
        }

    dense = {f.name for f in source.glob("*.safetensors")}
    own = {"config.json", "model.safetensors.index.json"}
    theirs, ours = others(path, own | weights), others(source, own | dense)
    for name in sorted(theirs.keys() | ours.keys()):
        if name not in theirs:
            yield name, "file missing"
        elif name not in ours:
            yield name, "unexpected file"
        else:
            a, b = theirs[name].read_bytes(), ours[name].read_bytes()
            if a != b:
                first = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
                yield name, f"byte {first} differs from the frozen model's file ({len(a)} against {len(b)} bytes)"


def json_differences(where: str, got: Any, want: Any) -> Iterator[str]:
    """The places where two JSON values differ, as dotted paths."""
    if isinstance(got, dict) and isinstance(want, dict):
        for key in [*want, *(k for k in got if k not in want)]:
            place = f"{where}: {key}" if ": " not in where else f"{where}.{key}"
            if key not in got:
                yield f"{place} is missing, expected {json.dumps(want[key])}"
            elif key not in want:
                yield f"{place} is unexpected"
            else:
                yield from json_differences(place, got[key], want[key])
    elif json.dumps(got) != json.dumps(want):  # as text: 1, 1.0 and true are three things in a configuration
        yield f"{where} is {json.dumps(got)}, expected {json.dumps(want)}"


def read_config(path: Path) -> dict[str, Any]:
    """config.json of an exported folder.

    Raises:
        VerifyError: missing or unreadable.
    """
    return _read(path / "config.json")


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except ConfigError as error:
        raise VerifyError(str(error)) from None
