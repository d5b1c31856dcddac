"""Do bits go where they matter? Mixed-precision plans by every score against uniform, random and positional ones.

    python benchmarks/curvature/plans.py --models DIR --data DIR [--only NAME]

At equal true bits (packed codes of 1, 1.6, 2, 3 or 4 bits and one 16-bit scale per row; q/k/v and gate/up alike) every
plan is rounded, rule ``gaussian``, without training, and the whole model's KL to its parent is measured on held-out
sequences. Scores see calibration text only. A score that does not depend on the width (trace, Q-BERT, LieQ) follows
the high-rate law: damage = score x weights x 4^-bits. Differences are paired over held-out sequences: mean, and 95 % t
interval.

    uniform      the widest width that fits the budget (it may leave some of the budget unspent: its bits are printed)
    positional   uniform, and what is left goes to the first and last layers
    random       mean over 5 seeds
    at uniform   the score's plan at exactly the bits that uniform takes
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import torch
from metrics import CALIBRATION, HESSIAN, Bench, missing, parser

from hestia.curvature.allocation import Allocation, Problem, optimum, positional, random_widths, uniform
from hestia.curvature.inputs import input_moments
from hestia.curvature.intervals import mean_interval
from hestia.curvature.scores import Evidence, Score
from hestia.files import write_json
from hestia.progress import announce
from hestia.provenance import machine, versions
from hestia.recipes import GRIDS

BUDGETS = (1.6, 1.8, 2.0, 2.5, 3.0)
PACKED = {1.0: 1.0, 1.58: 1.6, 2.0: 2.0, 3.0: 3.0, 4.0: 4.0}
"""Width -> bits a packed code takes; five ternary codes share a byte."""
RANDOM_SEEDS = range(5)
WINNER = "quadratic (gnb)"

Damages = dict[str, dict[float, float]]


def stored_bytes(bench: Bench) -> dict[str, dict[float, int]]:
    """Module path -> width -> bytes, scales included."""
    out = {}
    for path, weight in bench.weights.items():
        rows, columns = weight.shape
        out[path] = {width: -int(-rows * columns * bits // 8) + 2 * rows for width, bits in PACKED.items()}
    return out


def damages(bench: Bench) -> dict[str, Damages]:
    """Score -> module path -> width -> damage."""
    gnb = Evidence(sensitivity=bench.measure("gnb", CALIBRATION))
    direct = Evidence(sensitivity=bench.measure("kl", HESSIAN))
    eigen = Evidence(sensitivity=bench.measure("eigen", HESSIAN // 4))
    moments = input_moments(bench.model, list(bench.weights), bench.calibration[:CALIBRATION])
    weighed = Evidence(sensitivity=gnb.sensitivity, weights=bench.weights, inputs=moments)
    make = Score.make
    return {
        WINNER: by_width(bench, make("quadratic"), gnb),
        "direct KL": by_width(bench, make("kl"), direct),
        "omega (gnb)": by_width(bench, make("omega"), gnb),
        "delta_loss (gnb)": by_width(bench, make("delta_loss"), gnb),
        "hestia: trace (gnb)": by_width(bench, make("hestia"), gnb),
        "eigen: HAWQ": by_width(bench, make("eigen"), eigen),
        "eigen: Q-BERT": by_width(bench, make("eigen", form="q_bert"), eigen, law=True),
        "baq": by_width(bench, make("baq"), weighed),
        "lieq": by_width(bench, make("lieq"), weighed),
    }


def by_width(bench: Bench, score: Score, evidence: Evidence, *, law: bool = False) -> Damages:
    """One score's damages at every width."""
    out: Damages = {path: {} for path in bench.weights}
    for width, grid in GRIDS.items():
        found = score.damage(evidence, grid.name)
        follows_law = law or not score.by_candidate
        for path, value in found.items():
            factor = bench.weights[path].numel() * 4.0**-grid.bits if follows_law else 1.0
            out[path][width] = value * factor
    return out


class Measured:
    """KL of whole rounded models on the held-out sequences, each allocation measured once."""

    def __init__(self, bench: Bench) -> None:
        from hestia.curvature.estimators import Candidates

        self.bench = bench
        self.candidates = Candidates(bench.weights, bench.specs)
        self.parent = [self._log_probabilities(ids) for ids in bench.held_out]
        self._known: dict[tuple[tuple[str, float], ...], list[float]] = {}

    @torch.no_grad()
    def _log_probabilities(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(self.bench.model(input_ids=ids[None]).logits[0, :-1].float(), -1)

    @torch.no_grad()
    def kl(self, widths: Mapping[str, float]) -> list[float]:
        """Nats per token, one number a sequence."""
        key = tuple(sorted(widths.items()))
        if key not in self._known:
            kept = {path: weight.data for path, weight in self.bench.weights.items()}
            try:
                for path, width in widths.items():
                    self.bench.weights[path].data = self.candidates.dense(path, GRIDS[width].name)
                self._known[key] = [
                    float((p.exp() * (p - self._log_probabilities(ids))).sum(-1).mean())
                    for p, ids in zip(self.parent, self.bench.held_out, strict=True)
                ]
            finally:
                for path, data in kept.items():
                    self.bench.weights[path].data = data
        return self._known[key]


def difference(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Paired over sequences: mean of ours - theirs and its 95 % t interval."""
    mean, half = mean_interval([a - b for a, b in zip(ours, theirs, strict=True)])
    return {"mean": round(mean, 5), "low": round(mean - half, 5), "high": round(mean + half, 5)}


def row(found: Allocation, kl: list[float]) -> dict[str, Any]:
    """An allocation in numbers."""
    used = sorted(set(found.widths.values()))
    return {
        "bits": round(found.bits, 4),
        "kl": round(statistics.fmean(kl), 5),
        "predicted": float(f"{found.damage:.4g}"),
        "tensors_at": {f"{width:g}": sum(w == width for w in found.widths.values()) for width in used},
    }


def compare(bench: Bench, stored: dict[str, dict[float, int]], scores: dict[str, Damages]) -> list[dict[str, Any]]:
    """Every budget: controls, scores, and the paired differences to the controls."""
    weights = {path: weight.numel() for path, weight in bench.weights.items()}
    measured = Measured(bench)
    problems = {name: Problem.of(stored, weights, damage) for name, damage in scores.items()}
    plain = problems[WINNER]
    rows = []
    for bits in BUDGETS:
        budget = plain.bytes_for(bits)
        flat, ends = uniform(plain, budget), positional(plain, budget)
        chance = [random_widths(plain, budget, seed) for seed in RANDOM_SEEDS]
        flat_kl, ends_kl = measured.kl(flat.widths), measured.kl(ends.widths)
        chance_kl = [measured.kl(found.widths) for found in chance]
        mean_chance = [statistics.fmean(column) for column in zip(*chance_kl, strict=True)]
        record: dict[str, Any] = {
            "budget": bits,
            "controls": {
                "uniform": row(flat, flat_kl),
                "positional": row(ends, ends_kl),
                "random": {
                    "bits": round(statistics.fmean(found.bits for found in chance), 4),
                    "kl": round(statistics.fmean(mean_chance), 5),
                    "kl_of_each": [round(statistics.fmean(kl), 5) for kl in chance_kl],
                },
            },
            "scores": {},
        }
        for name, problem in problems.items():
            found = optimum(problem, budget)
            kl = measured.kl(found.widths)
            at_uniform = optimum(problem, flat.stored)
            record["scores"][name] = {
                **row(found, kl),
                "minus_uniform": difference(kl, flat_kl),
                "minus_positional": difference(kl, ends_kl),
                "minus_random": difference(kl, mean_chance),
                "at_uniform": {
                    **row(at_uniform, measured.kl(at_uniform.widths)),
                    "minus_uniform": difference(measured.kl(at_uniform.widths), flat_kl),
                },
            }
        rows.append(record)
        announce(f"{bits} bits: uniform {statistics.fmean(flat_kl):.3f}, {WINNER} {record['scores'][WINNER]['kl']:.3f}")
    return rows


def main() -> None:
    """Measure what has no result yet."""
    for name, path, bench in missing("plans", parser(__doc__).parse_args()):
        record = {
            "schema": 1,
            "name": name,
            "command": "python benchmarks/curvature/plans.py",
            "seed": bench.seed,
            "held_out_sequences": len(bench.held_out),
            "packed_bits": {f"{width:g}": bits for width, bits in PACKED.items()},
            "versions": versions(),
            "machine": machine(torch.device("cpu")),
            "budgets": compare(bench, stored_bytes(bench), damages(bench)),
        }
        write_json(path, record)


if __name__ == "__main__":
    main()
