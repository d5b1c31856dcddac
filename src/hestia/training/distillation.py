"""Port ``teacher``: distillation from a full-precision model, composable with every recipe.

    loss = (1 - weight) CE(label, q) + weight D(p, q),   averaged over the positions that have a label, temperature 1

    forward_kl   D = KL(p || q) = sum p (log p - log q)       p: teacher, q: student
    reverse_kl   D = KL(q || p)
    akl          D = g_h / (g_h + g_t) KL(p || q) + g_t / (g_h + g_t) KL(q || p)
                 g = sum |p - q| over the head of p (its largest probabilities as long as they sum to at most 1/2, the
                 largest in any case) and over the tail; no gradient through g

Source of akl: Wu et al. 2024, arXiv:2404.02657. Its head is looked for among the 256 largest probabilities.

Memory: the teacher's logits exist for a few positions at a time, and so do the fp32 probabilities of both; what is kept
for the backward pass is the gradient with respect to the student's logits, in their dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError, nearest

Divergence = Literal["forward_kl", "reverse_kl", "akl"]
DIVERGENCES: tuple[str, ...] = get_args(Divergence)
HEAD_SHARE = 0.5
HEAD_TOKENS = 256
CACHED = 1 << 17
"""Logits whose fp32 numbers a processor keeps in its cache; with more, fresh memory takes longer than the sums."""


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """What the student learns from the teacher.

    Args:
        divergence: "forward_kl", "reverse_kl" or "akl".
        weight: share of the divergence in the loss; the rest is cross entropy.
        positions: tokens whose logits are in memory at once.

    Raises:
        ConfigError: an unknown divergence or a weight outside [0, 1].
    """

    divergence: str = "forward_kl"
    weight: float = 0.5
    positions: int = 1024

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise ConfigError(f"--distill {self.divergence!r}: {nearest(self.divergence, DIVERGENCES)}")
        if not 0.0 <= self.weight <= 1.0:
            raise ConfigError(f"--distill-weight must lie in [0, 1], got {self.weight}")

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        teacher: Callable[[slice], Tensor],
        count: Tensor | int | None = None,
    ) -> Tensor:
        """The loss of a batch, 0-d fp32, differentiable in ``logits``.

        Args:
            logits: the student's ``[N, V]``.
            labels: ``[N]``, the token that position n predicts; -100 has no part in the loss.
            teacher: positions -> the teacher's logits ``[n, V]``, detached.
            count: what the sum is divided by; None means the number of labels.
        """
        if count is None:
            count = (labels != -100).sum().clamp_min(1)
        out = _Distilled.apply(logits, labels, teacher, self)
        assert isinstance(out, Tensor)
        return out / count

    def of_chunk(self, logits: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Summed loss and its gradient ``[n, V]``, from fp32 logits ``[n, V]`` and labels ``[n]``.

        With f the share of KL(p || q) in D, 1 - f that of KL(q || p), and e the label's unit vector:

            d loss / d logits = (1 - weight) (q - e) + weight f (q - p) + weight (1 - f) q (log q/p - KL(q || p))
        """
        log_q, log_p = F.log_softmax(logits, dim=-1), F.log_softmax(teacher, dim=-1)
        q, p = log_q.exp(), log_p.exp()
        loss, label = torch.zeros_like(logits[:, :1]), labels.clamp_min(0).unsqueeze(-1)
        if self.weight < 1.0:
            loss -= (1.0 - self.weight) * log_q.gather(-1, label)
        ratio, forward = log_q.sub_(log_p), self._forward_share(p, q)
        loss -= self.weight * forward * (p * ratio).sum(dim=-1, keepdim=True)
        gradient = q.clone().mul_(1.0 - self.weight + self.weight * forward)
        gradient.addcmul_(p, forward * -self.weight)
        if self.divergence != "forward_kl":
            reverse, share = (q * ratio).sum(dim=-1, keepdim=True), self.weight * (1.0 - forward)
            loss += share * reverse
            gradient.addcmul_(ratio.sub_(reverse).mul_(q), share)
        gradient.scatter_add_(-1, label, torch.full_like(loss, self.weight - 1.0))
        unlabelled = (labels == -100).unsqueeze(-1)
        return loss.masked_fill_(unlabelled, 0.0).sum(), gradient.masked_fill_(unlabelled, 0.0)

    def _forward_share(self, p: Tensor, q: Tensor) -> Tensor:
        if self.divergence == "akl":
            return head_share(p, q).unsqueeze(-1)
        return p.new_full((1, 1), float(self.divergence == "forward_kl"))


def head_share(p: Tensor, q: Tensor) -> Tensor:
    """g_h / (g_h + g_t) of every position ``[n]``; 1 where p and q agree, so that AKL is forward KL there."""
    gap = (p - q).abs()
    largest, where = p.topk(min(HEAD_TOKENS, p.shape[-1]), dim=-1)
    inside = largest.cumsum(dim=-1) <= HEAD_SHARE
    inside[..., 0] = True
    head, both = (gap.gather(-1, where) * inside).sum(dim=-1), gap.sum(dim=-1)
    return torch.where(both > 0, head / both.clamp_min(torch.finfo(both.dtype).tiny), 1.0)


class _Distilled(torch.autograd.Function):
    """The summed loss; every chunk's gradient is computed at once, so that no chunk outlives its turn."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, teacher: Callable[[slice], Tensor], options: Distillation
    ) -> Tensor:
        gradient = torch.empty_like(logits)
        exact = torch.promote_types(logits.dtype, torch.float32)
        total = torch.zeros((), dtype=exact, device=logits.device)
        for start in range(0, len(logits), options.positions):
            part = slice(start, min(len(logits), start + options.positions))
            answer = teacher(part)
            rows = len(answer) if logits.is_cuda else max(1, CACHED // answer.shape[-1])
            chunks = (x.split(rows) for x in (logits[part], answer, labels[part], gradient[part]))
            for x, t, label, out in zip(*chunks, strict=True):
                loss, g = options.of_chunk(x.to(exact), t.to(exact), label)
                total += loss
                out.copy_(g)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grad), None, None, None  # nobody else holds it


class Teacher:
    """A frozen model that answers with logits, a few positions at a time.

    Where the head is a linear layer on the hidden states, and nothing else, as in nearly all models, it is applied
    chunk by chunk; other models (a soft cap, a scale on the logits) answer with whole sequences.

    Args:
        model: a causal language model; it is put in evaluation mode and gets no gradients.
        bf16: whether to run it in bf16 autocast, as the student runs.
    """

    def __init__(self, model: nn.Module, *, bf16: bool = False) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self.bf16 = bf16
        self.vocabulary = int(self.model.get_output_embeddings().weight.shape[0])
        self._plain_head: bool | None = None

    @torch.no_grad()
    def answer(self, input_ids: Tensor) -> Callable[[slice], Tensor]:
        """positions of the flattened ``input_ids [B, T]`` without the last of each row -> logits ``[n, V]``."""
        if self.model.device != input_ids.device:
            self.model.to(input_ids.device)
        if self._plain_head is None:
            self._plain_head = self._head_is_all(input_ids[:1, :4])
        if self._plain_head:
            hidden = self._run(lambda: self._hidden(input_ids))[:, :-1].flatten(0, 1)
            return lambda part: self._run(lambda: self.model.get_output_embeddings()(hidden[part]))
        steps = input_ids.shape[1] - 1

        def whole_sequences(part: slice) -> Tensor:
            first, last = part.start // steps, -(-part.stop // steps)
            rows = [
                self._run(lambda ids=ids: self.model(input_ids=ids, use_cache=False).logits)[:, :-1]
                for ids in input_ids[first:last].split(1)
            ]
            return torch.cat(rows).flatten(0, 1)[part.start - first * steps : part.stop - first * steps]

        return whole_sequences

    def _hidden(self, input_ids: Tensor) -> Tensor:
        return self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state

    def _head_is_all(self, input_ids: Tensor) -> bool:
        try:
            split = self.model.get_output_embeddings()(self._hidden(input_ids))
        except (AttributeError, TypeError, RuntimeError):
            return False
        return torch.equal(split, self.model(input_ids=input_ids, use_cache=False).logits)

    @torch.no_grad()
    def _run(self, work: Callable[[], Tensor]) -> Tensor:
        with torch.autocast(self.model.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            return work()
