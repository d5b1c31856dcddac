"""Every published method as its paper has it: a loop-free transcription for one group, differentiated by autograd.

Each function takes a vector of weights (one group) and returns w_hat, in which ``stop`` marks what the paper does not
differentiate: ``w + stop(f(w) - w)`` has the value of f and an identity gradient. Nothing here is taken from src.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def stop(x: Tensor) -> Tensor:
    return x.detach()


def straight(value: Tensor, w: Tensor, mask: Tensor | float = 1.0) -> Tensor:
    """``value`` forward, ``mask`` times the identity backward."""
    return stop(value) + (w - stop(w)) * mask


def absmean_ste(w: Tensor) -> Tensor:
    s = stop(w.abs().mean() + 1e-5)
    return straight(s * torch.clamp(torch.round(w / s), -1, 1), w)


def twn(w: Tensor, factor: float = 0.75) -> Tensor:
    delta = factor * w.abs().mean() + 0.5e-5  # every rule of the house keeps its step positive
    survivors = w.abs() > delta
    s = w.abs()[survivors].mean()
    return straight(s * w.sign() * survivors, w)


def seq(w: Tensor, alpha: Tensor, weights: int) -> Tensor:
    """ParetoQ at ternary: n_levels 1.5, shift 0, clip 0.99, gradient scale 1 / sqrt(weights), Qp = 1."""
    x = stop(w / alpha)
    q = torch.round(torch.clamp(x, -0.99, 0.99) * 1.5) / 1.5
    middle = (x.abs() <= 0.99).to(w.dtype)
    slope = torch.where(x < -0.99, -1.0, torch.where(x > 0.99, 1.0, q - x)) / math.sqrt(weights)
    return straight(stop(alpha) * q, w, middle) + (alpha - stop(alpha)) * stop(slope)


def lsq(w: Tensor, alpha: Tensor, weights: int, low: int, high: int, gain: Tensor | float = 1.0) -> Tensor:
    x = stop(w / alpha)
    middle = ((x >= low) & (x <= high)).to(w.dtype)
    slope = torch.where(x < low, float(low), torch.where(x > high, float(high), torch.round(x) - x))
    value = stop(alpha) * torch.clamp(torch.round(x), low, high)
    return straight(value, w, middle * gain) + (alpha - stop(alpha)) * slope / math.sqrt(weights * high)


def stableqat(w: Tensor, alpha: Tensor, weights: int, low: int, high: int, amplitude: float = 0.21) -> Tensor:
    x = stop(w / alpha)
    wave = math.sqrt(2) * math.pi * amplitude * torch.cos(math.pi * (x + torch.round(x)))
    return lsq(w, alpha, weights, low, high, (1 - wave) / (1 + wave))


def dsq(w: Tensor, alpha: Tensor, weights: int, low: int, high: int, a: float = 0.2) -> Tensor:
    """The published chain, sign with an identity gradient included; only alpha's gradient scale is by hand."""
    scaled = alpha / math.sqrt(weights * high)
    alpha = scaled + stop(alpha - scaled)
    x = w / alpha
    interval = stop(torch.floor(x - low))
    middle = interval + 0.5 + low
    phi = torch.tanh((x - middle) * math.log(2 / a - 1)) / (1 - a)
    hard = straight(torch.where(phi > 0, 1.0, -1.0).to(w.dtype), phi)
    stair = hard / 2 + 0.5 + interval + low
    stair = stair + torch.relu(low - stair)
    stair = stair - torch.relu(stair - high)
    return stair * alpha


def tequila_shift(w: Tensor, strength: float = 1e-3) -> Tensor:
    dead = (w.abs() < w.abs().mean() / 2 + 0.5e-5).to(w.dtype)
    return strength * (w * stop(dead)).sum()


def sherry(w: Tensor) -> Tensor:
    q = torch.zeros_like(w)
    for start in range(0, len(w), 4):
        block = stop(w)[start : start + 4]
        dropped = min(range(4), key=lambda i: (float(block[i].abs()), i))
        for i in range(4):
            q[start + i] = 0.0 if i == dropped else (-1.0 if block[i] < 0 else 1.0)
    s = stop(w).abs()[q != 0].mean()
    return straight(s * q, w)


def quest(w: Tensor, clip: float = 1.224) -> Tensor:
    """Mid-tread: step = clip rms, levels -step, 0, step; trusted within half a step."""
    step = stop(clip * w.square().mean().sqrt() + 1e-5)
    x = torch.clamp(torch.round(stop(w) / step), -1, 1) * step
    return straight(x, w, ((x - stop(w)).abs() <= step / 2).to(w.dtype))


def quasar(w: Tensor, h: Tensor) -> Tensor:
    """Every candidate tried, the error written out."""
    v = stop(w)
    size = v.abs().mean() + 1e-5
    best: tuple[float, Tensor] | None = None
    for k in range(17):
        q = v.sign() * (v.abs() > (0.4 + 0.05 * k) * size)
        if not bool((q != 0).any()):
            continue
        s = (h * q * v).sum() / (h * q * q).sum()
        error = float((h * (s * q - v) ** 2).sum())
        if best is None or error < best[0]:
            best = (error, s * q)
    assert best is not None
    return straight(best[1], w)


def dlt(w: Tensor, alpha: Tensor, factor: float = 0.75) -> Tensor:
    """alpha t + 0: learned scale, TWN's threshold, no shift."""
    v = stop(w)
    t = v.sign() * (v.abs() > factor * v.abs().mean() + 0.5e-5)
    return straight(stop(alpha) * t, w) + (alpha - stop(alpha)) * t
