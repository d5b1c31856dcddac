"""The artefact: sensitivity.json, one matrix of samples (sequences x tensors) and what follows from it.

The samples are the truth. Every statistic is computed from them, on writing and again on reading, so that a file cannot
hold a mean that its samples do not have.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CalibrationError
from ..files import read_json, write_json
from .intervals import jackknife_error, log_mean_interval

SCHEMA = 1

LARGE_SHARE = 0.1
"""A sequence that carries more of a tensor's sum than this is worth a warning: the mean hangs on it."""


@dataclass(frozen=True, kw_only=True)
class TensorSensitivity:
    """What K sequences say about one weight matrix. Traces are in nats per squared weight unit.

    Attributes:
        path: module path.
        weights: number of weights in the tensor.
        samples: K positive samples S_k of the trace, one a sequence, in the order of the sequences.
        trace: arithmetic mean of the samples, the estimate of tr(G). Sequences have equal scored length, so this is the
            token-weighted mean.
        standard_error: jackknife standard error of ``trace``.
        log_mean: mean of log S.
        half_width: half-width of the 95 % t interval of ``log_mean``, in natural log units.
        geometric_mean: exp(log_mean); steadier than ``trace``, and another quantity: below it where tails are heavy.
        low, high: exp(log_mean -+ half_width), the 95 % interval of the geometric mean (not of the trace).
        largest_share: the largest sample over the sum of all.
    """

    path: str
    weights: int
    samples: tuple[float, ...]
    trace: float
    standard_error: float
    log_mean: float
    half_width: float
    geometric_mean: float
    low: float
    high: float
    largest_share: float

    @classmethod
    def of(cls, path: str, weights: int, samples: Sequence[float]) -> TensorSensitivity:
        """All statistics of one tensor's samples.

        Raises:
            CalibrationError: fewer than two samples, or one that is not positive and finite.
        """
        if len(samples) < 2:
            raise CalibrationError(f"{path}: an interval needs at least 2 sequences, got {len(samples)}")
        for k, sample in enumerate(samples):
            if not (math.isfinite(sample) and sample > 0.0):
                raise CalibrationError(
                    f"{path}: sequence {k}: a trace sample must be positive and finite, got {sample}"
                )
        log_mean, half_width = log_mean_interval(samples)
        return cls(
            path=path,
            weights=weights,
            samples=tuple(samples),
            trace=statistics.fmean(samples),
            standard_error=jackknife_error(samples),
            log_mean=log_mean,
            half_width=half_width,
            geometric_mean=math.exp(log_mean),
            low=math.exp(log_mean - half_width),
            high=math.exp(log_mean + half_width),
            largest_share=max(samples) / math.fsum(samples),
        )


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """Module path -> TensorSensitivity, and how it was measured.

    Attributes:
        estimator: name in ``ESTIMATORS``.
        seed: of the probes.
        sequences: K.
        scored_positions: all positions that predict a token, K (T - 1).
        tensors: in the order of the model.
        model: what identifies the model; empty if the caller did not say.
        seconds: wall time of the calibration.
    """

    estimator: str
    seed: int
    sequences: int
    scored_positions: int
    tensors: Mapping[str, TensorSensitivity]
    model: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def traces(self) -> dict[str, float]:
        """Module path -> arithmetic mean: the trace."""
        return {path: tensor.trace for path, tensor in self.tensors.items()}

    @property
    def geometric_means(self) -> dict[str, float]:
        """Module path -> geometric mean: what ``hestia_scores`` should see, because its interval is known."""
        return {path: tensor.geometric_mean for path, tensor in self.tensors.items()}

    def save(self, path: Path) -> None:
        """Write sensitivity.json atomically."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> Sensitivity:
        """Read sensitivity.json.

        Raises:
            ConfigError: no such file, not JSON, or another schema.
            CalibrationError: a missing or bad value; the place is named.
        """
        return cls.from_json(read_json(path, schema=SCHEMA), where=str(path))

    def to_json(self) -> dict[str, Any]:
        """The JSON object of sensitivity.json."""
        return {
            "schema": SCHEMA,
            "estimator": self.estimator,
            "seed": self.seed,
            "sequences": self.sequences,
            "scored_positions": self.scored_positions,
            "model": dict(self.model),
            "seconds": self.seconds,
            "tensors": {
                path: {
                    "weights": tensor.weights,
                    "trace": tensor.trace,
                    "standard_error": tensor.standard_error,
                    "log_mean": tensor.log_mean,
                    "half_width": tensor.half_width,
                    "geometric_mean": tensor.geometric_mean,
                    "low": tensor.low,
                    "high": tensor.high,
                    "largest_share": tensor.largest_share,
                    "samples": list(tensor.samples),
                }
                for path, tensor in self.tensors.items()
            },
        }

    @classmethod
    def from_json(cls, record: dict[str, Any], where: str = "sensitivity") -> Sensitivity:
        """The inverse of ``to_json``; statistics are computed anew from the samples.

        Raises:
            CalibrationError: a missing or bad value, or tensors with unequal numbers of samples; the place is named.
        """
        place = where
        try:
            sequences = int(record["sequences"])
            tensors: dict[str, TensorSensitivity] = {}
            for path, entry in record["tensors"].items():
                place = f"{where}: {path}"
                samples = [float(sample) for sample in entry["samples"]]
                if len(samples) != sequences:
                    raise CalibrationError(
                        f"{path}: {len(samples)} samples where the file speaks of {sequences} sequences"
                    )
                tensors[path] = TensorSensitivity.of(path, int(entry["weights"]), samples)
            place = where
            return cls(
                estimator=str(record["estimator"]),
                seed=int(record["seed"]),
                sequences=sequences,
                scored_positions=int(record["scored_positions"]),
                tensors=tensors,
                model=dict(record["model"]),
                seconds=float(record["seconds"]),
            )
        except KeyError as error:
            raise CalibrationError(f"{place}: missing key {error}") from None
        except CalibrationError as error:
            raise CalibrationError(f"{where}: {error}") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise CalibrationError(f"{place}: {error}") from None

    def table(self) -> str:
        """The sensitivities for people: one line a tensor, the largest trace first."""
        width = max((len(path) for path in self.tensors), default=6)
        per_sequence = self.scored_positions // max(1, self.sequences)
        lines = [
            f"{self.estimator}: {self.sequences} sequences x {per_sequence} scored positions, seed {self.seed}, "
            f"{self.seconds:.1f} s",
            f"{'tensor':<{width}}  {'weights':>12}  {'trace':>10} {'+-':>6}  {'geo. mean':>10}  "
            f"{'95 % of the geo. mean':>23}  largest sequence",
        ]
        for tensor in sorted(self.tensors.values(), key=lambda tensor: -tensor.trace):
            interval = f"{tensor.low:.4g} .. {tensor.high:.4g}"
            lines.append(
                f"{tensor.path:<{width}}  {tensor.weights:>12,}  {tensor.trace:>10.4g} "
                f"{tensor.standard_error / tensor.trace:>6.1%}  {tensor.geometric_mean:>10.4g}  {interval:>23}  "
                f"{tensor.largest_share:>6.1%}{' !' if tensor.largest_share > LARGE_SHARE else ''}"
            )
        heavy = sum(tensor.largest_share > LARGE_SHARE for tensor in self.tensors.values())
        if heavy:
            lines.append(
                f"! in {heavy} tensors one sequence carries over {LARGE_SHARE:.0%} of the sum: "
                "trust the geometric mean, or add sequences"
            )
        return "\n".join(lines)
