"""Which number predicts how much quantizing a tensor hurts? Every metric against the measured KL, tensor by tensor.

    python benchmarks/curvature/metrics.py --models DIR --data DIR [--only NAME]

Truth: one tensor is rounded (row scales, rule ``gaussian``), all others stay; KL to the parent on held-out sequences
(of the test files), in nats per token. Every metric sees other sequences (for books-6m of the valid files, else of the
training text), and the seconds it needs for all tensors and candidates together are written down, one thread.
Spearman's correlation over tensors, with a 95 % interval from 2,000 bootstrap draws of tensors (paired over metrics). A
result that is there already is left alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hestia import loading
from hestia.curvature import Sensitivity, calibrate
from hestia.curvature.inputs import input_moments
from hestia.curvature.intervals import spearman
from hestia.curvature.scores import Evidence, Score
from hestia.data import pack_all
from hestia.files import write_json
from hestia.nn import select
from hestia.progress import announce, enable
from hestia.provenance import machine, versions
from hestia.settings import candidate_specs

RESULTS = Path(__file__).parents[1] / "results" / "curvature"
LABELS = ("ternary", "int2", "int3", "int4")
SEQ_LEN, CALIBRATION, HELD_OUT, HESSIAN = 256, 64, 32, 16
"""Tokens a sequence; sequences of the metrics, of the truth, of what costs a forward or more a tensor."""
DRAWS = 2000


def texts(data: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Model -> files to calibrate on, files to measure the truth on."""
    return {
        "books-6m": (
            [str(data / "gutenberg" / "valid.txt.gz"), str(data / "openstax" / "valid.txt")],
            [str(data / "gutenberg" / "test.txt.gz"), str(data / "openstax" / "test.txt")],
        ),
        "stories260K": (
            [str(data / "tinystories" / "train.txt")],
            [str(data / "tinystories" / "test.txt")],
        ),
    }


class Bench:
    """One model, its calibration sequences and its held-out ones."""

    def __init__(self, folder: Path, calibration: list[str], held_out: list[str], seed: int = 0) -> None:
        source = loading.resolve(str(folder))
        self.model: Any = loading.load_model(source)
        self.tokenizer = loading.load_tokenizer(source)
        linears = select(self.model).candidates
        self.weights = {path: linear.weight for path, linear in linears.items()}
        every = candidate_specs([linear.in_features for linear in linears.values()], "row")
        self.specs = {label: every[label] for label in ("binary", *LABELS)}
        self.calibration = self._sequences(calibration, 2 * CALIBRATION)
        self.held_out = self._sequences(held_out, HELD_OUT)
        self.seed = seed

    def _sequences(self, files: list[str], count: int) -> torch.Tensor:
        return pack_all(files, self.tokenizer, seq_len=SEQ_LEN).spread(count).input_ids.long()

    def measure(self, estimator: str, count: int) -> Sensitivity:
        """A sensitivity with all candidates, from the first ``count`` calibration sequences."""
        return calibrate(
            self.model,
            self.weights,
            self.calibration[:count],
            estimator=estimator,
            candidates=self.specs,
            seed=self.seed,
        )

    def truth(self) -> Sensitivity:
        """KL of one rounded tensor at a time, on the held-out sequences."""
        return calibrate(self.model, self.weights, self.held_out, estimator="kl", candidates=self.specs)


Damages = Mapping[str, Mapping[str, float]]
"""Label -> module path -> damage."""


def metrics(bench: Bench) -> dict[str, tuple[float, Damages]]:
    """Metric -> seconds for everything it needs, and its damages."""
    found: dict[str, tuple[float, Damages]] = {}

    def add(name: str, seconds: float, damage: Callable[[str], dict[str, float]]) -> None:
        started = time.perf_counter()
        damages = {label: damage(label) for label in LABELS}
        found[name] = (seconds + time.perf_counter() - started, damages)
        announce(f"{name}: {found[name][0]:.1f} s")

    def by_scores(estimator: str, count: int, names: Mapping[str, Score]) -> None:
        sensitivity = bench.measure(estimator, count)
        for name, score in names.items():
            evidence = Evidence(sensitivity=sensitivity)
            add(name, sensitivity.seconds, lambda label, s=score, e=evidence: s.damage(e, label))

    make = Score.make
    by_scores(
        "gnb",
        CALIBRATION,
        {
            "quadratic (gnb)": make("quadratic"),
            "delta_loss (gnb)": make("delta_loss"),
            "omega (gnb)": make("omega"),
            "hestia: trace (gnb)": make("hestia"),
        },
    )
    by_scores(
        "fisher",
        CALIBRATION,
        {
            "quadratic (fisher)": make("quadratic"),
            "omega (fisher)": make("omega"),
            "delta_loss (fisher)": make("delta_loss"),
        },
    )
    by_scores("kl", HESSIAN, {f"direct KL, {HESSIAN} other sequences": make("kl")})
    by_scores("hutchinson", CALIBRATION, {"omega (hutchinson, true Hessian)": make("omega")})
    by_scores("eigen", HESSIAN // 4, {"eigen: HAWQ": make("eigen"), "eigen: Q-BERT": make("eigen", form="q_bert")})
    started = time.perf_counter()
    moments = input_moments(bench.model, list(bench.weights), bench.calibration[:CALIBRATION])
    seconds = time.perf_counter() - started
    any_sensitivity = bench.measure("gnb", 2)
    evidence = Evidence(sensitivity=any_sensitivity, weights=bench.weights, inputs=moments)
    add("baq", seconds, lambda label: make("baq").damage(evidence, label))
    add("lieq (data-free)", 0.0, lambda label: make("lieq").damage(evidence, label))
    errors = {path: tensor.errors for path, tensor in any_sensitivity.tensors.items()}
    add("rounding error |dW|^2 (data-free)", 0.0, lambda label: {path: errors[path][label] for path in errors})
    add("weights in the tensor (control)", 0.0, lambda label: {p: float(w.numel()) for p, w in bench.weights.items()})
    return found


def correlations(found: Mapping[str, tuple[float, Damages]], truth: Damages) -> dict[str, Any]:
    """Metric -> label -> Spearman with its bootstrap interval."""
    paths = list(next(iter(truth.values())))
    generator = np.random.default_rng(0)
    picks = generator.integers(0, len(paths), (DRAWS, len(paths)))
    out: dict[str, Any] = {}
    for name, (seconds, damages) in found.items():
        row: dict[str, Any] = {"seconds": round(seconds, 3)}
        for label in LABELS:
            x = np.array([damages[label][path] for path in paths])
            y = np.array([truth[label][path] for path in paths])
            draws = [spearman(x[pick].tolist(), y[pick].tolist()) for pick in picks]
            low, high = np.nanpercentile(draws, [2.5, 97.5])
            value = spearman(x.tolist(), y.tolist())
            row[label] = {"spearman": round(value, 4), "low": round(float(low), 4), "high": round(float(high), 4)}
        out[name] = row
    return out


def scale(found: Mapping[str, tuple[float, Damages]], truth: Damages) -> dict[str, Any]:
    """For metrics in nats: median over tensors of predicted over measured KL."""
    return {
        name: {
            label: round(float(np.median([found[name][1][label][p] / truth[label][p] for p in truth[label]])), 3)
            for label in LABELS
        }
        for name in found
        if name.startswith(("quadratic", "direct"))
    }


def parser(description: str | None) -> argparse.ArgumentParser:
    """The command line of all benchmarks that take models and texts."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--models", type=Path, required=True)
    found.add_argument("--data", type=Path, required=True)
    found.add_argument("--only", default="", help="models with this in their name")
    return found


def missing(kind: str, arguments: argparse.Namespace) -> Iterator[tuple[str, Path, Bench]]:
    """Name, result file and bench of every model that has no result of this kind; one thread."""
    enable()
    torch.set_num_threads(1)
    for name, (calibration, held_out) in texts(arguments.data).items():
        path = RESULTS / f"{kind}-{name}.json"
        if arguments.only in name and not path.exists():
            yield name, path, Bench(arguments.models / name, calibration, held_out)


def main() -> None:
    """Measure what has no result yet."""
    for name, path, bench in missing("metrics", parser(__doc__).parse_args()):
        truth_table = bench.truth()
        truth = {label: truth_table.means(f"kl:{label}") for label in LABELS}
        found = metrics(bench)
        record = {
            "schema": 1,
            "name": name,
            "command": "python benchmarks/curvature/metrics.py",
            "seed": bench.seed,
            "tensors": len(bench.weights),
            "tokens_a_sequence": SEQ_LEN,
            "sequences": {"calibration": CALIBRATION, "truth": HELD_OUT, "second order and direct": HESSIAN},
            "truth_seconds": round(truth_table.seconds, 2),
            "versions": versions(),
            "machine": machine(torch.device("cpu")),
            "spearman": correlations(found, truth),
            "predicted_over_measured": scale(found, truth),
            "kl": {label: {p: float(f"{v:.5g}") for p, v in truth[label].items()} for label in LABELS},
        }
        write_json(path, record)


if __name__ == "__main__":
    main()
