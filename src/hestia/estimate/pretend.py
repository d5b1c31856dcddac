"""One step of each stage, pretended: what it holds beside the weights, and how much it computes and moves.

A model of many equal blocks is pretended twice, with few blocks: every number here grows by the same amount with each
further block, so two points give the line. Peaks are kept in three parts, because their maximum would be no line:
the forward pass; the head's backward pass; the blocks' backward pass.

With a teacher the real loss runs, and one piece of fp32 numbers stands for all that are alike. The teacher's own
forward pass is a step of its own: it happens between the student's forward pass and the loss.

Attention takes the kernel that a CPU takes, which holds no [T, T] matrix, as those of CUDA hold none in bf16. In fp32
CUDA has no such kernel for grouped queries and falls back on plain products, and so does the pretence.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM

from ..nn import apply
from ..plans import Plan
from ..training.config import set_up
from ..training.distillation import Distillation, piece
from ..training.teacher import HeadInput, hold_in_bf16
from .live import LiveBytes

FEW, MORE = 3, 6
"""Blocks of the two pretended models; one of at most ``MORE`` is pretended whole."""


@dataclass(frozen=True)
class Work:
    """One pass over ``[batch, tokens]`` token ids.

    Attributes:
        forward, head, blocks: most bytes alive beside the weights in the forward pass, in the backward pass until the
            first block has a gradient, and after that; gradients included.
        held: bytes alive beside the weights between forward and backward pass.
        flops: of matrix products and attention.
        moved: bytes read and written.
    """

    forward: int
    head: int
    blocks: int
    held: int
    flops: int
    moved: int

    @property
    def peak(self) -> int:
        """The most bytes alive at once beside the weights."""
        return max(self.forward, self.head, self.blocks)


@dataclass(frozen=True, kw_only=True)
class Step:
    """What is pretended.

    Attributes:
        batch, tokens: shape of the token ids of one process and micro-batch.
        plan: applied to the model; None runs the parent.
        training: forward, backward and gradients, else a forward pass in evaluation mode.
        calibrating: the backward pass of calibration, which keeps one gradient at a time.
        teacher: configuration of the model whose logits give the loss.
        distill: what that loss is.
        teaching: the forward pass of a teacher, without its head where that can be spared.
        device: the kind that is reckoned for: it decides how much is computed at once, and by which kernels.
        bf16: under bf16 autocast.
        checkpointing: recompute activations.
        train_embeddings: False freezes them.
    """

    batch: int
    tokens: int
    plan: Plan | None = None
    training: bool = False
    calibrating: bool = False
    teacher: Any = None
    distill: Distillation = field(default_factory=Distillation)
    teaching: bool = False
    device: str = "cpu"
    bf16: bool = False
    checkpointing: bool = False
    train_embeddings: bool = True


def pretend(config: Any, step: Step, *, trust_remote_code: bool = False) -> Work:
    """The work of one step of the model that ``config`` describes."""
    text = config.get_text_config()
    blocks = int(getattr(text, "num_hidden_layers", 0))
    if blocks <= MORE:
        return _run(config, step, trust_remote_code)
    few, more = (_run(shortened(config, n), step, trust_remote_code) for n in (FEW, MORE))
    slope = {k: (v - getattr(few, k)) / (MORE - FEW) for k, v in vars(more).items()}
    return Work(**{k: max(0, round(v + slope[k] * (blocks - MORE))) for k, v in vars(more).items()})


def shortened(config: Any, blocks: int) -> Any:
    """The same model with fewer blocks: the first ones."""
    out = copy.deepcopy(config)
    text = out.get_text_config()
    if isinstance(getattr(text, "layer_types", None), list):
        text.layer_types = text.layer_types[:blocks]
    text.num_hidden_layers = blocks
    return out


def _run(config: Any, step: Step, trust_remote_code: bool) -> Work:
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
        if step.plan is not None:
            there = dict(model.named_modules())
            layers = {path: layer for path, layer in step.plan.layers.items() if path in there}
            apply(model, dataclasses.replace(step.plan, layers=layers))
        if step.teaching and step.bf16:
            hold_in_bf16(model)
        model.train(step.training)
        set_up(model, train_embeddings=step.train_embeddings, checkpointing=step.checkpointing)
        ids = torch.zeros(step.batch, step.tokens, dtype=torch.long)
        student = None if step.teacher is None else _Student(model, step, live)
        spared = step.teaching and spares_head(model)
        base, live.moved, live.flops = live.now, 0, 0
        live.restart()
        with sdpa_kernel(SDPBackend.MATH) if _plain_attention(config, step) else nullcontext():
            if step.training:
                peaks = _train(model, ids, step, live, student)
            elif step.calibrating:
                peaks = _calibrate(model, ids, live)
            else:
                peaks = _score(model.base_model if spared else model, ids, step, live)
        forward, head, blocks, held = (peak - base for peak in peaks)
        return Work(forward, head, blocks, held, live.flops, live.moved)


def _plain_attention(config: Any, step: Step) -> bool:
    """Whether CUDA has no fused kernel: fp32 with fewer key heads than query heads."""
    text = config.get_text_config()
    heads = int(getattr(text, "num_attention_heads", 0))
    return step.device == "cuda" and not step.bf16 and int(getattr(text, "num_key_value_heads", None) or heads) < heads


def _score(model: Any, ids: Tensor, step: Step, live: LiveBytes) -> tuple[int, int, int, int]:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=step.bf16):
        out = model(input_ids=ids, use_cache=False)[0]
    held = live.now
    del out
    peak = live.restart()
    return peak, peak, peak, held


def _train(model: Any, ids: Tensor, step: Step, live: LiveBytes, student: _Student | None) -> tuple[int, int, int, int]:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=step.bf16):
        out = model(input_ids=ids, labels=ids, use_cache=False)[0] if student is None else student.forward(ids)
    forward = live.restart()
    gc.collect()  # whether what the forward pass left in cycles is gone must not be chance
    held = live.restart()
    head = _head_peak(model, live)
    loss = out if student is None else student.loss(out, ids)
    del out
    # the ones that it would take by itself have no value; a teacher's loss asks for it
    loss.backward(torch.tensor(1.0))
    blocks = live.restart()
    return forward, head() or blocks, blocks, held


class _Student:
    """A training step with a teacher, as ``training.trainer`` takes it; the teacher's hidden states are there."""

    def __init__(self, model: Any, step: Step, live: LiveBytes) -> None:
        self.model, self.step = model, step
        self.head = model.get_output_embeddings()
        self.spared = spares_head(model) and type(self.head) is nn.Linear and self.head.bias is None
        text = step.teacher.get_text_config()
        self.answers = nn.Linear(int(text.hidden_size), int(text.vocab_size), bias=False)
        if step.bf16 and not text.tie_word_embeddings:
            hold_in_bf16(self.answers)
        self.distill = _OnePiece(**vars(step.distill), device=torch.device(step.device), live=live)

    def forward(self, ids: Tensor) -> Tensor:
        """The input of the head, or the logits where it cannot be spared."""
        with HeadInput(self.head) if self.spared else nullcontext() as head_input:
            logits = self.model(input_ids=ids, use_cache=False).logits
            if head_input is None:
                return logits
            assert head_input.kept is not None
            return head_input.kept

    def loss(self, out: Tensor, ids: Tensor) -> Tensor:
        """The loss of what ``forward`` gave."""
        dtype = torch.bfloat16 if self.step.bf16 else torch.float32
        hidden = torch.empty(ids.numel(), self.answers.in_features, dtype=dtype)

        def answer(part: slice) -> Tensor:
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.step.bf16):
                return self.answers(hidden[part])

        if self.spared:
            given = out.flatten(0, 1), self.head.weight, ids.flatten(), answer
            return self.distill.loss_through_head(*given, dtype=dtype)
        return self.distill.loss(out.float().flatten(0, 1), ids.flatten(), answer)


@dataclass(frozen=True, kw_only=True)
class _OnePiece(Distillation):
    """The loss with one piece of its fp32 numbers computed for all."""

    device: torch.device
    live: LiveBytes

    def into_gradient(
        self, logits: Tensor, teacher: Tensor, labels: Tensor, count: Tensor | int, out: Tensor
    ) -> Tensor:
        before, rows = self.live.moved, piece(logits.shape[-1], self.device, len(logits))
        loss, gradient = self.of_chunk(logits[:rows].float(), teacher[:rows].float(), labels[:rows])
        out[:rows].copy_(gradient)
        self.live.moved += round((len(logits) / rows - 1.0) * (self.live.moved - before))
        return loss.sum()


@torch.no_grad()
def spares_head(model: Any) -> bool:
    """Whether the logits are the head's output of the last hidden state, which ``training.teacher`` tries with numbers.

    Without numbers it is asked whether they are the same tensors: a soft cap or a scale makes others.
    """
    made: list[Tensor] = []
    body, head = model.base_model, model.get_output_embeddings()
    if head is None or body is model:
        return False
    hooks = [
        body.register_forward_hook(lambda _, inputs, out: made.append(out[0])),
        head.register_forward_hook(lambda _, inputs, out: made.extend((inputs[0], out))),
    ]
    logits = model(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=False).logits
    for hook in hooks:
        hook.remove()
    hidden, given, out = made
    return out is logits and given.untyped_storage() is hidden.untyped_storage()


def _head_peak(model: nn.Module, live: LiveBytes) -> Callable[[], int]:
    """The peak until a parameter inside the blocks gets its gradient; ask after the backward pass."""
    found: list[int] = []

    def note(_: Tensor) -> None:
        if not found:
            found.append(live.restart())

    for name, parameter in model.named_parameters():
        if parameter.requires_grad and any(part.isdigit() for part in name.split(".")):
            parameter.register_post_accumulate_grad_hook(note)
    return lambda: found[0] if found else 0


def _calibrate(model: Any, ids: Tensor, live: LiveBytes) -> tuple[int, int, int, int]:
    """As ``curvature.estimators.backward``: squares of one gradient at a time, and a view of a zero in its place."""
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not model.get_output_embeddings()]
    logits = model(input_ids=ids, use_cache=False).logits
    forward, held = live.restart(), live.now
    zero = logits.new_zeros(())
    found: list[int] = []

    def consume(gradient: Tensor) -> Tensor:
        if not found:
            found.append(live.restart())
        gradient.float().square()
        return zero.expand_as(gradient)

    for weight in weights:
        weight.register_hook(consume)
    torch.autograd.grad(logits, weights, grad_outputs=torch.zeros_like(logits))
    blocks = live.restart()
    return forward, found[0], blocks, held
