"""What the engines compute from a written file, held against the frozen model.

    hf, hf:int4   transformers: the same logits, to ``LOGIT_TOLERANCE``
    gguf:*        llama.cpp on the CPU, within the divergence of an emulation of its activation rounding
    mlx           mlx-lm on its CPU backend, to ``MLX_TOLERANCE``, with its bf16 factor of Gemma 3's embeddings

For ``gguf`` the frozen model runs twice in PyTorch: as it is, and with the rounding of llama.cpp's kernels put in
front of every linear layer (``activations``). With KL and next-token NLL taken over the same text,

    KL(frozen || engine)               <=  FACTOR KL(frozen || emulation) + FLOOR
    |NLL(engine) - NLL(frozen)|        <=  FACTOR (|mean d| + 3 sd(d) / sqrt(n)) + NLL_FLOOR

The second is the statement about perplexity, d being NLL(emulation) - NLL(frozen) token by token. A file of F32
tensors alone also has to give the logits themselves, to ``F32_TOLERANCE`` beyond what the emulation explains (GELU's
table).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ExportError, VerifyError
from ..targets import is_gguf
from ..targets import target as target_named
from . import llama_cpp, mlx_engine
from .activations import FACTOR, NLL_FLOOR, emulating, kl_bound
from .frozen import FrozenModel
from .huggingface import load, logits

LOGIT_TOLERANCE = 1e-5  # equal weights and kernels give 0; this leaves room for another thread count
F32_TOLERANCE = 1e-4
MLX_TOLERANCE = 1e-4  # fp32 sums in another order


ROWS = 16
"""Positions whose distributions are held in fp64 at once."""


@dataclass(frozen=True)
class Ran:
    """What running a file showed; all None and a note where no engine is installed."""

    engine: str | None = None
    max_abs_logit_diff: float | None = None
    kl: float | None = None
    differences: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


def run(path: Path, frozen: FrozenModel, target: str, token_ids: Tensor) -> Ran:
    """Run a file that has passed the comparison of its bytes, and judge it.

    Args:
        path: the folder or file.
        frozen: the frozen model.
        target: its format.
        token_ids: int64 ``[B, T]``.

    Raises:
        VerifyError: its engine cannot load it, or computes logits of another shape.
    """
    if is_gguf(target):
        return _run_gguf(path, frozen, target, token_ids)
    if target == "mlx":
        return _run_mlx(path, frozen, token_ids)
    return _run_hf(path, frozen, token_ids)


def compare_logits(reference: Tensor, other: Tensor) -> tuple[float, float]:
    """Largest absolute difference, and mean KL(reference || other) in nats a position, of logits ``[B, T, V]``.

    Raises:
        VerifyError: the vocabularies differ.
    """
    if reference.shape != other.shape:
        raise VerifyError(f"logits: the file gives {list(other.shape)}, the frozen model {list(reference.shape)}")
    largest, kl = 0.0, 0.0
    for a, b in zip(reference.flatten(0, -2).split(ROWS), other.flatten(0, -2).split(ROWS), strict=True):
        p, q = (x.double().log_softmax(dim=-1) for x in (a, b))
        largest = max(largest, float((a - b).abs().max())) if torch.isfinite(b).all() else float("nan")
        kl += float((p.exp() * (p - q)).sum())
    return largest, kl / reference[..., 0].numel()


def token_nll(logits_: Tensor, token_ids: Tensor) -> Tensor:
    """Nats of every next token, ``[B, T - 1]``, in fp64."""
    rows, targets = logits_[:, :-1].flatten(0, 1).split(ROWS), token_ids[:, 1:].flatten().split(ROWS)
    nats = [F.cross_entropy(x.double(), y, reduction="none") for x, y in zip(rows, targets, strict=True)]
    return torch.cat(nats).view(len(token_ids), -1)


def _run_hf(path: Path, frozen: FrozenModel, token_ids: Tensor) -> Ran:
    reference, other = logits(load(frozen.folder), token_ids), logits(load(path), token_ids)
    return _exactly(f"transformers {version('transformers')}", reference, other, token_ids, LOGIT_TOLERANCE)


def _exactly(engine: str, reference: Tensor, other: Tensor, token_ids: Tensor, tolerance: float) -> Ran:
    largest, kl = compare_logits(reference, other)
    differences: list[str] = []
    if not largest <= tolerance:  # "not <=" rather than ">": a NaN must fail
        differences.append(f"logits: differ by {largest:.3g} in {engine} from the frozen model, allowed {tolerance:g}")
    frozen, packed = (float(token_nll(x, token_ids).mean()) for x in (reference, other))
    details = {"nll": {"frozen": frozen, "engine": packed, "bound": tolerance}, "tokens": token_ids[:, 1:].numel()}
    return Ran(engine, largest, kl, differences, [], details)


def _run_gguf(path: Path, frozen: FrozenModel, target: str, token_ids: Tensor) -> Ran:
    from .gguf_check import expected_layout
    from .gguf_layout import stored_values
    from .gguf_reader import open_checked
    from .tokenizer_check import compare_tokenizers

    if not llama_cpp.available():
        return Ran(notes=["llama-cpp-python not installed: engine check skipped"])
    file = open_checked(path)
    engine = f"llama-cpp-python {version('llama-cpp-python')}"
    try:
        tokens = compare_tokenizers(path, frozen.folder)
        computed = torch.as_tensor(llama_cpp.logits_all(path, token_ids.tolist())).float()
    except ExportError as error:
        raise VerifyError(str(error)) from None
    layout = expected_layout(file, frozen, target_named(target))
    kept = {e.source: e for e in layout.entries if e.path is None and e.storage.name in ("Q8_0", "F16", "BF16")}
    stored = {
        name: stored_values(frozen, entry, np.arange(entry.shape[0]))
        for name, entry in kept.items()
        if name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    stored = {name: values for name, values in stored.items() if not torch.equal(values, frozen.tensor(name).float())}
    model = load(frozen.folder)
    reference = logits(model, token_ids)
    with emulating(model, {}, stored):
        rounded = logits(model, token_ids) if stored else reference
    with emulating(model, layout.storage_of(), stored):
        emulated = logits(model, token_ids)
    del model
    return _judge(
        engine,
        token_ids,
        {"frozen": reference, "engine": computed, "emulation": emulated, "head": rounded},
        only_f32=set(file_types(file)) == {"F32"},
        tokens=tokens,
    )


def file_types(file: Any) -> list[str]:
    """The storage types that occur in a GGUF file."""
    return sorted({info.type_name for info in file.tensors})


def _judge(engine: str, token_ids: Tensor, computed: dict[str, Tensor], *, only_f32: bool, tokens: Any) -> Ran:
    reference = computed["frozen"]
    largest, kl = compare_logits(reference, computed["engine"])
    explained, kl_emulated = compare_logits(reference, computed["emulation"])
    nll = {name: token_nll(values, token_ids) for name, values in computed.items()}
    change = nll["emulation"] - nll["frozen"]
    spread = float(change.std(correction=0)) / change.numel() ** 0.5
    bound = FACTOR * (abs(float(change.mean())) + 3.0 * spread) + NLL_FLOOR
    moved = float((nll["engine"] - nll["frozen"]).mean())
    differences = list(tokens.differences)
    if not kl <= kl_bound(kl_emulated):
        differences.append(
            f"logits: KL(frozen || {engine}) is {kl:.3g} nats a position, its rounding of activations explains "
            f"{kl_emulated:.3g} and {kl_bound(kl_emulated):.3g} is allowed"
        )
    if only_f32 and not largest <= F32_TOLERANCE + FACTOR * explained:
        differences.append(f"logits: differ by {largest:.3g} in {engine}, allowed {F32_TOLERANCE:g} in an F32 file")
    if not abs(moved) <= bound:
        differences.append(f"perplexity: {engine} moves the NLL by {moved:.3g} nats per token, allowed {bound:.3g}")
    means = {name: float(values.mean()) for name, values in nll.items()}
    details: dict[str, Any] = {
        "kl_emulated": kl_emulated,
        "kl_bound": kl_bound(kl_emulated),
        "nll": {k: means[k] for k in ("frozen", "engine", "emulation")} | {"bound": bound},
        "tokens": token_ids[:, 1:].numel(),
        "tokenizer": {"strings": tokens.strings, "equal": tokens.equal},
    }
    if computed["head"] is not reference:
        details["head_nll_change"] = means["head"] - means["frozen"]
    return Ran(engine, largest, kl, differences, list(tokens.notes), details)


def _run_mlx(path: Path, frozen: FrozenModel, token_ids: Tensor) -> Ran:
    if not mlx_engine.available():
        return Ran(notes=["mlx-lm not installed: engine check skipped"])
    model = load(frozen.folder)
    notes = _round_embedding_scale(model) if frozen.config["model_type"] == "gemma3_text" else []
    reference = logits(model, token_ids)
    engine = f"mlx-lm {version('mlx-lm')} on mlx {version('mlx')}"
    other = torch.as_tensor(mlx_engine.logits(path, token_ids.tolist()))
    return replace(_exactly(engine, reference, other, token_ids, MLX_TOLERANCE), notes=notes)


def _round_embedding_scale(model: Any) -> list[str]:
    """Give Gemma 3 the factor of its embeddings, sqrt(hidden_size), in bf16 as mlx-lm has it, and say so."""
    embedding = model.get_input_embeddings()
    exact = embedding.embed_scale
    embedding.embed_scale = exact.bfloat16().float()
    if embedding.embed_scale == exact:
        return []
    return [f"mlx-lm takes the embeddings' factor {float(exact):g} as {float(embedding.embed_scale):g}: compared so"]
