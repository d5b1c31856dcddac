"""What a calibration has measured so far, so that one that is killed goes on where it was.

    NAME.safetensors   rows          fp64 [K, names]   samples of the first K sequences
                       present       bool [K, names]   which of them there are
                       diagonals/..  running sums of the diagonals
                       metadata: schema, key, names, seconds that they took

The key is a hash of everything that decides a sample, or how many there are: estimator, seed, the whole model, its
tensors that are measured, sequences and what of them counts, candidates, group size, stopping rule.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import digests
from ..files import replacing, save_file
from .estimators import CurvatureEstimator, Diagonals, Row
from .rows import from_matrices, names_of, to_matrices
from .stopping import Stopping

SCHEMA = "2"

SECONDS = 20.0
"""Between two writings, at least: what a killed calibration loses, at most, beside the sequence it was at."""


class Partial:
    """A file that holds the rows of an unfinished calibration.

    Args:
        path: where.
        key: ``key_of`` the calibration; a file with another key is left aside and written over.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self.earlier = 0.0
        """Seconds that the rows which ``load`` found took."""
        self._began = self._written = time.monotonic()

    def load(self, diagonals: Diagonals | None) -> list[Row]:
        """The rows in the file, the running sums put back into ``diagonals``; none where it is another's or damaged."""
        from safetensors import SafetensorError, safe_open  # here, so that listing the recipes needs torch alone

        if not self.path.is_file():
            return []
        try:
            with safe_open(self.path, framework="pt") as handle:
                metadata = handle.metadata() or {}
                if metadata.get("schema") != SCHEMA or metadata.get("key") != self.key:
                    announce(f"{self.path}: left by another calibration; this one begins anew")
                    return []
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a mapping
            names = [(str(path), str(name)) for path, name in json.loads(metadata["names"])]
            rows = from_matrices(tensors["rows"], tensors["present"], names)
            self.earlier = float(metadata["seconds"])
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            announce(f"{self.path}: damaged ({error}); the calibration begins anew")
            return []
        if diagonals is not None:
            sums = {k.removeprefix("diagonals/"): v for k, v in tensors.items() if k.startswith("diagonals/")}
            diagonals.restore(sums, len(rows))
        announce(f"{self.path}: {len(rows)} sequences were measured before; going on from there")
        return rows

    def save(self, rows: Sequence[Row], diagonals: Diagonals | None) -> None:
        """Write them, if the last writing is old enough."""
        if time.monotonic() - self._written < SECONDS:
            return
        names = names_of(rows)
        samples, present = to_matrices(rows, names)
        tensors = {"rows": samples, "present": present}
        if diagonals is not None:
            tensors |= {f"diagonals/{name}": value.contiguous() for name, value in diagonals.state().items()}
        took = {"seconds": str(self.earlier + time.monotonic() - self._began)}
        with replacing(self.path) as temporary:
            save_file(tensors, temporary, {"schema": SCHEMA, "key": self.key, "names": json.dumps(names), **took})
        self._written = time.monotonic()


def key_of(
    estimator: CurvatureEstimator,
    model: nn.Module,
    weights: Mapping[str, Tensor],
    sequences: Tensor,
    counted: Tensor | None,
    candidates: Mapping[str, Any],
    diagonals: int | str | None,
    seed: int,
    stopping: Stopping | None,
) -> str:
    """SHA-256 of everything that decides the rows; ``candidates`` as JSON."""
    text = {"sequences of token ids": sequences} | ({} if counted is None else {"positions that count": counted})
    content = digests.of_tensors({**dict(model.named_parameters()), **dict(model.named_buffers()), **text})
    record = [SCHEMA, repr(estimator), content, list(weights), candidates, diagonals, seed, repr(stopping)]
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def announce(message: str) -> None:
    """One line on standard error, where progress is shown."""
    from ..progress import announce as say

    say(message)
