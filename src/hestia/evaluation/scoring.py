"""How good a language model is, and how far from its parent: one pass over held-out blocks.

For every counted target x_{t+1} with the model's next-token distribution q_t and the parent's p_t:

    nll  = mean of  -log q_t(x_{t+1})                      nats per token; perplexity = exp(nll)
    kl   = mean of  sum_v p_t(v) (log p_t(v) - log q_t(v))    KL(parent || model), nats per token
    top1 = share of positions where argmax p_t == argmax q_t

Any callable from token ids to logits can be scored: a transformers model through ``model_logits``, a GGUF file in
llama.cpp, a table in a test. Softmaxes are taken in fp32 a few rows at a time, so that beside the logits themselves
only a chunk of ``CHUNK_ELEMENTS`` numbers is alive; sums are kept in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data import Blocks
from ..errors import ConfigError, GuardError
from ..progress import track

Logits = Callable[[Tensor], Tensor]
"""Token ids ``[B, T]`` to logits ``[B, T, V]``; position t predicts token t + 1."""

CHUNK_ELEMENTS = 1 << 22  # 16 MB in fp32: larger is not faster, smaller pays for Python

MOST_BLOCKS = 8
"""Blocks of a forward pass, where their logits are no more than ``MOST_LOGITS`` numbers."""

MOST_LOGITS = 1 << 28
"""Logits of a forward pass, unless a single block has more: 1 GiB in fp32, and as much again of the parent."""


def blocks_at_once(tokens: int, vocabulary: int) -> int:
    """Blocks of ``tokens`` that ``score`` runs in one forward pass: max(1, min(8, 2^28 / (tokens x vocabulary)))."""
    return max(1, min(MOST_BLOCKS, MOST_LOGITS // max(1, tokens * vocabulary)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Score:
    """A model's score on blocks of text; every mean is over counted targets.

    Attributes:
        nll: nats per token.
        tokens: number of counted targets.
        block_nll: ``[B]`` fp64, the mean of each block, NaN where a block has no counted target.
        block_tokens: ``[B]`` int64, counted targets of each block.
        kl_to_parent: KL(parent || model), nats per token; None without a parent.
        top1_agreement: share of positions, 0 to 1, where parent and model have the same most likely token.
        block_kl: ``[B]`` fp64, as ``block_nll``; None without a parent.
    """

    nll: float
    tokens: int
    block_nll: Tensor
    block_tokens: Tensor
    kl_to_parent: float | None = None
    top1_agreement: float | None = None
    block_kl: Tensor | None = None

    @property
    def perplexity(self) -> float:
        """exp(nll); infinite where that overflows."""
        return math.exp(self.nll) if self.nll < 709.0 else math.inf

    def to_json(self) -> dict[str, Any]:
        """The scalars, by the names of ``report.json``; the per-block tensors are left out."""
        record = {"nll": self.nll, "perplexity": self.perplexity, "tokens": self.tokens}
        if self.kl_to_parent is not None:
            record |= {"kl_to_parent": self.kl_to_parent, "top1_agreement": self.top1_agreement}
        return record


@torch.no_grad()
def score(
    logits: Logits,
    blocks: Blocks,
    *,
    parent: Logits | None = None,
    batch_size: int | None = None,
    description: str = "evaluating",
) -> Score:
    """NLL, and with a parent KL and top-1 agreement, of one model in one pass over ``blocks``.

    The result depends on neither ``batch_size`` nor the chunking, up to what the model itself makes of a batch.

    Args:
        logits: the model.
        blocks: ``input_ids`` int ``[B, T]`` and ``loss_mask`` bool ``[B, T]``, True where the token is a target that
            counts. The first token of a block has nothing before it and never counts.
        parent: what the model is compared with; runs on the same batches.
        batch_size: blocks a forward pass; None: ``blocks_at_once``, eight where a callable has no ``vocabulary``.
        description: label of the progress bar.

    Raises:
        ConfigError: no target counts, or logits whose shape does not fit the token ids or the parent's vocabulary.
        GuardError: NLL or KL is NaN or infinite somewhere; the message names block, position and likely cause.
    """
    ids, targets = blocks.input_ids, blocks.loss_mask.clone()
    if ids.ndim != 2 or ids.shape != targets.shape:
        raise ConfigError(
            f"blocks: input_ids {list(ids.shape)} and loss_mask {list(targets.shape)} must both be [blocks, tokens]"
        )
    if batch_size is None:
        batch_size = blocks_at_once(ids.shape[1], max(getattr(by, "vocabulary", 0) for by in (logits, parent)))
    if batch_size < 1:
        raise ConfigError(f"batch_size is a number of blocks, 1 or more, got {batch_size}")
    targets[:, :1] = False
    block_tokens = targets.sum(dim=1)
    tokens = int(block_tokens.sum())
    if tokens == 0:
        raise ConfigError(f"nothing to evaluate: none of the {ids.numel()} tokens in {len(ids)} blocks is a target")

    nll = torch.zeros(len(ids), dtype=torch.float64)
    kl = torch.zeros(len(ids), dtype=torch.float64)
    agree = 0
    for start in track(range(0, len(ids), batch_size), description, total=-(-len(ids) // batch_size)):
        batch = ids[start : start + batch_size]
        counted = targets[start : start + batch_size].nonzero()  # [N, 2]: block in the batch, position of the target
        if len(counted) == 0:
            continue
        q_NV = _TargetRows(logits, batch, counted, "the model")
        p_NV = None if parent is None else _TargetRows(parent, batch, counted, "the parent")
        token_N = batch[counted[:, 0], counted[:, 1]].long()
        where = counted[:, 0] + start
        for rows in torch.arange(len(counted)).split(max(1, CHUNK_ELEMENTS // q_NV.vocabulary)):
            log_q = q_NV.log_softmax(rows)
            lost = -log_q.gather(1, token_N[rows, None].to(log_q.device)).squeeze(1)
            nll.index_add_(0, where[rows], _finite(lost, "NLL", where[rows], counted[rows, 1]))
            if p_NV is None:
                continue
            log_p = p_NV.log_softmax(rows).to(log_q.device)
            if log_p.shape != log_q.shape:
                raise ConfigError(
                    f"the model has {log_q.shape[1]} vocabulary entries and the parent {log_p.shape[1]}: "
                    "KL compares models with one tokenizer and one vocabulary size"
                )
            p = log_p.exp()
            # A token that the parent excludes (p = 0, log p = -inf) contributes nothing; a parent's NaN stays one.
            divergence = torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(dim=1)
            kl.index_add_(0, where[rows], _finite(divergence, "KL", where[rows], counted[rows, 1]))
            agree += int((log_p.argmax(dim=1) == log_q.argmax(dim=1)).sum())

    return Score(
        nll=float(nll.sum()) / tokens,
        tokens=tokens,
        block_nll=nll / block_tokens,
        block_tokens=block_tokens,
        kl_to_parent=None if parent is None else float(kl.sum()) / tokens,
        top1_agreement=None if parent is None else agree / tokens,
        block_kl=None if parent is None else kl / block_tokens,
    )


def model_logits(model: nn.Module) -> Logits:
    """A transformers causal LM as a ``Logits`` callable: evaluation mode for the call, no cache, no gradient.

    Token ids are moved to the model's device; every submodule gets its own training mode back afterwards.
    """
    return _ModelLogits(model)


class _ModelLogits:
    """See ``model_logits``; ``vocabulary`` is the number of rows of the head, 0 for a model without one."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        self.vocabulary = 0 if head is None else int(head.weight.shape[0])

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        trained = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            device = next(self.model.parameters()).device
            return self.model(input_ids=ids.to(device=device, dtype=torch.long), use_cache=False).logits
        finally:
            for module in trained:
                module.training = True


class _TargetRows:
    """The logits that predict the counted targets of a batch: rows of ``[B * T, V]``, softmaxed a chunk at a time."""

    def __init__(self, logits: Logits, batch: Tensor, counted: Tensor, who: str) -> None:
        z = logits(batch)
        if z.ndim != 3 or z.shape[:2] != batch.shape:
            raise ConfigError(
                f"{who} returned logits {list(z.shape)} for token ids {list(batch.shape)}; expected [blocks, tokens, V]"
            )
        if int(batch.max()) >= z.shape[2]:
            raise ConfigError(
                f"token id {int(batch.max())} is outside the {z.shape[2]} vocabulary entries of {who}: "
                "the text was tokenized with another model's tokenizer"
            )
        self.vocabulary = z.shape[2]
        self._flat = z.flatten(0, 1)  # a view: nothing of size [B, T, V] is copied
        self._index = (counted[:, 0] * z.shape[1] + counted[:, 1] - 1).to(z.device)

    def log_softmax(self, rows: Tensor) -> Tensor:
        """fp32 log-probabilities ``[rows, V]`` (fp64 for fp64 logits)."""
        z = self._flat[self._index[rows.to(self._index.device)]]
        return (z if z.dtype == torch.float64 else z.float()).log_softmax(dim=1)


_CAUSE = {
    "NLL": "the model's logits hold NaN or Inf",
    "KL": "the parent's logits hold NaN or Inf, or the model excludes a token that the parent allows",
}


def _finite(values: Tensor, what: str, block: Tensor, target: Tensor) -> Tensor:
    """``values`` in fp64 on the CPU, or a GuardError that names the first position that is not finite."""
    values = values.cpu().double()
    bad = (~values.isfinite()).nonzero()
    if len(bad):
        first = int(bad[0])
        raise GuardError(
            f"{what} is {float(values[first])} in block {int(block[first])}, for the token at position "
            f"{int(target[first])}: {_CAUSE[what]}"
        )
    return values
