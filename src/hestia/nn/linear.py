"""QuantLinear: a linear layer whose weight goes through the equation on its way to the matrix product.

training   y = x w_hat^T + b,   w_hat = (1 - lambda) w + lambda level Q_tau(w / step)     tau = base * factor
eval       y = x w_q^T   + b,   w_q   = snap(level) Q(w / step)                           what will be exported
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..quant import QuantizedTensor, Quantizer, QuantSpec
from .knobs import Knobs


class QuantLinear(nn.Linear):
    """``nn.Linear`` that shares the very same weight and bias Parameters and quantizes on the fly.

    Args:
        linear: the layer it replaces; its Parameters are taken over, not copied.
        spec: grid, groups, scale rule and estimator.
        knobs: the model's pressure and temperature.
        temperature_factor: exp(alpha (s_i - c)) of this tensor.
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
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name nn.Linear gives it
        """``x [..., in_features] -> [..., out_features]``; hard and snapped in eval mode."""
        return F.linear(input, self.effective_weight().to(input.dtype), self.bias)

    def effective_weight(self) -> Tensor:
        """The weight that this layer multiplies with, ``[O, I]``: w_hat in training, the frozen one in eval mode."""
        if not self.training:
            return self.quantizer.hard(self.weight)
        return self.quantizer.fake(self.weight, self.knobs.pressure, self.knobs.temperature * self.temperature_factor)

    def codes(self) -> QuantizedTensor:
        """The integers and snapped scales that this layer freezes to."""
        return self.quantizer.codes(self.weight)

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
