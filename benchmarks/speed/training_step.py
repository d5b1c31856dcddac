"""What the quantizer adds to a training step, and what calibration costs, on the bundled 6M-parameter model.

    step          forward, backward and AdamW on 4,096 tokens (16 blocks of 256) under bf16 autocast
    calibration   eight sequences of 256 tokens, all tensors together, with and without the damage of five candidate
                  quantizers, against a plain forward and backward of them

Arms take turns in one process and the order rotates, so that a noisy machine disturbs all alike; medians, quartiles and
ratios are reported. Goals: step at most 1.10 times the step without any quantizer, calibration at most 3.5 times.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hestia
from hestia import loading
from hestia.curvature import calibrate
from hestia.files import write_json
from hestia.nn import knobs_of
from hestia.provenance import machine, versions
from hestia.settings import candidate_specs
from hestia.tiny import model_path

RESULTS = Path(__file__).parents[1] / "results" / "speed"


def main() -> None:
    """Run the arms and write benchmarks/results/speed/training_step.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS / "training_step.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    ids = torch.randint(0, 4096, (16, 256))
    arms: dict[str, Callable[[], None]] = {"no quantizer": step(parent(), ids)}
    for recipe in ("bitnet_ste", "hestia"):
        model = parent()
        hestia.apply(model, hestia.plan(model, recipe=recipe, target="gguf:tq2_0"))
        knobs_of(model).set(pressure=0.7, temperature=0.15 if recipe == "hestia" else 0.0)
        arms[recipe] = step(model, ids)
    record: dict[str, Any] = {
        "schema": 1,
        "what": __doc__,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["python", *sys.argv],
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
        "seed": 0,
        "step": compare(arms, options.rounds, "no quantizer"),
    }
    model = parent()
    plan = hestia.plan(model, target="gguf:tq2_0")
    weights = {path: model.get_parameter(f"{path}.weight") for path in plan.layers}
    some = ids[:8]
    candidates = candidate_specs([weight.shape[1] for weight in weights.values()], "row")

    def plain() -> None:
        for row in some:
            model.zero_grad(set_to_none=True)
            model(input_ids=row[None], labels=row[None]).loss.backward()

    record["calibration"] = compare(
        {
            "forward and backward": plain,
            "calibrate": lambda: discard(calibrate(model, weights, some)),
            "with 5 candidates": lambda: discard(calibrate(model, weights, some, candidates=candidates)),
        },
        options.rounds,
        "forward and backward",
    )
    write_json(options.out, record)
    for part in ("step", "calibration"):
        for name, row in record[part].items():
            print(f"{part:<12} {name:<22} {1000 * row['median']:8.1f} ms   x {row['ratio']:.3f}")


def parent() -> Any:
    """The bundled model, fp32, in training mode."""
    return loading.load_model(loading.resolve(str(model_path()))).train()


def step(
    model: nn.Module, ids: torch.Tensor, loss_of: Callable[[nn.Module], torch.Tensor] | None = None
) -> Callable[[], None]:
    """One optimizer step as a function; the loss is the model's cross entropy on ``ids`` unless given."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def run() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss if loss_of is None else loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def discard(value: object) -> None:
    """Nothing: a name for throwing a result away."""


def compare(arms: dict[str, Callable[[], None]], rounds: int, base: str) -> dict[str, dict[str, Any]]:
    """Median and quartiles of seconds, and the median of per-round ratios to ``base``."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for run in arms.values():
        run()  # warm-up
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            started = time.perf_counter()
            arms[name]()
            seconds[name].append(time.perf_counter() - started)
    out = {}
    for name, values in seconds.items():
        quartiles = statistics.quantiles(values, n=4)
        ratios = [a / b for a, b in zip(values, seconds[base], strict=True)]
        out[name] = {
            "median": statistics.median(values),
            "quartiles": [quartiles[0], quartiles[2]],
            "ratio": statistics.median(ratios),
            "rounds": rounds,
        }
    return out


if __name__ == "__main__":
    main()
