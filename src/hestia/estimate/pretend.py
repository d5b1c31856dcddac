"""One step of each stage, pretended: what it holds beside the weights, and how much it computes and moves.

A model of many equal blocks is pretended twice, with few blocks: every number here grows by the same amount with each
further block, so two points give the line. Peaks are kept in three parts, because their maximum would be no line:
the forward pass; the head's backward pass; the blocks' backward pass.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from ..nn import apply
from ..plans import Plan
from .live import LiveBytes

FEW, MORE = 3, 6
"""Blocks of the two pretended models; one of at most ``MORE`` is pretended whole."""


@dataclass(frozen=True)
class Work:
    """One pass over ``[batch, tokens]`` token ids.

    Attributes:
        forward, head, blocks: most bytes alive beside the weights in the forward pass, in the backward pass until the
            first block has a gradient, and after that; gradients included.
        flops: of matrix products and attention.
        moved: bytes read and written.
    """

    forward: int
    head: int
    blocks: int
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
        bf16: under bf16 autocast.
        checkpointing: recompute activations.
        train_embeddings: False freezes them.
    """

    batch: int
    tokens: int
    plan: Plan | None = None
    training: bool = False
    calibrating: bool = False
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
        model.train(step.training)
        if step.checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        if not step.train_embeddings:
            for module in model.modules():
                if isinstance(module, nn.Embedding):
                    module.requires_grad_(False)
        ids = torch.zeros(step.batch, step.tokens, dtype=torch.long)
        base, live.moved = live.now, 0
        live.restart()
        with FlopCounterMode(display=False) as counter:
            forward, head, blocks = (_train if step.training else _calibrate if step.calibrating else _score)(
                model, ids, step, live
            )
        return Work(forward - base, head - base, blocks - base, counter.get_total_flops(), live.moved)


def _score(model: Any, ids: Tensor, step: Step, live: LiveBytes) -> tuple[int, int, int]:
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    del logits
    peak = live.restart()
    return peak, peak, peak


def _train(model: Any, ids: Tensor, step: Step, live: LiveBytes) -> tuple[int, int, int]:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=step.bf16):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    forward = live.restart()
    head = _head_peak(model, live)
    loss.backward()
    blocks = live.restart()
    return forward, head() or blocks, blocks


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


def _calibrate(model: Any, ids: Tensor, step: Step, live: LiveBytes) -> tuple[int, int, int]:
    """As ``curvature.estimators.backward``: squares of one gradient at a time, and a view of a zero in its place."""
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not model.get_output_embeddings()]
    logits = model(input_ids=ids, use_cache=False).logits
    forward = live.restart()
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
    return forward, found[0], blocks
