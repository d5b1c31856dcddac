"""The artefact: sensitivity.json, one matrix of samples (sequences x tensors) a quantity, and what follows from it.

The samples are the truth. Every statistic is computed from them, on writing and again on reading, so that a file cannot
hold a mean that its samples do not have. Per-channel and per-group sums lie beside it in sensitivity.safetensors.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CalibrationError
from ..files import read_json, replacing, save_file, write_json
from .intervals import jackknife_error, log_mean_interval, mean_interval

SCHEMA = 2

LARGE_SHARE = 0.1
"""A sequence that carries more of a tensor's sum than this is worth a warning: the mean hangs on it."""


@dataclass(frozen=True, kw_only=True)
class TensorSensitivity:
    """What K sequences say about one weight matrix, in the estimator's primary quantity and in all others.

    Attributes:
        path: module path.
        weights: number of weights in the tensor.
        samples: K samples of the primary quantity, one a sequence, in the order of the sequences: positive, but for the
            estimators of the true Hessian.
        others: quantity -> its K samples, such as ``{"quadratic:ternary": (...)}``.
        errors: candidate label -> ``||dW||^2``.
        trace: arithmetic mean of ``samples``: the estimate of tr(G) where the primary quantity is the trace. Sequences
            weigh the same; of plain text they have equal scored length, so this is the token-weighted mean.
        standard_error: jackknife standard error of ``trace``.
        log_mean, half_width: mean of log S and half-width of its 95 % t interval, in natural log units; None where a
            sample is not positive.
        geometric_mean: exp(log_mean); steadier than ``trace``, and another quantity: below it where tails are heavy.
        low, high: exp(log_mean -+ half_width), the 95 % interval of the geometric mean (not of the trace); where a
            sample is not positive, the t interval of ``trace``.
        largest_share: the largest sample over the sum of all; None where a sample is not positive.
        gauss_newton: K Gauss-Newton samples that stand in for a signed estimate whose interval is not wholly positive;
            None where the estimate stands on its own.
        signed: samples may be negative.
    """

    path: str
    weights: int
    samples: tuple[float, ...]
    others: Mapping[str, tuple[float, ...]]
    errors: Mapping[str, float]
    trace: float
    standard_error: float
    log_mean: float | None
    half_width: float | None
    geometric_mean: float | None
    low: float
    high: float
    largest_share: float | None
    gauss_newton: tuple[float, ...] | None = None
    signed: bool = False

    @classmethod
    def of(
        cls,
        path: str,
        weights: int,
        samples: Sequence[float],
        *,
        others: Mapping[str, Sequence[float]] | None = None,
        errors: Mapping[str, float] | None = None,
        signed: bool = False,
        may_be_zero: bool = False,
        gauss_newton: Sequence[float] | None = None,
    ) -> TensorSensitivity:
        """All statistics of one tensor's samples.

        Args:
            path, weights, samples, others, errors: see the attributes.
            signed: samples may be negative; nothing is ever clipped.
            may_be_zero: samples may be 0, as a KL may.
            gauss_newton: the substitute, kept if the signed interval is not wholly positive.

        Raises:
            CalibrationError: fewer than two samples, one that is not finite, or one that is not positive where it must
            be.
        """
        if len(samples) < 2:
            raise CalibrationError(f"{path}: an interval needs at least 2 sequences, got {len(samples)}")
        for k, sample in enumerate(samples):
            if not math.isfinite(sample) or not (signed or sample > 0.0 or (may_be_zero and sample == 0.0)):
                wanted = "finite" if signed else "0 or positive and finite" if may_be_zero else "positive and finite"
                raise CalibrationError(f"{path}: sequence {k}: a sample must be {wanted}, got {sample}")
        positive = all(sample > 0.0 for sample in samples)
        if positive and not signed:
            log_mean, half_width = log_mean_interval(samples)
            low, high = math.exp(log_mean - half_width), math.exp(log_mean + half_width)
        else:
            log_mean = half_width = None
            mean, half = mean_interval(samples)
            low, high = mean - half, mean + half
        unsure = signed and not low > 0.0
        return cls(
            path=path,
            weights=weights,
            samples=tuple(samples),
            others={name: tuple(column) for name, column in (others or {}).items()},
            errors=dict(errors or {}),
            trace=statistics.fmean(samples),
            standard_error=jackknife_error(samples),
            log_mean=log_mean,
            half_width=half_width,
            geometric_mean=None if log_mean is None else math.exp(log_mean),
            low=low,
            high=high,
            largest_share=max(samples) / math.fsum(samples) if positive else None,
            gauss_newton=tuple(gauss_newton) if unsure and gauss_newton is not None else None,
            signed=signed,
        )

    @property
    def value(self) -> float:
        """What scores use: the geometric mean, or the mean where a sample is 0; for a signed estimate its mean, or the
        Gauss-Newton one in its place.

        Raises:
            CalibrationError: a signed estimate whose interval is not wholly positive, without a substitute.
        """
        if self.geometric_mean is not None:
            return self.geometric_mean
        if self.gauss_newton is not None:
            return statistics.fmean(self.gauss_newton)
        if self.signed and self.low <= 0.0:
            interval = f"{self.trace:.4g} ({self.low:.4g} .. {self.high:.4g})"
            raise CalibrationError(
                f"{self.path}: the estimate {interval} is not surely positive, and nothing stands in for it"
            )
        return self.trace


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """Module path -> TensorSensitivity, and how it was measured.

    Attributes:
        estimator: its name.
        estimator_options: what it was set to, such as ``{"rank": 10, "probes": 20}``.
        seed: of the probes.
        sequences: K.
        scored_positions: all positions that predict a token that counts, K (T - 1) of plain text.
        tensors: in the order of the model.
        primary: the quantity of ``TensorSensitivity.samples``.
        candidates: label -> the candidate quantizer's JSON.
        stopped: why it ended at K sequences, in words.
        model: what identifies the model; empty if the caller did not say.
        seconds: wall time of the calibration.
        candidate_bytes: bytes that the candidates' codes and scales held.
        diagonals: ``PATH/output_channel`` and ``PATH/group`` -> sums of squared gradients (``Diagonals``).
    """

    estimator: str
    seed: int
    sequences: int
    scored_positions: int
    tensors: Mapping[str, TensorSensitivity]
    primary: str = "trace"
    candidates: Mapping[str, Any] = field(default_factory=dict)
    stopped: str = ""
    estimator_options: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    candidate_bytes: int = 0
    diagonals: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def traces(self) -> dict[str, float]:
        """Module path -> arithmetic mean of the primary quantity: the trace."""
        return {path: tensor.trace for path, tensor in self.tensors.items()}

    @property
    def values(self) -> dict[str, float]:
        """Module path -> what scores use (``TensorSensitivity.value``)."""
        return {path: tensor.value for path, tensor in self.tensors.items()}

    @property
    def quantities(self) -> tuple[str, ...]:
        """The names of all quantities measured, the primary one first."""
        first = next(iter(self.tensors.values()))
        return (self.primary, *first.others)

    def column(self, quantity: str) -> dict[str, tuple[float, ...]]:
        """Module path -> the K samples of one quantity.

        Raises:
            CalibrationError: it was not measured; those that were are named.
        """
        if quantity == self.primary:
            return {path: tensor.samples for path, tensor in self.tensors.items()}
        if quantity not in self.quantities:
            raise CalibrationError(f"{quantity!r} was not measured; measured were {', '.join(self.quantities)}")
        return {path: tensor.others[quantity] for path, tensor in self.tensors.items()}

    def means(self, quantity: str) -> dict[str, float]:
        """Module path -> arithmetic mean of one quantity.

        Raises:
            CalibrationError: see ``column``.
        """
        return {path: statistics.fmean(samples) for path, samples in self.column(quantity).items()}

    def save(self, path: str | Path) -> None:
        """Write sensitivity.json, and the diagonals beside it as .safetensors; each atomically."""
        path = Path(path)
        beside = path.with_suffix(".safetensors")
        if self.diagonals:
            with replacing(beside) as temporary:
                save_file({name: tensor.contiguous() for name, tensor in self.diagonals.items()}, temporary)
        else:
            beside.unlink(missing_ok=True)  # an earlier measurement's
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Read sensitivity.json (without the diagonals).

        Raises:
            ConfigError: no such file, not JSON, or another schema.
            CalibrationError: a missing or bad value; the place is named.
        """
        return cls.from_json(read_json(Path(path), schema=SCHEMA), where=str(path))

    def to_json(self) -> dict[str, Any]:
        """The JSON object of sensitivity.json."""
        return {
            "schema": SCHEMA,
            "estimator": self.estimator,
            "estimator_options": dict(self.estimator_options),
            "primary": self.primary,
            "seed": self.seed,
            "sequences": self.sequences,
            "scored_positions": self.scored_positions,
            "stopped": self.stopped,
            "candidates": dict(self.candidates),
            "candidate_bytes": self.candidate_bytes,
            "model": dict(self.model),
            "seconds": self.seconds,
            "tensors": {path: _entry(tensor) for path, tensor in self.tensors.items()},
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
                columns = {"samples": entry["samples"], **entry["others"]}
                if entry["gauss_newton"] is not None:
                    columns["gauss_newton"] = entry["gauss_newton"]
                numbers = {name: [float(sample) for sample in column] for name, column in columns.items()}
                for name, column in numbers.items():
                    if len(column) != sequences:
                        raise CalibrationError(
                            f"{path}: {len(column)} {name} where the file speaks of {sequences} sequences"
                        )
                tensors[path] = TensorSensitivity.of(
                    path,
                    int(entry["weights"]),
                    numbers.pop("samples"),
                    gauss_newton=numbers.pop("gauss_newton", None),
                    others=numbers,
                    errors={str(label): float(error) for label, error in entry["errors"].items()},
                    signed=bool(entry["signed"]),
                    may_be_zero=str(record["primary"]).startswith("kl:"),
                )
            place = where
            if not tensors:
                raise CalibrationError("no tensors")
            return cls(
                estimator=str(record["estimator"]),
                estimator_options=dict(record["estimator_options"]),
                primary=str(record["primary"]),
                seed=int(record["seed"]),
                sequences=sequences,
                scored_positions=int(record["scored_positions"]),
                stopped=str(record["stopped"]),
                candidates=dict(record["candidates"]),
                candidate_bytes=int(record["candidate_bytes"]),
                tensors=tensors,
                model=dict(record["model"]),
                seconds=float(record["seconds"]),
            )
        except KeyError as error:
            raise CalibrationError(f"{place}: missing key {error}") from None
        except CalibrationError as error:
            raise CalibrationError(f"{where}: {error}") from None
        except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise CalibrationError(f"{place}: {error}") from None


def _entry(tensor: TensorSensitivity) -> dict[str, Any]:
    return {
        "weights": tensor.weights,
        "trace": tensor.trace,
        "standard_error": tensor.standard_error,
        "log_mean": tensor.log_mean,
        "half_width": tensor.half_width,
        "geometric_mean": tensor.geometric_mean,
        "low": tensor.low,
        "high": tensor.high,
        "largest_share": tensor.largest_share,
        "signed": tensor.signed,
        "errors": dict(tensor.errors),
        "samples": list(tensor.samples),
        "others": {name: list(column) for name, column in tensor.others.items()},
        "gauss_newton": None if tensor.gauss_newton is None else list(tensor.gauss_newton),
    }
