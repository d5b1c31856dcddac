"""QuantLinear: a linear layer whose weight goes through the equation on its way to the matrix product.

training   y = x w_hat^T + b,   w_hat = (1 - lambda) w + lambda level Q_tau(w / step)     tau = base * factor
eval       y = x w_q^T   + b,   w_q   = snap(level) Q(w / step)                           what will be exported

Three additions, each only where plan and schedule ask for it: a held tensor that the scale rule reads, a residual
``r(t) w`` on w_hat, and an output shift, ``lambda shift(w)`` on y, which becomes part of b when frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..quant import HeldRule, QuantizedTensor, Quantizer, QuantSpec
from .held import Held, not_narrowed
from .knobs import Knobs
from .shards import is_sharded, sharded_as, whole


class QuantLinear(nn.Linear):
    """``nn.Linear`` that shares the very same weight and bias Parameters and quantizes on the fly.

    Args:
        linear: the layer it replaces; its Parameters are taken over, not copied.
        spec: grid, groups, scale rule and estimator.
        knobs: the model's pressure and temperature.
        temperature_factor: exp(alpha (s_i - c)) of this tensor.

    Attributes:
        parent_dtype: what the rest of the model has, and frozen weights get.
        born: version counter of the weight when it came into the layer; an optimizer's steps raise the weight's.
        asked: whether training has asked for ``effective_weight``; a compiled graph does not say.
    """

    def __init__(self, linear: nn.Linear, spec: QuantSpec, knobs: Knobs, temperature_factor: float = 1.0) -> None:
        nn.Module.__init__(self)  # nn.Linear's own __init__ would allocate and draw a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.quantizer = Quantizer(spec)
        self.temperature_factor = temperature_factor
        self.knobs = knobs
        self.parent_dtype = linear.weight.dtype
        self._hestia = Held(self.quantizer, linear.weight) if isinstance(spec.scale, HeldRule) else None
        self.born = linear.weight._version
        self.asked = False
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name nn.Linear gives it
        """``x [..., in_features] -> [..., out_features]``; hard and snapped in eval mode."""
        shift = self.quantizer.spec.output_shift
        if shift is None:
            return F.linear(input, self.effective_weight().to(input.dtype), self.bias)
        if not self.training:
            return F.linear(input, self.effective_weight().to(input.dtype), self.shifted_bias().to(input.dtype))
        out = F.linear(input, self.effective_weight().to(input.dtype), self.bias)
        return out + (self.knobs.pressure * self.shift()).to(out.dtype)

    def effective_weight(self) -> Tensor:
        """The weight that this layer multiplies with, ``[O, I]``: w_hat in training, the frozen one in eval mode."""
        if not self.training:
            return self.quantizer.hard(self.weight, self.held)
        if not torch.compiler.is_compiling():
            self.asked = True
        knobs = self.knobs
        w_hat = self.quantizer.fake(self.weight, knobs.pressure, knobs.temperature * self.temperature_factor, self.held)
        return w_hat if knobs.residual is None else w_hat + knobs.residual * self.weight

    @property
    def held(self) -> Tensor | None:
        """What the scale rule holds between steps: a learned scale, an importance, or nothing."""
        return None if self._hestia is None else self._hestia.tensor

    def restart(self) -> None:
        """Fill what is held anew from the weight, after a model born on the meta device got its weights."""
        if self._hestia is not None:
            self._hestia.restart(self.quantizer, whole(self.weight))

    def shift(self) -> Tensor:
        """The output shift ``[O]`` of the latent weight, differentiable in it."""
        shift = self.quantizer.spec.output_shift
        assert shift is not None
        weight = whole(self.weight)
        return shift(weight, self.quantizer.codes(weight, self._whole_held()).codes)

    @torch.no_grad()
    def shifted_bias(self) -> Tensor:
        """Bias and output shift in one, in the parent's dtype: the bias that this layer freezes to."""
        shift = self.shift()
        return (shift if self.bias is None else whole(self.bias).to(shift.dtype) + shift).to(self.parent_dtype)

    @torch.no_grad()
    def fold_shift(self) -> None:
        """Put ``shifted_bias`` into the bias, which is created if there was none; before the weight is frozen."""
        bias = self.shifted_bias()
        if self.bias is None or is_sharded(self.bias):
            self.bias = nn.Parameter(bias, requires_grad=self.weight.requires_grad)
        else:
            self.bias.data = bias

    def unsnapped(self) -> Tensor:
        """The hard ``level Q(w / step)`` before the level is snapped, which corrections pull to; detached."""
        one = torch.ones((), dtype=torch.float32, device=self.weight.device)
        out = self.quantizer.fake(whole(self.weight.detach()), one, torch.zeros_like(one), self._whole_held()).detach()
        return sharded_as(self.weight, out)

    def codes(self) -> QuantizedTensor:
        """The integers and snapped scales that this layer freezes to; of a sharded weight, all processes call it."""
        return self.quantizer.codes(whole(self.weight), self._whole_held())

    def gain(self) -> Tensor | None:
        """The surrogate's gain at every weight now, detached; None where it is 1 everywhere."""
        temperature = self.knobs.temperature * self.temperature_factor
        return self.quantizer.gain(whole(self.weight), temperature, self._whole_held())

    def _whole_held(self) -> Tensor | None:
        return None if self.held is None else whole(self.held)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Casts reach the bias and what the layer freezes to; the latent weight stays fp32 or wider."""
        self.parent_dtype = fn(torch.empty(0, dtype=self.parent_dtype, device=self.weight.device)).dtype
        wide, latent = not_narrowed(fn), self.weight

        def move(tensor: Tensor) -> Tensor:
            return wide(tensor) if tensor is latent or tensor is latent.grad else fn(tensor)

        return super()._apply(move, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.born = self.weight._version  # what is loaded was not trained here

    @torch.no_grad()
    def unquantized(self) -> nn.Linear:
        """A plain ``nn.Linear`` that shares the Parameters (and so keeps ties and optimizer references)."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = self.weight
        linear.register_parameter("bias", self.bias)
        linear.train(self.training)
        return linear

    def extra_repr(self) -> str:
        """Shown in ``print(model)``."""
        spec = self.quantizer.spec
        return (
            f"{super().extra_repr()}, grid={spec.grid.name}, group_size={spec.group_size}, scale={spec.scale.name}, "
            f"estimator={spec.estimator.name}, temperature_factor={self.temperature_factor:.4g}"
        )
