"""Do the plans still differ after training? The same plans as in plans.py, trained briefly, at three budgets.

    python benchmarks/curvature/trained.py --models DIR --data DIR [--only NAME] [--budget-minutes M]

Recipe ``hestia`` without curvature in its temperatures (alpha = 0), every tensor at its plan's width, all arms of a
seed on the same blocks in the same order; the learning rate is the one that the ternary pilot chose for the model.
Scored: KL to the parent of the frozen model on held-out sequences. Each file grows by one run at a time, so that an
interrupted call takes up where it stopped.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from metrics import RESULTS, SEQ_LEN, Bench, parser, texts
from plans import CALIBRATION, WINNER, by_width, stored_bytes

import hestia
from hestia import loading, recipes
from hestia.curvature.allocation import Allocation, Problem, optimum, positional, random_widths, uniform
from hestia.curvature.scores import Evidence, Score
from hestia.data import Blocks, pack_all
from hestia.evaluation import model_logits, score
from hestia.files import read_json, write_json
from hestia.progress import announce, enable
from hestia.provenance import machine, versions
from hestia.training import HestiaTrainer, TrainConfig

BUDGETS = (1.8, 2.0, 2.5)
SEEDS = (0, 1, 2)
STEPS, BATCH = 60, 8
RATES = {"books-6m": 6.5e-4, "stories260K": 6.7e-3}


def training_files(data: Path, name: str) -> list[str]:
    """What the model is trained on; for the larger one not its calibration text."""
    if name == "stories260K":
        return [str(data / "tinystories" / "train.txt")]
    return [str(data / "gutenberg" / "train.txt.gz"), str(data / "openstax" / "train.txt.gz")]


def allocations(bench: Bench, bits: float, seed: int) -> dict[str, Allocation]:
    """Arm -> widths at one budget."""
    damage = by_width(bench, Score.make("quadratic"), Evidence(sensitivity=bench.measure("gnb", CALIBRATION)))
    problem = Problem.of(stored_bytes(bench), {path: w.numel() for path, w in bench.weights.items()}, damage)
    budget = problem.bytes_for(bits)
    flat = uniform(problem, budget)
    return {
        WINNER: optimum(problem, budget),
        f"{WINNER}, at uniform's bits": optimum(problem, flat.stored),
        "uniform": flat,
        "positional": positional(problem, budget),
        "random": random_widths(problem, budget, seed),
    }


def trained_kl(
    folder: Path, found: Allocation, train: Blocks, held_out: Blocks, rate: float, seed: int
) -> dict[str, Any]:
    """Train one allocation and score the frozen model."""
    source = loading.resolve(str(folder))
    model: Any = loading.load_model(source)
    recipe = recipes.get("hestia", alpha=0.0)
    plan = hestia.plan(model, recipe, target=())
    layers = {
        path: dataclasses.replace(layer, spec=recipe.spec_for(found.widths[path], "row"))
        for path, layer in plan.layers.items()
    }
    hestia.apply(model, dataclasses.replace(plan, layers=layers))
    bf16 = model.config.hidden_size >= 128
    settings = TrainConfig(steps=STEPS, batch_size=BATCH, learning_rate=rate, seed=seed, bf16=bf16, log_every=0)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        HestiaTrainer(
            model,
            plan=plan,
            config=settings,
            train=train,
            held_out=held_out,
            folder=Path(scratch),
            description="training",
        ).fit()
    seconds = time.perf_counter() - started
    hestia.freeze(model)
    parent: Any = loading.load_model(source)
    result = score(model_logits(model.eval()), held_out, parent=model_logits(parent), description="")
    return {"kl": result.kl_to_parent, "nll": result.nll, "seconds": round(seconds, 1)}


def same_plan(rows: list[dict[str, Any]], seed: int, found: Allocation) -> dict[str, Any] | None:
    """The numbers of an arm of the same seed with the very same widths: uniform plans repeat between budgets."""
    widths = {path: float(width) for path, width in found.widths.items()}
    for row in rows:
        if row["seed"] == seed and row["widths"] == widths:
            return {key: row[key] for key in ("kl", "nll", "seconds")}
    return None


def main() -> None:
    """Measure what has no result yet."""
    line = parser(__doc__)
    line.add_argument("--budget-minutes", type=float, default=float("inf"))
    arguments = line.parse_args()
    enable()
    torch.set_num_threads(1)
    end = time.monotonic() + 60 * arguments.budget_minutes
    for name, (calibration, held_out) in texts(arguments.data).items():
        if arguments.only not in name:
            continue
        path = RESULTS / f"trained-{name}.json"
        folder = arguments.models / name
        bench = Bench(folder, calibration, held_out)
        count = STEPS * BATCH
        train = pack_all(training_files(arguments.data, name), bench.tokenizer, seq_len=SEQ_LEN).spread(count)
        scored = pack_all(held_out, bench.tokenizer, seq_len=SEQ_LEN).spread(64)
        record: dict[str, Any] = read_json(path) if path.is_file() else {
            "schema": 1, "name": name, "command": "python benchmarks/curvature/trained.py", "steps": STEPS,
            "batch_size": BATCH, "learning_rate": RATES[name], "held_out_sequences": len(scored),
            "versions": versions(), "machine": machine(torch.device("cpu")), "rows": [],
        }  # fmt: skip
        done = {(row["budget"], row["seed"], row["arm"]) for row in record["rows"]}
        for seed in SEEDS:
            for bits in BUDGETS:
                for arm, found in allocations(bench, bits, seed).items():
                    if (bits, seed, arm) in done:
                        continue
                    if time.monotonic() > end:
                        return
                    numbers = same_plan(record["rows"], seed, found) or trained_kl(
                        folder, found, train, scored, RATES[name], seed
                    )
                    widths = {path: float(width) for path, width in found.widths.items()}
                    row = {"budget": bits, "seed": seed, "arm": arm, "bits": round(found.bits, 4), **numbers}
                    row["widths"] = widths
                    record["rows"].append(row)
                    write_json(path, record)
                    announce(f"{name}: {bits:g} bits, seed {seed}, {arm}: KL {numbers['kl']:.4f}")


if __name__ == "__main__":
    main()
