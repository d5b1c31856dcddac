"""What llama.cpp's CPU kernels do to the numbers that weights are multiplied with, in PyTorch.

The stored weights are exact; what differs from the frozen model is that every matrix product first rounds its other
side to a partner of the weight's type:

    Q8_K   TQ1_0 TQ2_0 Q2_K Q3_K Q4_K    blocks of 256: m the entry of largest magnitude with its sign, i = -127 / m,
                                         q = min(127, rint(i x)), value q / i
    Q8_0   Q1_0 Q2_0 Q4_0 Q8_0           blocks of 32: d = max|x| / 127, q = rint(x / d), value q fp16(d)
    F16    F16                           the nearest fp16
    BF16   BF16                          the nearest bf16
    none   F32

GELU is looked up in a table of fp16 numbers: ``gelu(x) = fp16(gelu(fp16(x)))`` between -10 and 10.

``emulating`` puts this into a loaded model, so the divergence that the engine's arithmetic explains is computed for the
very model and text at hand, rather than guessed. What it leaves out is far smaller: the order of fp32 sums, and how a
difference that lands on the other side of a rounding boundary travels through later layers. Hence the factor of
``kl_bound``.

Source: quantize_row_q8_0, quantize_row_q8_K_ref, type_traits_cpu and ggml_vec_gelu_f32 of llama.cpp at 0c1e57098.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..targets import StorageType

FACTOR = 1.5
"""An engine may diverge this much more than its emulation. Measured over every architecture and type of the matrix in
docs/exporting.md the ratio lies between 0.9 and 1.1; a wrong scale or row order costs a hundred times the emulation."""

FLOOR = 1e-8
"""Nats a position that fp32 sums in another order may cost: 1e-12 measured on F32 files of small models."""

NLL_FLOOR = 1e-5
"""Nats per token that the same may move the NLL, which changes in the first order where KL changes in the second: up to
2e-7 measured."""


def round_q8_0(x: Tensor) -> Tensor:
    """``x [..., I]`` as Q8_0 holds it, blocks of 32 along the last dimension."""
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // 32, 32)
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    inverse = torch.where(largest > 0, 127.0 / largest, torch.zeros_like(largest))
    return ((blocks * inverse).round() * (largest / 127.0).half().float()).reshape(x.shape)


def round_q8_k(x: Tensor) -> Tensor:
    """``x [..., I]`` as Q8_K holds it, blocks of 256 along the last dimension."""
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // 256, 256)
    extreme = blocks.gather(-1, blocks.abs().argmax(dim=-1, keepdim=True))
    inverse = torch.where(extreme != 0, -127.0 / extreme, torch.zeros_like(extreme))
    codes = (blocks * inverse).round().clamp_(max=127.0)
    return (codes * torch.where(extreme != 0, 1.0 / inverse, torch.zeros_like(extreme))).reshape(x.shape)


def round_f16(x: Tensor) -> Tensor:
    """The nearest fp16."""
    return x.half().float()


def round_bf16(x: Tensor) -> Tensor:
    """The nearest bf16."""
    return x.bfloat16().float()


ROUNDING: dict[str, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(("TQ1_0", "TQ2_0", "Q2_K", "Q3_K", "Q4_K"), round_q8_k),
    **dict.fromkeys(("Q1_0", "Q2_0", "Q4_0", "Q8_0"), round_q8_0),
    "F16": round_f16,
    "BF16": round_bf16,
}
"""Storage type of a weight -> what happens to its input; types that are not here leave it alone."""


def kl_bound(kl_emulated: float) -> float:
    """The largest mean KL(frozen || engine), in nats a position, that the engine's arithmetic explains."""
    return FACTOR * kl_emulated + FLOOR


@contextlib.contextmanager
def emulating(
    model: nn.Module, storage: Mapping[str, StorageType], stored: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """Make an fp32 transformers model compute like llama.cpp's CPU backend while the block runs.

    Args:
        model: a loaded causal LM.
        storage: module path -> storage type of its weight.
        stored: parameter name -> its values as the file holds them, for embeddings and heads that were rounded.
    """
    undo: list[Callable[[], None]] = []
    try:
        for name, values in (stored or {}).items():
            undo.append(_replace(model.get_parameter(name), values))
        for path, kind in storage.items():
            rounding, module = ROUNDING.get(kind.name), _module(model, path)
            if rounding is not None and isinstance(module, nn.Linear):
                undo.append(module.register_forward_pre_hook(_before(rounding)).remove)
        for module in model.modules():
            if type(module).__name__ == "GELUTanh":
                undo.append(module.register_forward_pre_hook(_before(round_f16)).remove)
                undo.append(module.register_forward_hook(_through_table).remove)
        yield
    finally:
        for step in reversed(undo):
            step()


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _before(rounding: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    return lambda module, inputs: (rounding(inputs[0]), *inputs[1:])


def _through_table(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    del module
    return torch.where(inputs[0].abs() < 10, round_f16(output), output)


def _replace(parameter: nn.Parameter, values: Tensor) -> Callable[[], None]:
    before = parameter.data
    parameter.data = values.to(before.dtype)

    def restore() -> None:
        parameter.data = before

    return restore
