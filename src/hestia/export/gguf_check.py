"""Is a GGUF file the frozen model? And where no run is at hand: is it still what it says it is?

``check_gguf`` compares with a run: every key, tensor, byte and gap. ``claims_of`` needs the file alone: it names the
run in the file's metadata, recomputes the hash of codes and scales from the packed blocks, and that of the whole file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import progress
from ..errors import ExportError, VerifyError
from ..targets import Target, head_type
from ..targets import target as target_by_name
from .digest import CodesDigest
from .frozen import FrozenModel
from .gguf_layout import (
    DESCRIPTION,
    PLACEHOLDER,
    Entry,
    Layout,
    codes_and_scales,
    decode,
    dense,
    encode,
    layout_of,
    metadata_bytes,
)
from .gguf_reader import BLOCKS, File, Info, Raw, check_structure, open_checked, read
from .packing import PACKINGS, Bytes

DIGEST_KEY = "hestia.file_sha256"
_NOT_OF_THE_MODEL = (DIGEST_KEY, "hestia.run")  # a run's folder may be renamed; the digest covers both


def check_gguf(path: Path, frozen: FrozenModel, target_name: str, *, digest: bool = True) -> list[str]:
    """Every way in which the file differs from what ``frozen`` demands; an empty list means equal.

    The file is read by a parser of its own; codes and scales are decoded and compared bit for bit after undoing the row
    order, then the bytes themselves (a byte of TQ1_0 has more values than meanings). Keys, types, order, offsets and
    the zeros between tensors are compared too, so that no bit of the file goes unread.

    Args:
        path: the file.
        frozen: the frozen model.
        target_name: a ``gguf:`` target.
        digest: also compare the hash that the file carries of itself.

    Raises:
        ConfigError: no such file, or an unknown target.
        VerifyError: not a GGUF file, truncated, or a tensor that reaches beyond the end; the part is named.
    """
    file = read(path)
    layout = expected_layout(file, frozen, target_by_name(target_name))
    differences = list(_compare_metadata(file, layout))
    offsets = layout.offsets()
    end = file.data_start + offsets[-1]
    found = {info.name: info for info in file.tensors}
    expected = {entry.name for entry in layout.entries}
    differences += [f"{info.name}: not a tensor of this model" for info in file.tensors if info.name not in expected]
    if len(file.tensors) != len(found):
        differences.append("tensor names: some name occurs twice")
    if [i.name for i in file.tensors if i.name in expected] != [e.name for e in layout.entries if e.name in found]:
        differences.append("tensor order: not that of the model")
    for entry, offset in progress.track(zip(layout.entries, offsets, strict=False), "checking", len(layout.entries)):
        info = found.get(entry.name)
        if info is None:
            differences.append(f"{entry.name}: missing from the file")
            continue
        differences += [
            f"{entry.name}: {what} {got}, expected {wanted}"
            for what, got, wanted in (
                ("dimensions", info.shape, entry.shape),
                ("type id", info.type_id, entry.storage.ggml),
                ("offset", info.offset, offset),
            )
            if got != wanted
        ]
        start = file.data_start + info.offset
        comparable = (info.shape, info.type_id) == (entry.shape, entry.storage.ggml)
        stop = start + (entry.bytes if comparable else 1)
        if stop > len(file.data):
            raise VerifyError(
                f"{path}: truncated or damaged: {entry.name} needs bytes {start} to {stop}, "
                f"the file has {len(file.data)}"
            )
        if comparable:
            differences += _compare_tensor(file.data[start:stop], frozen, entry)
    gaps = [(file.infos_end, file.data_start)]
    starts = zip(layout.entries, offsets, offsets[1:], strict=False)
    gaps += [(file.data_start + o + entry.bytes, file.data_start + following) for entry, o, following in starts]
    for start, stop in gaps:
        nonzero = np.flatnonzero(file.data[start:stop])
        if nonzero.size:
            differences.append(f"padding: byte {start + int(nonzero[0])} of the file is not zero")
    if len(file.data) != end:
        differences.append(f"length: the file has {len(file.data)} bytes, expected {end}")
    if not differences:
        check_structure(path, file)
        if digest:  # last, because it says that something differs and not what
            differences += _compare_digest(file)
    return differences


def expected_layout(file: File, frozen: FrozenModel, target: Target) -> Layout:
    """What the file must hold, if embedding and head are stored as the file says."""
    stored = {info.name: info.type_name for info in file.tensors}
    name = stored.get("output.weight", stored.get("token_embd.weight", ""))
    head = head_type(name.lower()) if name.lower() in ("f32", "f16", "bf16", "q8_0") else None
    exact = layout_of(frozen, target, fallback=True)
    kept = {e.name: e.storage for e in exact.entries if e.path is None}
    if head is None or all(kept.get(n) in (None, head) for n in ("token_embd.weight", "output.weight")):
        return exact
    # with --head auto the two may be stored differently; then the exact layout is what must be there
    same = all(stored.get(n) == kept[n].name for n in ("token_embd.weight", "output.weight") if n in kept)
    return exact if same else layout_of(frozen, target, fallback=True, head=head)


def rounded_tensors(path: Path, frozen: FrozenModel, target: str) -> list[str]:
    """A sentence for the embedding and for the head where the file does not hold every number of it: those are kept
    tensors that ``--head`` rounded, and the comparison is with what rounding gives.
    """
    from .gguf import head_record

    layout = expected_layout(read(path), frozen, target_by_name(target))
    stored = head_record(frozen, layout, "")["tensors"]
    return [
        f"{name} is stored as {found['type']}, which rounds it (relative error {found['relative_error']:.2g})"
        for name, found in stored.items()
        if found["largest_error"] > 0
    ]


def file_target(path: Path) -> str:
    """The target that a GGUF file says it is: ``gguf:tq2_0``.

    Raises:
        ConfigError: no such file.
        VerifyError: damaged, or not written by hestia.
    """
    file = read(path)
    named = file.text("hestia.target")
    if named is None:
        raise VerifyError(f"{path}: has no hestia.target: not written by hestia")
    try:
        return target_by_name(named).name
    except ValueError as error:
        raise VerifyError(f"{path}: hestia.target: {error}") from None


# --- the file alone ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claims:
    """What a file says about itself, and whether that is still true.

    Attributes:
        run: name of the run it comes from; None for a file that hestia did not write.
        target: the target it was exported as.
        codes_sha256: hash of the run's codes and scales.
        codes_match: whether the blocks in the file have that hash; None where a quantized tensor is stored dense, from
            which the codes cannot be told.
        file_matches: whether the bytes of the whole file have the hash they had when it was written.
        tensors: stored types and how many tensors have each.
    """

    run: str | None
    target: str | None
    codes_sha256: str | None
    codes_match: bool | None
    file_matches: bool | None
    tensors: dict[str, int]

    @property
    def ok(self) -> bool:
        """Nothing that the file says is untrue."""
        return self.codes_match is not False and self.file_matches is not False

    def to_json(self) -> dict[str, Any]:
        """All of it, for ``--json``."""
        return {**{k: v for k, v in vars(self).items() if k != "tensors"}, "tensors": self.tensors, "ok": self.ok}


def claims_of(path: Path) -> Claims:
    """Check a GGUF file without its run: structure, the hash of its codes, and the hash of all its bytes.

    Raises:
        ConfigError: no such file.
        VerifyError: damaged or truncated.
    """
    file = open_checked(path)
    counts: dict[str, int] = {}
    for info in file.tensors:
        counts[info.type_name] = counts.get(info.type_name, 0) + 1
    claimed = file.text("hestia.codes_sha256")
    if claimed is None:
        ours = next((key for key, _ in file.metadata if key.startswith("hestia.")), None)
        if ours is not None:
            raise VerifyError(f"{path}: it has {ours} and no hestia.codes_sha256 that can be read: it is damaged")
        return Claims(None, None, None, None, None, counts)
    computed = _codes_digest(path, file)
    return Claims(
        run=file.text("hestia.run"),
        target=file.text("hestia.target"),
        codes_sha256=claimed,
        codes_match=None if computed is None else computed == claimed,
        file_matches=not list(_compare_digest(file)),
        tensors=counts,
    )


def _codes_digest(path: Path, file: File) -> str | None:
    """The hash of all codes and scales, from the packed blocks; None if some tensor is not packed."""
    try:
        table = {
            str(v[0]): (str(k), v[1], int(v[2])) for k, v in json.loads(file.text("hestia.quantized") or "").items()
        }
    except (ValueError, TypeError, AttributeError, IndexError, KeyError, RecursionError):
        raise VerifyError(f"{path}: hestia.quantized is damaged") from None
    infos = {info.name: info for info in file.tensors}
    digest = CodesDigest()
    for module in sorted(table):
        name, group, heads = table[module]
        info = infos.get(name)
        if info is None or len(info.shape) != 2:
            raise VerifyError(f"{path}: hestia.quantized names {name!r}, which is not a matrix of this file")
        if info.type_name not in PACKINGS:
            return None
        found = _codes_of(file, info, group, heads)
        if found is None:
            return "damaged"  # differs from every hash
        digest.add(module, *found)
    return digest.hexdigest()


def _codes_of(file: File, info: Info, group: Any, heads: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Codes and the scales of the frozen model's groups; None where blocks of one group disagree."""
    rows, columns = info.shape
    block = BLOCKS[info.type_id][1]
    try:
        codes, scales = PACKINGS[info.type_name].unpack(file.stored(info).reshape(rows, -1))
    except ExportError:
        return None
    undo = _undo(rows, heads)
    if undo is None:
        return None
    codes, scales = codes[undo], scales[undo]
    length = group if isinstance(group, int) and group > 0 else columns
    if columns % length or length % block:
        return None
    grouped = scales.reshape(rows, columns // length, length // block)
    reduced = grouped[..., 0]
    if (grouped != reduced[..., None]).any():
        return None
    if group == "tensor":
        return (codes, reduced[:1, :1]) if (reduced == reduced[0, 0]).all() else None
    return codes, reduced


def _undo(rows: int, heads: int) -> Any:
    if heads == 0:
        return slice(None)
    if heads < 0 or rows % (2 * heads):
        return None
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def _compare_digest(file: File) -> Iterator[str]:
    """The hash that the file carries of itself, against its bytes with zeros in place of that hash."""
    claimed = (file.text(DIGEST_KEY) or "").encode()
    place = file.data[: file.data_start].tobytes().find(claimed) if len(claimed) == len(PLACEHOLDER) else -1
    if place < 0:
        yield f"{DIGEST_KEY}: missing or damaged"
        return
    digest = hashlib.sha256(file.data[:place].data)
    digest.update(PLACEHOLDER.encode())
    digest.update(file.data[place + len(claimed) :].data)
    if digest.hexdigest().encode() != claimed:
        yield f"{DIGEST_KEY}: the file's bytes have the hash {digest.hexdigest()}, it says {claimed.decode()}"


# --- comparing with the frozen model -------------------------------------------------------------------------------


def _compare_metadata(file: File, layout: Layout) -> Iterator[str]:
    found = dict(file.metadata)
    if len(found) != len(file.metadata):
        yield "metadata: some key occurs twice"
    demanded = {key: value for key, value in layout.metadata.items() if key not in DESCRIPTION}
    for key, raw in found.items():
        if key in DESCRIPTION:  # what it says is the digest's to keep; earlier versions wrote fewer of them
            if raw.type != DESCRIPTION[key]:
                yield f"{key}: type {raw.type}, expected {DESCRIPTION[key]}"
        elif key not in demanded:
            yield f"{key}: not a key of this model"
    if [k for k in found if k in demanded] != [k for k in demanded if k in found]:
        yield "metadata: keys are not in their order"
    for key, value in demanded.items():
        raw, expected = found.get(key), Raw(value.kind, metadata_bytes(value))
        if raw is None:
            yield f"{key}: missing from the file"
        elif raw.type != expected.type:
            yield f"{key}: type {raw.type}, expected {expected.type}"
        elif raw != expected and key not in _NOT_OF_THE_MODEL:
            if len(raw.items) != len(expected.items):
                yield f"{key}: {len(raw.items)} items, expected {len(expected.items)}"
            pairs = enumerate(zip(raw.items, expected.items, strict=False))
            first = next((i for i, (a, b) in pairs if a != b), None)
            if first is not None:
                place = f"{key}[{first}]" if value.kind.endswith("[]") else key
                yield f"{place}: {raw.show(first)}, expected {expected.show(first)}"


def _compare_tensor(stored: Bytes, frozen: FrozenModel, entry: Entry) -> Iterator[str]:
    """First difference in codes, scales or numbers, in the rows and columns of the frozen model; else in bytes."""
    label = f"{entry.name} ({entry.source})" if entry.source else entry.name
    order = entry.order()
    row_bytes = entry.bytes // entry.shape[0]
    seen: dict[str, tuple[str, int]] = {}
    noncanonical: int | None = None
    for rows in entry.pieces():
        piece = stored[rows.start * row_bytes : rows.stop * row_bytes]
        index = order[rows]
        if entry.packed:
            wanted = codes_and_scales(frozen, entry, index)
            canonical = PACKINGS[entry.storage.name].pack(*wanted).reshape(-1)
            try:
                got = PACKINGS[entry.storage.name].unpack(piece.reshape(len(index), -1))
            except ExportError as error:
                yield f"{label}: {error}"
                return
            pairs = [("code", got[0], wanted[0]), ("scale", got[1], wanted[1])]
        else:
            wanted_bytes = encode(dense(frozen, entry, index), entry.storage)
            canonical = wanted_bytes.reshape(-1)
            shape = (len(index), *entry.shape[1:])
            pairs = [("number", decode(piece, entry.storage, shape), decode(wanted_bytes, entry.storage, shape))]
        if np.array_equal(piece, canonical):
            continue
        clean = True
        for what, values, truth in pairs:
            bits = np.uint8 if values.dtype == np.int8 else np.uint32
            different = np.ascontiguousarray(values).view(bits) != np.ascontiguousarray(truth).view(bits)
            if different.any():
                clean = False
                at = tuple(int(i) for i in np.argwhere(different)[0])
                place = [int(index[at[0]]), *at[1:]]
                line, count = seen.get(
                    what, (f"{label}: {what} {values[at]} at {place}, the frozen model has {truth[at]}", 0)
                )
                seen[what] = (line, count + int(different.sum()))
        if clean and noncanonical is None:
            noncanonical = rows.start * row_bytes + int(np.flatnonzero(piece != canonical)[0])
    blocks = entry.shape[-1] // entry.storage.block if entry.packed else 0
    sizes = {"scale": entry.shape[0] * blocks}
    total = int(np.prod(entry.shape))
    for what, (line, count) in seen.items():
        yield f"{line} ({count} of {sizes.get(what, total)} differ)"
    if noncanonical is not None and not seen:
        yield f"{label}: byte {noncanonical} is not the canonical one, though it decodes to the same numbers"
