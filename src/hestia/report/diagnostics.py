"""What a run looked at beside its scores: weights, codes and prompts (diagnostics.json)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from .fields import Object, mapping, number, text


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Latent weights of one matrix in units of their scale, before and after training.

    Attributes:
        path: its module path.
        edges: n + 1 bounds; ``before`` and ``after`` count the weights in the n bins between them.
    """

    path: str
    edges: tuple[float, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]


@dataclass(frozen=True)
class CodeShares:
    """Shares of one matrix's codes, 0 to 1: those that are zero at the end, and those that training changed."""

    zero: float | None = None
    flipped: float | None = None


@dataclass(frozen=True)
class Sample:
    """One prompt and what both models make of it."""

    prompt: str
    parent: str
    quantized: str


def read_histograms(record: Object | None) -> tuple[Histogram, ...]:
    """Latent weights of every matrix that diagnostics.json shows.

    Raises:
        ConfigError: bounds and counts do not fit together.
    """
    if record is None:
        return ()
    found: list[Histogram] = []
    for path, entry in mapping(record.raw.get("histograms")).items():
        place = f"{record.where}: histograms[{path!r}]"
        edges, before, after = (_numbers(mapping(entry).get(key), place, key) for key in ("edges", "before", "after"))
        if not len(edges) - 1 == len(before) == len(after) or any(
            a >= b for a, b in zip(edges, edges[1:], strict=False)
        ):
            raise ConfigError(
                f"{place}: needs n + 1 ascending edges and n counts twice, got {len(edges)} edges, "
                f"{len(before)} counts before and {len(after)} after"
            )
        found.append(Histogram(path=text(path), edges=edges, before=before, after=after))
    return tuple(found)


def read_codes(record: Object | None) -> dict[str, CodeShares]:
    """Zero and flipped shares, by module path."""
    entries = {} if record is None else mapping(record.raw.get("codes"))
    return {
        text(path): CodeShares(*(number(mapping(entry).get(key)) for key in ("zero_share", "flipped_share")))
        for path, entry in entries.items()
    }


def _numbers(value: Any, place: str, key: str) -> tuple[float, ...]:
    numbers = [number(v) for v in value] if isinstance(value, list) else [None]
    if None in numbers:
        raise ConfigError(f"{place}: {key!r} must be a list of finite numbers")
    return tuple(n for n in numbers if n is not None)


def read_samples(record: Object | None) -> tuple[Sample, ...]:
    """Prompts and what parent and quantized model make of them."""
    if record is None:
        return ()
    return tuple(
        Sample(*(text(entry.raw.get(key)) for key in ("prompt", "parent", "quantized")))
        for entry in record.objects("samples", required=False)
    )
