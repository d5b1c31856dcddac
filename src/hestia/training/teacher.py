"""The two models of a distillation: the teacher that answers, and the student whose head is spared.

Whether a head may be left out of the forward pass, and applied to a few positions at a time, is tried on the model
itself (``plain_head``), not read off its configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_T = TypeVar("_T")


class HeadInput:
    """While it is entered, the model's head sees no position and gives no logits; what it was to see is kept.

    Attributes:
        kept: the head's last input ``[B, T, H]``.
    """

    def __init__(self, head: nn.Linear) -> None:
        self.head = head
        self.kept: Tensor | None = None
        self._hook: Any = None

    def __enter__(self) -> HeadInput:
        self._hook = self.head.register_forward_pre_hook(self._keep)
        return self

    def __exit__(self, *exception: object) -> None:
        self._hook.remove()
        self.kept = None

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.kept = inputs[0]
        return (inputs[0][:, :0],)


@torch.no_grad()
def plain_head(model: Any, input_ids: Tensor) -> nn.Module | None:
    """The output embeddings, where the logits are what they make of the last hidden state and nothing else.

    Args:
        model: a causal language model in evaluation mode.
        input_ids: some tokens to try it on, ``[B, T]``.
    """
    try:
        head = model.get_output_embeddings()
        split = head(model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state)
    except (AttributeError, TypeError, RuntimeError):
        return None
    return head if torch.equal(split, model(input_ids=input_ids, use_cache=False).logits) else None


def rounded_anyway(model: nn.Module) -> list[nn.Parameter]:
    """The weights and biases of linear layers that no other module shares: bf16 autocast rounds them at every use."""
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    elsewhere = {id(p) for m in model.modules() if type(m) is not nn.Linear for p in m.parameters(recurse=False)}
    found = {id(p): p for linear in linears for p in linear.parameters(recurse=False) if id(p) not in elsewhere}
    return list(found.values())


def hold_in_bf16(model: nn.Module) -> nn.Module:
    """The model with ``rounded_anyway`` held in bf16, in place: under autocast it answers bit for bit the same."""
    for parameter in rounded_anyway(model):
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


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
    def answer(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Callable[[slice], Tensor]:
        """positions of the flattened ``input_ids [B, T]`` -> logits ``[n, V]``; the mask as transformers takes it."""

        def asked(rows: slice) -> dict[str, Any]:
            mask = {} if attention_mask is None else {"attention_mask": attention_mask[rows]}
            return {"input_ids": input_ids[rows], "use_cache": False, **mask}

        if self.model.device != input_ids.device:
            self.model.to(input_ids.device)
        if self._plain_head is None:
            self._plain_head = self._run(lambda: plain_head(self.model, input_ids[:1, :4])) is not None
        if self._plain_head:
            body = self.model.base_model
            out = self._run(lambda: body(**asked(slice(None))).last_hidden_state)
            hidden = out.flatten(0, 1)
            return lambda part: self._run(lambda: self.model.get_output_embeddings()(hidden[part]))
        steps = input_ids.shape[1]
        last: dict[int, Tensor] = {}  # the sequence that the next positions may still belong to

        def sequence(row: int) -> Tensor:
            if row not in last:
                logits = self._run(lambda: self.model(**asked(slice(row, row + 1))).logits)
                last.clear()
                last[row] = logits
            return last[row]

        def whole_sequences(part: slice) -> Tensor:
            first, end = part.start // steps, -(-part.stop // steps)
            rows = [sequence(row) for row in range(first, end)]
            return torch.cat(rows).flatten(0, 1)[part.start - first * steps : part.stop - first * steps]

        return whole_sequences

    @torch.no_grad()
    def _run(self, work: Callable[[], _T]) -> _T:
        with torch.autocast(self.model.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            return work()
