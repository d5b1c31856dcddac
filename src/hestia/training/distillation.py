"""Port ``teacher``: distillation from a full-precision model, composable with every recipe.

    loss = (1 - weight) CE(label, q) + weight D(p, q),   averaged over the positions that have a label, temperature 1

    forward_kl   D = KL(p || q) = sum p (log p - log q)       p: teacher, q: student
    reverse_kl   D = KL(q || p)
    akl          D = g_h / (g_h + g_t) KL(p || q) + g_t / (g_h + g_t) KL(q || p)
                 g = sum |p - q| over the head of p (its largest probabilities as long as they sum to at most 1/2, the
                 largest in any case) and over the tail; no gradient through g

noise: both read the text with that share of its tokens replaced by any others (data/noise.py); the labels are those
of the text.

Source of akl: Wu et al. 2024, arXiv:2404.02657. Its head is looked for among the 256 largest probabilities.

Memory: where the student's head is a linear layer and nothing else, as in nearly all models, the loss is taken from the
head's input: logits, probabilities and gradients of both exist for ``positions`` positions at a time, and what is kept
for the backward pass are the gradients of the head and of its input. For other heads the teacher's logits and the fp32
probabilities are as short-lived, and the gradient of the student's logits is kept, in their dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
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
        noise: share of the tokens read that are replaced by others.
        positions: tokens whose logits are in memory at once.

    Raises:
        ConfigError: an unknown divergence, a weight or a noise outside [0, 1], or no position at all.
    """

    divergence: str = "forward_kl"
    weight: float = 0.5
    noise: float = 0.0
    positions: int = 1024

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise ConfigError(f"--distill {self.divergence!r}: {nearest(self.divergence, DIVERGENCES)}")
        if not 0.0 <= self.weight <= 1.0:
            raise ConfigError(f"--distill-weight must lie in [0, 1], got {self.weight}")
        if not 0.0 <= self.noise <= 1.0:
            raise ConfigError(f"--distill-noise must lie in [0, 1], got {self.noise}")
        if self.positions < 1:
            raise ConfigError(f"positions must be 1 or more, got {self.positions}")

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
        if logits.dtype == torch.float16:  # which cannot hold a gradient over the number of labels
            logits = logits.float()
        out = _FromLogits.apply(logits, labels, teacher, self, _labelled(labels) if count is None else count)
        assert isinstance(out, Tensor)
        return out

    def loss_through_head(
        self,
        hidden: Tensor,
        head: Tensor,
        labels: Tensor,
        teacher: Callable[[slice], Tensor],
        count: Tensor | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The same loss, differentiable in the head's input and weight; never more than ``positions`` rows of logits.

        Args:
            hidden: the input of the student's head ``[N, H]``.
            head: its weight ``[V, H]``.
            labels, teacher, count: as for ``loss``.
            dtype: of the products and the logits, fp32 in place of fp16; None: of ``hidden``.
        """
        count = _labelled(labels) if count is None else count
        dtype = dtype or hidden.dtype
        if dtype == torch.float16:
            hidden, dtype = hidden.float(), torch.float32
        out = _FromHidden.apply(hidden, head, labels, teacher, self, count, dtype)
        assert isinstance(out, Tensor)
        return out

    def into_gradient(
        self, logits: Tensor, teacher: Tensor, labels: Tensor, count: Tensor | int, out: Tensor
    ) -> Tensor:
        """The summed loss of a few positions; ``out``, which may be ``logits``, gets its gradient over ``count``."""
        exact = torch.promote_types(logits.dtype, torch.float32)
        rows = piece(logits.shape[-1], logits.device, len(logits))
        total = torch.zeros((), dtype=exact, device=logits.device)
        chunks = (x.split(rows) for x in (logits, teacher, labels, out))
        for x, t, label, gradient in zip(*chunks, strict=True):
            loss, g = self.of_chunk(x.to(exact), t.to(exact), label)
            counts = label != -100
            total += loss.masked_fill_(~counts, 0.0).sum()
            gradient.copy_(g.mul_((counts.to(exact) / count).unsqueeze(-1)))
        return total

    def of_chunk(self, logits: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss ``[n]`` and its gradient ``[n, V]``, from fp32 logits ``[n, V]`` and labels ``[n]``.

        With f the share of KL(p || q) in D, 1 - f that of KL(q || p), and e the label's unit vector:

            d loss / d logits = (1 - weight) (q - e) + weight f (q - p) + weight (1 - f) q (log q/p - KL(q || p))

        With l and t the logits, log p/q = t - l + log sum exp l - log sum exp t: no logarithm of a probability is taken
        that may have become 0.
        """
        q, p, toward = F.softmax(logits, dim=-1), F.softmax(teacher, dim=-1), teacher - logits
        log_sum = _log_sum(logits, q)
        shift = log_sum - _log_sum(teacher, p)
        forward = self._forward_share(p, q)
        loss = self.weight * forward * (_dot(p, toward) + shift)
        if self.weight == 1.0 and self.divergence == "forward_kl":
            gradient = q.sub_(p)
        else:
            label, share = labels.clamp_min(0).unsqueeze(-1), self.weight * (1.0 - forward)
            reverse = _dot(q, toward)
            loss += (1.0 - self.weight) * (log_sum - logits.gather(-1, label)) - share * (reverse + shift)
            gradient = (reverse - toward).mul_(share).add_(1.0 - self.weight + self.weight * forward).mul_(q)
            gradient.addcmul_(p, forward * -self.weight)
            gradient.scatter_add_(-1, label, torch.full_like(loss, self.weight - 1.0))
        return loss.squeeze(-1), gradient

    def _forward_share(self, p: Tensor, q: Tensor) -> Tensor:
        if self.divergence == "akl":
            return head_share(p, q).unsqueeze(-1)
        return p.new_full((1, 1), float(self.divergence == "forward_kl"))


def piece(vocabulary: int, device: torch.device, positions: int) -> int:
    """How many of ``positions`` rows of logits have fp32 numbers beside them at once on ``device``."""
    return max(1, CACHED // vocabulary) if device.type == "cpu" else positions


def head_share(p: Tensor, q: Tensor) -> Tensor:
    """g_h / (g_h + g_t) of every position ``[n]``; 1 where p and q agree, so that AKL is forward KL there."""
    gap = (p - q).abs()
    largest, where = p.topk(min(HEAD_TOKENS, p.shape[-1]), dim=-1)
    inside = largest.cumsum(dim=-1) <= HEAD_SHARE
    inside[..., 0] = True
    head, both = (gap.gather(-1, where) * inside).sum(dim=-1), gap.sum(dim=-1)
    return torch.where(both > 0, head / both.clamp_min(torch.finfo(both.dtype).tiny), 1.0)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Row by row ``[n, 1]``. A GPU would take ``vecdot`` for n matrix products of one row and one column."""
    return torch.linalg.vecdot(x, y).unsqueeze(-1) if x.device.type == "cpu" else (x * y).sum(dim=-1, keepdim=True)


def _log_sum(logits: Tensor, softmax: Tensor) -> Tensor:
    """log sum exp of ``[n, V]`` as ``[n, 1]``: the largest probability is exp(largest logit) over that sum."""
    return logits.amax(dim=-1, keepdim=True) - softmax.amax(dim=-1, keepdim=True).log_()


def _labelled(labels: Tensor) -> Tensor:
    return (labels != -100).sum().clamp_min(1)


class _FromLogits(torch.autograd.Function):
    """The loss; every chunk's gradient is computed at once, so that no chunk outlives its turn."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        teacher: Callable[[slice], Tensor],
        options: Distillation,
        count: Tensor | int,
    ) -> Tensor:
        gradient = torch.empty_like(logits)
        total = torch.zeros((), dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
        for start in range(0, len(logits), options.positions):
            part = slice(start, min(len(logits), start + options.positions))
            total += options.into_gradient(logits[part], teacher(part), labels[part], count, gradient[part])
        ctx.save_for_backward(gradient)
        return total / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _times(grad, *ctx.saved_tensors), None, None, None, None


class _FromHidden(torch.autograd.Function):
    """The same from the head's input; the gradient takes the place of the logits, and is gone after two products."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        labels: Tensor,
        teacher: Callable[[slice], Tensor],
        options: Distillation,
        count: Tensor | int,
        dtype: torch.dtype,
    ) -> Tensor:
        of_hidden = torch.empty_like(hidden)
        of_head = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        weight = head.to(dtype)
        total = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=hidden.device)
        for start in range(0, len(hidden), options.positions):
            part = slice(start, min(len(hidden), start + options.positions))
            inputs = hidden[part].to(dtype)
            logits = inputs @ weight.T
            total += options.into_gradient(logits, teacher(part), labels[part], count, logits)
            of_hidden[part] = logits @ weight
            if of_head is not None:
                of_head += logits.T @ inputs
        ctx.save_for_backward(of_hidden, *([] if of_head is None else [of_head]))
        return total / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        of_hidden, *of_head = ctx.saved_tensors
        return _times(grad, of_hidden), *(_times(grad, g) for g in of_head or [None]), None, None, None, None, None


def _times(grad: Tensor, kept: Tensor | None) -> Tensor | None:
    """In place, as nobody else holds it; mostly there is nothing to do, and a pass over all of it to spare."""
    return kept if kept is None or grad == 1.0 else kept.mul_(grad)
