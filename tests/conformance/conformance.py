"""What every test of the suite starts from: one recipe at one width, and a toy model with all that can go wrong.

The parent is a Qwen2: biases that are not zero, grouped heads, a head tied to the embedding. A recipe that freezes a
shift into biases gets a Llama instead, which has a place for all of them: biases in attention, none yet in the MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from toy_models import IDS, qwen2, tied_llama

import hestia
from hestia import recipes
from hestia.loading import cast_parameters
from hestia.nn import Knobs, knobs_of, quantized_modules, select
from hestia.quant import GroupSize

TIMES = (0.0, 0.1, 0.5, 0.9, 1.0)
"""Where in the schedule gradients are looked at: start, inside the ramp, middle, nearly hard, hard."""


@dataclass(frozen=True)
class Case:
    """A discovered recipe at one of its widths."""

    recipe: str
    bits: float

    def __str__(self) -> str:
        return f"{self.recipe}-{self.bits:g}"

    @property
    def shifts(self) -> bool:
        """Whether it freezes an output shift into biases."""
        return recipes.get(self.recipe).spec_for(self.bits, "row").output_shift is not None

    @property
    def make(self) -> Callable[[], nn.Module]:
        """The toy architecture it is applied to."""
        return biased_llama if self.shifts else qwen2

    def parent(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The toy model before the surgery; rotary buffers stay fp32, as in a model that was loaded."""
        model = self.make()
        cast_parameters(model, dtype)
        return model

    @property
    def target(self) -> str:
        """A file format that holds this width in rows of 32."""
        return "hf" if self.bits <= 2.0 else "hf:int4"

    def plan(self, model: nn.Module, group_size: GroupSize = "row") -> hestia.Plan:
        """Its plan with default options, and curvatures that differ from tensor to tensor."""
        traces = {path: 10.0**k for k, path in enumerate(select(model).candidates)}
        return hestia.plan(model, self.recipe, self.target, traces, bits=self.bits, group_size=group_size)

    def converted(
        self,
        make: Callable[[], nn.Module] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        group_size: GroupSize = "row",
        t: float = 0.5,
    ) -> tuple[nn.Module, hestia.Plan]:
        """A toy model under this recipe, in training mode, with the knobs at ``t``."""
        model = (make or self.make)()
        cast_parameters(model, dtype)
        plan = self.plan(model, group_size)
        hestia.apply(model, plan)
        move(model, plan, t)
        return model.train(), plan


def biased_llama() -> nn.Module:
    """A tied Llama with biases in attention that are not zero."""
    return tied_llama(attention_bias=True)


def without_ports(names: Iterable[str]) -> list[str]:
    """State-dict keys, or parameter names, without those that a port added."""
    return [name for name in names if "._hestia." not in name]


PORTS_BIASES = [f"model.layers.{k}.mlp.{x}_proj.bias" for k in range(2) for x in ("gate", "up", "down")]
"""What freezing a shift adds to ``biased_llama``."""


CASES = [Case(name, bits) for name in recipes.names() for bits in recipes.get(name).widths]
TRAINED = [case for case in CASES if recipes.get(case.recipe).trains]
ONE_WIDTH = [
    min((case for case in TRAINED if case.recipe == name), key=lambda case: abs(case.bits - 1.58))
    for name in dict.fromkeys(case.recipe for case in TRAINED)
]
"""Each recipe that trains once, ternary if it can, for what costs seconds."""


def move(model: nn.Module, plan: hestia.Plan, t: float) -> None:
    """Set the knobs as the clock does at ``t``."""
    knobs_of(model).set(**plan.schedule.at(t))


def logits(model: nn.Module) -> Tensor:
    """The model's answer to two fixed sequences, ``[2, 8, vocab]``."""
    return model(input_ids=IDS, use_cache=False).logits


def loss(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    """Mean NLL of the next token."""
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def gradients(model: nn.Module, compute: Callable[[nn.Module], Tensor] = loss) -> dict[str, Tensor]:
    """Parameter name -> gradient of one backward pass."""
    model.zero_grad()
    compute(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def disturb(model: nn.Module) -> None:
    """Move every latent weight off the numbers it started from, as training does."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, layer in quantized_modules(model):
            layer.weight += 0.1 * torch.randn(layer.weight.shape, generator=generator)


def knob_modules(model: nn.Module) -> set[int]:
    """ids of the knobs that the layers of ``model`` read."""
    return {id(layer.knobs) for _, layer in quantized_modules(model)} | {
        id(m) for m in model.modules() if isinstance(m, Knobs)
    }


class Perceptron(nn.Module):
    """Two linear layers: the least that ``torch.compile`` can show us, in a second instead of ten."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.nn.functional.gelu(self.up(x)))
