"""Hearth: hestia's soft rounding, begun cold, around the scale that rounds best.

    w_hat = (1 - lambda(t)) w + lambda(t) level Q_tau(w / step)        Q_tau: mean of pi(q|z) ~ exp(-(z - q)^2 / tau)

    step  = 1.5 mean|w| + eps (``scale`` twn; from 2 bits on that of the rule ``gaussian``, which is 1.53 mean|w| on
            {-1, 0, 1}), or mean|w| + eps (absmean and least_squares)
    level = step (absmean), or sum(q w) / sum(q^2) over the group with q = Q_tau(w / step), soft while tau is (``soft``)
            or the hard codes (not ``soft``); at tau = 0 both are the least-squares level that is frozen
            (``scale`` saliency, up to 1.58 bits: threshold and level of the least importance-weighted error, see
            quasar; from 2 bits on as twn)

    lambda = min(1, t / rho)
    tau    = temperature for t <= rho, then half a cosine to 0 at ``hard_from``, and 0 from there on (None: at the end)
    d w_hat / d w = (1 - lambda) + lambda (level / step) clip((2 / tau) Var_pi(q), floor, ceiling)           tau > 0
                  = (1 - lambda) + lambda (level / step) (gain of ``tail``: 1 for ste)                       tau = 0
    after the optimizer's step, for t > pull_start:   w <- w - lr pull (t - pull_start) / (1 - pull_start) (w - w_hat)

Sources: Wang et al. 2026 (Hestia, arXiv:2601.20745) for the relaxation and its schedule; Li et al. 2016 (TWN,
arXiv:1605.04711) for the step; the level refitted to the soft value, the bounds on the gain and the composition are
this toolkit's; the pull is CAGE's (arXiv:2510.18784), the weighted scale QUASAR's (arXiv:2608.13966), the tails
QuEST's (arXiv:2502.05003) and StableQAT's (arXiv:2601.19320). A teacher is no part of a recipe: ``--teacher parent
--distill forward_kl`` adds it to this one as to any other.
Ports: correction (``pull`` > 0), importance (``scale`` saliency).

Why this scale: rounding starts 0.46 nats lower than with absmean (benchmarks/results/experiments/starts.json). Why
cold: every step that the forward pass is far from the rounded weights trains another model. Of 0.3, 0.1 and 0.05 the
coldest won over 0.5M tokens of text alone, the middle one over 2M with a teacher; a pressure phase of a twentieth beat
one of a fifth each time, all with one seed (docs/log.md). Why the level follows the soft value: the hard least-squares
level times a soft value overshoots every weight between two levels; refitted, w_hat is the best multiple of Q_tau at
any tau. What did not help, and so is off: bounds on the gain (a floor changed nothing, a ceiling cost 0.007 nats) and
the pull.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from ..errors import ConfigError
from ..quant import (
    TWN,
    AbsMean,
    Correction,
    Gaussian,
    Grid,
    GroupSize,
    LeastSquares,
    Pull,
    QuantSpec,
    Saliency,
    ScaleRule,
    Softmax,
)
from ..schedules import KnobSchedule
from .base import Recipe


@dataclass(frozen=True, kw_only=True)
class Hearth(Recipe):
    """A composition of measured parts; its defaults are what won on a small model.

    Attributes:
        rho: share of the run over which pressure rises.
        temperature: tau0.
        hard_from: share of the run after which rounding is hard; None anneals to the end.
        tail: estimator whose gradient is used from then on; another than ste needs such a part of the run.
        scale: rule of the scale; twn and saliency are gaussian from 2 bits on.
        soft: refit the level to the soft value (least_squares and twn).
        floor: least gain of the softmax.
        ceiling: largest gain of the softmax; None is unbounded.
        pull: CAGE's strength, in units of the learning rate; 0 is none.
        pull_start: share of the run after which it pulls.
        every: steps between two hand-overs of importance (saliency).
        search: whether saliency tries 17 thresholds at every step, as quasar does, or keeps TWN's.

    Raises:
        ConfigError: a tail in a run whose rounding is never hard.
    """

    name: ClassVar[str] = "hearth"
    widths: ClassVar[tuple[float, ...]] = (1.0, 1.58, 2.0, 3.0, 4.0)
    rho: float = 0.05
    temperature: float = 0.1
    hard_from: float | None = None
    tail: Literal["ste", "clipped_ste", "trust", "damped_fourier"] = "ste"
    scale: Literal["absmean", "least_squares", "twn", "saliency"] = "twn"
    soft: bool = True
    floor: float = 0.0
    ceiling: float | None = None
    pull: float = 0.0
    pull_start: float = 0.8
    every: int = 1
    search: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tail != "ste" and self.hard_from in (None, 1.0) and self.temperature > 0.0:
            raise ConfigError(
                f"recipe 'hearth': tail={self.tail!r} serves the steps after hard_from, and there are none with "
                f"hard_from={self.hard_from}: give both, such as --option hard_from=0.85"
            )

    def _spec(self, grid: Grid, group_size: GroupSize) -> QuantSpec:
        threshold = Saliency() if self.search else Saliency(lowest=0.75, candidates=1)
        rules: dict[str, ScaleRule] = {
            "absmean": AbsMean(),
            "least_squares": LeastSquares(soft=self.soft),
            "twn": TWN(soft=self.soft),
            "saliency": replace(threshold, every=self.every),
        }
        if len(grid.levels) > 3:
            rules["twn"] = rules["saliency"] = Gaussian(soft=self.soft)
        estimator = Softmax(floor=self.floor, ceiling=self.ceiling, hard=self.tail)
        return QuantSpec(grid=grid, group_size=group_size, scale=rules[self.scale], estimator=estimator)

    def schedule(self) -> KnobSchedule:
        return KnobSchedule(rho=self.rho, temperature=self.temperature, hard_from=self.hard_from)

    def correction(self) -> Correction | None:
        return Pull(strength=self.pull, start=self.pull_start) if self.pull else None
