"""One weight's quantizer, from latent weight to codes:

    w_hat = (1 - lambda) w  +  lambda * level * Q_tau(w / step; C)

``Quantizer.fake`` trains with it (its two passes are in ``relax.py``), ``Quantizer.codes`` freezes it. Everything that
training, evaluation, export and the report know about a quantized weight comes from this file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from .codes import QuantizedTensor
from .estimators import Estimator
from .grids import Grid
from .grouping import GroupSize, to_groups
from .held import HeldRule
from .relax import Relax, RelaxLearned
from .scales import ScaleRule, Scales, snap
from .spec import QuantSpec


class Quantizer:
    """One weight's quantizer: a pure function of the weight, the pressure and the temperature.

    ``held`` is what a ``HeldRule`` keeps between steps, a learned scale ``[R * G]`` or an importance
    ``[O, I]``; every other rule has none.

    Args:
        spec: the grid, groups, scale rule and estimator.
    """

    def __init__(self, spec: QuantSpec) -> None:
        self.spec = spec

    def scales(self, w_RGN: Tensor, held: Tensor | None = None) -> Scales:
        """Detached step and level of every group, ``[R, G, 1]``."""
        return self.spec.scales(w_RGN.detach(), None if held is None else self._grouped(held.detach(), w_RGN))

    def fake(self, w_OI: Tensor, pressure: Tensor, temperature: Tensor, held: Tensor | None = None) -> Tensor:
        """w_hat for training, differentiable in ``w_OI`` and in a learned scale; same shape and dtype.

        Args:
            w_OI: latent weight; bf16 and fp16 are computed in fp32.
            pressure: 0-d, 0 (the weight itself, bit for bit) to 1 (quantized).
            temperature: 0-d, 0 (hard) or more.
            held: see the class.
        """
        w = to_groups(_exact(w_OI), self.spec.group_size)
        relax = RelaxLearned if self.spec.learns and held is not None else Relax
        grouped = None if held is None else self._grouped(held, w)
        out = relax.apply(w, pressure.to(w.dtype), temperature.to(w.dtype), self.spec, grouped)
        assert isinstance(out, Tensor)
        return out.reshape(w_OI.shape).to(w_OI.dtype)

    @torch.no_grad()
    def gain(self, w_OI: Tensor, temperature: Tensor, held: Tensor | None = None) -> Tensor | None:
        """The surrogate's own gain ``[R, G, N]`` at every weight, without pressure; None where it is 1 everywhere."""
        w = to_groups(_exact(w_OI.detach()), self.spec.group_size)
        z = w / self.scales(w, held).step
        return self.spec.estimator.gain(z, self.spec.grid, temperature.to(z.dtype))

    @torch.no_grad()
    def codes(self, w_OI: Tensor, held: Tensor | None = None) -> QuantizedTensor:
        """The frozen weight: ``codes = Q(w / step)``, ``scales = snap(level)``; ties and codes as in training.

        The codes use the unsnapped step, so snapping changes the scales alone, inside ``snap``'s range by 0.4 % at
        most (3 % on -8 .. 7).
        """
        w = to_groups(_exact(w_OI.detach()), self.spec.group_size)
        step, level = self.scales(w, held)
        unit = self.spec.grid.unit
        codes = (self.spec.grid.round(w / step) / unit).to(torch.int8)
        scales = snap(level * unit, self.spec.grid).squeeze(-1).float()
        return QuantizedTensor(codes.reshape(w_OI.shape), scales, self.spec.group_size)

    @torch.no_grad()
    def hard(self, w_OI: Tensor, held: Tensor | None = None) -> Tensor:
        """``codes(w).dense()`` without the int8 detour: what evaluation computes and export stores; fp32."""
        w = to_groups(_exact(w_OI.detach()), self.spec.group_size)
        step, level = self.scales(w, held)
        unit = self.spec.grid.unit
        return (self.spec.grid.round(w / step) / unit * snap(level * unit, self.spec.grid)).reshape(w_OI.shape).float()

    def start(self, w_OI: Tensor) -> Tensor | None:
        """What the scale rule holds when training begins; None for a rule that holds nothing."""
        if not isinstance(self.spec.scale, HeldRule):
            return None
        held = self.spec.scale.start(to_groups(w_OI.detach(), self.spec.group_size), self.spec.grid)
        return held.flatten() if self.spec.learns else held.reshape(w_OI.shape)

    def _grouped(self, held: Tensor, w_RGN: Tensor) -> Tensor:
        """A held tensor as the rules want it, ``[R, G, 1]`` or ``[R, G, N]``, in the dtype of the weight."""
        rows, groups, _ = w_RGN.shape
        return held.reshape(rows, groups, -1).to(w_RGN.dtype)


def _exact(w: Tensor) -> Tensor:
    """``w`` in fp32 or, where it is fp64, as it is: what training, freezing and evaluation all compute in."""
    return w.to(torch.promote_types(w.dtype, torch.float32))


def fake_quantize(
    w: Tensor,
    *,
    levels: list[float] | tuple[float, ...] = (-1, 0, 1),
    group_size: GroupSize = "row",
    scale: str | ScaleRule = "absmean",
    estimator: str | Estimator = "softmax",
    temperature: float | Tensor = 0.0,
    pressure: float | Tensor = 1.0,
) -> Tensor:
    """The differentiable quantizer as one function: ``(1 - pressure) w + pressure s Q_tau(w / s; levels)``.

    The same code that ``QuantLinear`` runs.

    Args:
        w: weight ``[out_features, in_features]`` (a vector counts as one row).
        levels: the grid, in units of the scale.
        group_size: weights that share a scale: an int, "row" or "tensor".
        scale: rule by name ("absmean", "absmax", "least_squares", "twn", "rms", "gaussian"; "saliency", all weights
            alike) or as an object; not one that learns, which needs a layer to keep its scale.
        estimator: by name ("softmax", "ste", "clipped_ste", "trust", "tanh", "damped_fourier") or as an object.
        temperature: 0 is hard forward; the gradient of "softmax" at pressure 1 is then ``level / step``, which is the
            identity where a rule has one scale for both.
        pressure: 0 returns ``w``, bit for bit.

    Raises:
        ConfigError: an unknown name, an impossible grid or group size, a scale rule that learns, a weight of three or
            more dimensions; the message names what is allowed.

    Source: Wang et al. 2026, arXiv:2601.20745, eq. 10 and section 4.1.

    >>> w = torch.tensor([[0.9, 0.1, -0.5, 0.5]])
    >>> fake_quantize(w, estimator="ste")
    tensor([[ 0.5000,  0.0000, -0.5000,  0.5000]])
    """
    if w.ndim > 2:
        raise ConfigError(
            f"fake_quantize wants one matrix [out_features, in_features], got {tuple(w.shape)}: call it for each matrix"
        )
    spec = QuantSpec(
        grid=Grid.of(list(levels)),
        group_size=group_size,
        scale=scale if isinstance(scale, ScaleRule) else ScaleRule.make(scale),
        estimator=estimator if isinstance(estimator, Estimator) else Estimator.make(estimator),
    )
    if spec.learns:
        raise ConfigError(
            f"fake_quantize keeps nothing between calls; scale={spec.scale.name!r} learns. Use a rule that reads the "
            "weight, such as 'absmean' or 'least_squares', or hestia.apply with a recipe that learns its scale"
        )
    knob = {"dtype": torch.float64 if w.dtype == torch.float64 else torch.float32, "device": w.device}
    w_hat = Quantizer(spec).fake(
        w if w.ndim == 2 else w.reshape(1, -1), torch.as_tensor(pressure, **knob), torch.as_tensor(temperature, **knob)
    )
    return w_hat.reshape(w.shape)
