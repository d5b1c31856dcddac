"""What the softmax surrogate costs beside the plain STE quantizer: time and memory of one weight, forward and backward.

    ste        Quantizer with the straight-through estimator: absmean, round, identity gradient
    softmax    Quantizer with Hestia's surrogate: the same scale, the closed form, its own gradient
    naive      the surrogate as its equation reads: the whole [weights x 3] table of probabilities, autograd

Both of ours compiled (inductor) and as they are; the naive one as it is. Two ways to end a backward pass are timed:

    leaf       w_hat.backward(g) into w.grad, which is None before; g stays in use elsewhere, so that where w_hat's
               gradient is g itself (STE) autograd copies it into w.grad
    grad       torch.autograd.grad(w_hat, w, g): no copy; the backward pass of STE then does nothing at all

Arms take turns in one process and the order rotates; medians and quartiles of seconds and the ratio of the medians are
recorded. Goals: compiled, ``leaf``, one thread: at most 2.0 times STE; one saved tensor of the weight's size at most.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hestia.files import write_json
from hestia.provenance import machine, versions
from hestia.quant import STE, Estimator, Quantizer, QuantSpec, Softmax

RESULTS = Path(__file__).parents[1] / "results" / "speed"
Fake = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    """Time the arms, count what they save, write benchmarks/results/speed/quantizer.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--temperature", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "quantizer.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    w = (0.02 * torch.randn(options.rows, options.columns)).requires_grad_()
    g = torch.randn(options.rows, options.columns)
    knobs = torch.tensor(1.0), torch.tensor(options.temperature)

    plain: dict[str, Fake] = {"ste": fake(STE()), "softmax": fake(Softmax())}
    compiled: dict[str, Fake] = {name: torch.compile(run, fullgraph=True) for name, run in plain.items()}
    record: dict[str, Any] = {
        "schema": 1,
        "what": __doc__,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["python", *sys.argv],
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
        "seed": options.seed,
        "weight": [options.rows, options.columns],
        "temperature": options.temperature,
        "agreement": agreement(compiled["softmax"], naive, w, g, knobs),
        "saved_for_backward": {
            "ste": saved(plain["ste"], w, knobs),
            "softmax": saved(plain["softmax"], w, knobs),
            "softmax compiled": saved(compiled["softmax"], w, knobs),
            "naive": saved(naive, w, knobs),
        },
        "seconds": {},
    }
    for how, arms in (("compiled", compiled), ("eager", {**plain, "naive": naive})):
        for end in ("leaf", "grad"):
            runs = {name: both_passes(run, end, w, g, knobs) for name, run in arms.items()}
            record["seconds"][f"{how}, {end}"] = compare(runs, options.rounds, base="ste")
    medians = {where: {name: row["median"] for name, row in rows.items()} for where, rows in record["seconds"].items()}
    record["naive_over_softmax"] = {
        "compiled": medians["eager, leaf"]["naive"] / medians["compiled, leaf"]["softmax"],
        "eager": medians["eager, leaf"]["naive"] / medians["eager, leaf"]["softmax"],
    }
    record["bytes_a_weight_per_naive_probability_table"] = 4 * len(QuantSpec().grid.levels)
    write_json(options.out, record)
    for where, rows in record["seconds"].items():
        for name, row in rows.items():
            print(f"{where:<15} {name:<8} {1000 * row['median']:9.1f} ms   {row['ratio']:6.2f} x ste")
    for name, row in record["saved_for_backward"].items():
        print(
            f"saved: {name:<17} {row['weight_sized']} of the weight's size or more, {row['weights']:.2f} weights in all"
        )
    for how, factor in record["naive_over_softmax"].items():
        print(f"naive over {how} softmax: {factor:.1f} x")


def fake(estimator: Estimator) -> Fake:
    """The quantizer of ``QuantLinear``: ternary, one absmean scale per row."""
    return Quantizer(QuantSpec(estimator=estimator)).fake


def naive(w: Tensor, pressure: Tensor, temperature: Tensor) -> Tensor:
    """The equation as it reads, ``[weights x 3]`` probabilities and all."""
    s = w.detach().abs().mean(-1, keepdim=True) + 1e-5
    q = torch.tensor([-1.0, 0.0, 1.0])
    pi = torch.softmax(-((w / s).unsqueeze(-1) - q).square() / temperature, dim=-1)
    return (1 - pressure) * w + pressure * s * (pi * q).sum(-1)


def both_passes(run: Fake, end: str, w: Tensor, g: Tensor, knobs: tuple[Tensor, Tensor]) -> Callable[[], None]:
    """One forward and one backward pass as a function."""

    def leaf() -> None:
        w.grad = None
        run(w, *knobs).backward(g)

    def grad() -> None:
        torch.autograd.grad(run(w, *knobs), w, g)

    return {"leaf": leaf, "grad": grad}[end]


def agreement(run: Fake, other: Fake, w: Tensor, g: Tensor, knobs: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Largest difference of value and gradient: what is compared must compute the same."""
    a, b = run(w, *knobs), other(w, *knobs)
    da, db = (torch.autograd.grad(out, w, g)[0] for out in (a, b))
    return {"value": float((a - b).detach().abs().max()), "gradient": float((da - db).abs().max())}


def saved(run: Fake, w: Tensor, knobs: tuple[Tensor, Tensor]) -> dict[str, float]:
    """What autograd keeps between the passes: tensors of the weight's size or more, and all of it in weights."""
    sizes: dict[int, int] = {}

    def remember(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.numel()
        kept.append(tensor)  # alive, so that no storage address is given out twice
        return tensor

    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        run(w, *knobs)
    return {
        "weight_sized": sum(size >= w.numel() for size in sizes.values()),
        "weights": sum(sizes.values()) / w.numel(),
    }


def compare(arms: dict[str, Callable[[], None]], rounds: int, base: str) -> dict[str, dict[str, Any]]:
    """Median and quartiles of seconds, and the ratio of the medians to ``base``."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for run in arms.values():
        run()  # compilation and warm-up
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            gc.collect()
            started = time.perf_counter()
            arms[name]()
            seconds[name].append(time.perf_counter() - started)
    out: dict[str, dict[str, Any]] = {}
    for name, values in seconds.items():
        quartiles = statistics.quantiles(values, n=4)
        out[name] = {
            "median": statistics.median(values),
            "quartiles": [quartiles[0], quartiles[2]],
            "range": [min(values), max(values)],
            "ratio": statistics.median(values) / statistics.median(seconds[base]),
            "rounds": rounds,
        }
    return out


if __name__ == "__main__":
    main()
