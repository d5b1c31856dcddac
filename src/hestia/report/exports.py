"""Exported files, and what re-reading them showed (report.json, ``exports``)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .fields import Object, mapping, number, text, texts, whole


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What re-reading the written file showed.

    Attributes:
        codes_equal: every code and scale of the file equals the frozen model's; None where nobody looked.
        max_abs_logit_diff: largest difference of a logit between the engine and the frozen model.
        kl: nats per token between their predictions.
        engine: the program that ran the file; empty where none was installed.
        differences: what else differs, kept tensors and metadata too; ``notes``: what could not be checked.
        ok: the verdict of ``verify`` itself; None where it gave none.
        kl_emulated: the KL of an emulation of the engine's rounding of activations; ``kl_bound``: what is allowed.
        nll_frozen, nll_engine: nats per token on ``tokens`` held-out tokens.
        strings, strings_equal: strings that were tokenized by both, and alike.
        head_nll_change: what rounding the embedding and head cost, nats per token; None where they are exact.
    """

    codes_equal: bool | None
    max_abs_logit_diff: float | None
    kl: float | None
    engine: str
    differences: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    ok: bool | None = None
    kl_emulated: float | None = None
    kl_bound: float | None = None
    nll_frozen: float | None = None
    nll_engine: float | None = None
    tokens: int | None = None
    strings: int | None = None
    strings_equal: int | None = None
    head_nll_change: float | None = None

    @property
    def failed(self) -> bool:
        """Whether anything of the file was found to differ."""
        return self.codes_equal is False or self.ok is False or bool(self.differences)


@dataclass(frozen=True, kw_only=True)
class Export:
    """One written file or folder; ``path`` is relative to the run where it lies inside it.

    Attributes:
        head: sentences about embeddings and head that were rounded on request; empty where all is exact.
        refit: a sentence about scales that were re-fitted on request; empty where none was.
        outside: written elsewhere than into the run; ``path`` is then its name alone.
        types: storage types of the tensors of a .gguf.
    """

    target: str
    path: str
    bytes: int | None
    sha256: str
    verify: Verification | None
    head: str = ""
    refit: str = ""
    outside: bool = False
    types: frozenset[str] = frozenset()


def read_export(entry: Object, run: Path) -> Export:
    """One entry of report.json's ``exports``."""
    path = Path(text(entry.value("path")))
    for root in (run, run.resolve()):
        if path.is_relative_to(root):
            path = path.relative_to(root)
    outside = ".." in path.parts or path.is_absolute()
    if outside:  # a card is published, the folders around the run are not
        path = Path(path.name)
    verify = entry.raw.get("verify")
    if verify is not None:
        checked = entry.object("verify")
        verify = Verification(
            codes_equal=None if checked.value("codes_equal") is None else checked.raw["codes_equal"] is True,
            max_abs_logit_diff=number(checked.raw.get("max_abs_logit_diff")),
            kl=number(checked.raw.get("kl")),
            engine=text(checked.raw.get("engine")),
            differences=texts(checked.raw.get("differences")),
            notes=texts(checked.raw.get("notes")),
            ok=None if checked.raw.get("ok") is None else checked.raw["ok"] is True,
            kl_emulated=number(checked.raw.get("kl_emulated")),
            kl_bound=number(checked.raw.get("kl_bound")),
            nll_frozen=number(mapping(checked.raw.get("nll")).get("frozen")),
            nll_engine=number(mapping(checked.raw.get("nll")).get("engine")),
            tokens=whole(checked.raw.get("tokens")),
            strings=whole(mapping(checked.raw.get("tokenizer")).get("strings")),
            strings_equal=whole(mapping(checked.raw.get("tokenizer")).get("equal")),
            head_nll_change=number(checked.raw.get("head_nll_change")),
        )
    return Export(
        target=text(entry.value("target")),
        path=path.as_posix(),
        bytes=entry.integer("bytes"),
        sha256=text(entry.value("sha256")),
        verify=verify,
        head=_head_sentence(entry, verify),
        refit=_refit_sentence(entry),
        outside=outside,
        types=frozenset(texts(list(mapping(entry.raw.get("tensors")).values()))),
    )


def _head_sentence(entry: Object, verify: Verification | None) -> str:
    """What rounding the embedding and head on request changed."""
    head = mapping(entry.raw.get("head"))
    if not head or head.get("exact") is not False:
        return ""
    types = ", ".join(f"{name} as {mapping(t).get('type')}" for name, t in mapping(head.get("tensors")).items())
    change = verify.head_nll_change if verify is not None else None
    cost = "its cost was not measured" if change is None else f"this moves the NLL by {change:+.2g} nats per token"
    if change is not None and verify is not None and verify.tokens:
        cost += f", on {verify.tokens} held-out tokens"
    return text(f"On request {types}, which rounds: {cost}.")


def _refit_sentence(entry: Object) -> str:
    """What re-fitting scales on request changed."""
    refit = mapping(entry.raw.get("refit"))
    if not refit:
        return ""
    change, error = number(refit.get("nll_change")), number(refit.get("relative_error"))
    cost = "its cost was not measured" if change is None else f"this moves the NLL by {change:+.3g} nats per token"
    moved = "" if error is None else f" (relative error {error:.2g})"
    return text(
        f"This file is not the trained model itself: on request {refit.get('tensors')} tensors got coarser scales, "
        f"one for {refit.get('group_size')} weights{moved}; {cost}."
    )
