"""What a sensitivity costs, and how good it is for that: the default estimator beside Hutch++ as Hestia publishes it.

    python benchmarks/curvature/cost.py [--parts gnb hutchpp exact memory]

gnb      median over tensors of the relative standard error against seconds, bundled model. Goal: 5 % within 60 s.
hutchpp  Hutch++ at its published setting (rank 10, 20 probes, 5 sequences of 512 tokens) on 4 tensors of the bundled
         model: the products of one sequence are timed and extrapolated to all 40, to 5 sequences and to all tensors
         (marked so; QR and the rest of the estimator are left out, in its favour). Beside it, in the same process,
         the default estimator on as many sequences of the same length as make its error smaller. Goal: 50 times less.
exact    both on a small model trained on characters, where tr(G) and tr(H) of the whole text are known: relative
         root mean square error, median over tensors, each against its own target, and seconds.
memory   RssAnon of a fresh process above its level with the model loaded, against the parts that are promised: one
         gradient, the activations of one sequence, the candidates. (The parameters are in the level.)

One thread. Wall and processor seconds are both given: on a busy machine only the second says what the work costs, and
ratios come from one process.
"""

from __future__ import annotations

import argparse
import gc
import json
import lzma
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from hestia import loading, tiny
from hestia.curvature import Sensitivity, calibrate
from hestia.curvature.estimators import Candidates, HutchPlusPlus, Problem
from hestia.curvature.estimators.draws import generator, rademacher
from hestia.curvature.estimators.gnb import CHUNK, cotangents
from hestia.curvature.estimators.hvp import Curvature
from hestia.data import pack_all
from hestia.files import read_json, write_json
from hestia.nn import select
from hestia.progress import announce, enable
from hestia.provenance import machine, versions
from hestia.settings import candidate_specs

RESULTS = Path(__file__).parents[1] / "results" / "curvature"
PARTS = ("gnb", "hutchpp", "exact", "memory")
PUBLISHED = {"rank": 10, "probes": 20, "sequences": 5, "tokens": 512}
SEED = 0


class Timer:
    """Wall and processor seconds of a block."""

    def __enter__(self) -> Timer:
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *exc: object) -> None:
        self.wall, self.cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu

    @property
    def record(self) -> dict[str, float]:
        return {"wall_seconds": round(self.wall, 3), "cpu_seconds": round(self.cpu, 3)}


def bundled(sequences: int, tokens: int) -> tuple[Any, dict[str, nn.Parameter], Tensor]:
    """Model, weights and token ids of the bundled model's training text, evenly spread."""
    source = loading.resolve(str(tiny.model_path()))
    model: Any = loading.load_model(source)
    blocks = pack_all([str(tiny.text_path("train"))], loading.load_tokenizer(source), seq_len=tokens)
    ids = blocks.spread(sequences).input_ids.long()
    # a fixed shuffle: a part of the sequences shall be as mixed as the whole
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(SEED))
    weights = {path: linear.weight for path, linear in select(model).candidates.items()}
    return model, weights, ids[order]


def relative_errors(sensitivity: Sensitivity, count: int) -> dict[str, float]:
    """Median over tensors of the relative standard error after the first ``count`` sequences."""
    arithmetic, logs = [], []
    for tensor in sensitivity.tensors.values():
        samples = torch.tensor(tensor.samples[:count], dtype=torch.float64)
        arithmetic.append(float(samples.std() / samples.mean()) / count**0.5)
        logs.append(float(samples.log().std()) / count**0.5)
    return {
        "arithmetic_mean": round(statistics.median(arithmetic), 4),
        "arithmetic_mean_worst": round(max(arithmetic), 4),
        "log_mean": round(statistics.median(logs), 4),
    }


def part_gnb() -> dict[str, Any]:
    """Error against seconds."""
    out: dict[str, Any] = {"goal": "median relative standard error <= 0.05 within 60 s on two cores", "runs": []}
    for tokens, sequences in ((128, 64),):
        model, weights, ids = bundled(sequences, tokens)
        calibrate(model, weights, ids[:2])  # warm
        with Timer() as timer:
            sensitivity = calibrate(model, weights, ids)
        curve = []
        for count in (2**k for k in range(3, 10) if 2**k <= len(ids)):
            share = count / len(ids)
            curve.append(
                {
                    "sequences": count,
                    "wall_seconds": round(timer.wall * share, 2),
                    "cpu_seconds": round(timer.cpu * share, 2),
                    "relative_standard_error": relative_errors(sensitivity, count),
                }
            )
        met = [c for c in curve if c["relative_standard_error"]["arithmetic_mean"] <= 0.05]
        out["runs"].append({"tokens": tokens, "threads": 1, "curve": curve, "first_within_5_percent": met[:1]})
    return out


def part_hutchpp() -> dict[str, Any]:
    """The published setting on four tensors, extrapolated, beside the default estimator in the same process."""
    enough = 16
    model, weights, ids = bundled(enough, PUBLISHED["tokens"])
    layers = len(model.model.layers)
    chosen = [
        "model.layers.0.self_attn.q_proj",
        f"model.layers.{layers // 3}.mlp.gate_proj",
        f"model.layers.{2 * layers // 3}.self_attn.o_proj",
        f"model.layers.{layers - 1}.mlp.down_proj",
    ]
    products = 2 * PUBLISHED["rank"] + PUBLISHED["probes"]
    timed = 4
    problem = Problem(
        model=model,
        forward=lambda batch: model(input_ids=batch).logits,
        weights=weights,
        candidates=Candidates({}, {}),
        seed=SEED,
    )
    timings: dict[str, Any] = {}
    calibrate(model, weights, ids[:2])  # warm
    with Timer() as gnb_before:
        calibrate(model, weights, ids[: enough // 2])
    with Timer() as start:  # the forward pass and the loss: once a sequence, for all tensors
        curvature = Curvature(problem, ids[0])
        curvature.loss.detach()
    for path in chosen:
        weight = weights[path]
        with Timer() as graph:
            product = curvature.hessian(weight)
        assert product is not None
        draws = generator(ids[0], SEED, path)
        product(rademacher(weight, draws))  # warm
        with Timer() as some:
            for _ in range(timed):
                product(rademacher(weight, draws))
        timings[path] = {
            key: round(getattr(graph, key) + getattr(some, key) * products / timed, 3) for key in ("wall", "cpu")
        }
        announce(f"hutchpp, {path}: {timings[path]}")
    del product, curvature
    with Timer() as gnb_after:
        sensitivity = calibrate(model, weights, ids)
    passes = enough // 2 + enough
    gnb = {key: (getattr(gnb_before, key) + getattr(gnb_after, key)) / passes for key in ("wall", "cpu")}
    a_tensor = {key: statistics.fmean(t[key] for t in timings.values()) for key in ("wall", "cpu")}
    everything = {
        key: PUBLISHED["sequences"] * (getattr(start, key) + a_tensor[key] * len(weights)) for key in a_tensor
    }
    # Hutch++ sees 5 sequences: whatever its probes do, its data error is at least that of 5 samples
    five = statistics.median(
        statistics.stdev(t.samples) / statistics.fmean(t.samples) / PUBLISHED["sequences"] ** 0.5
        for t in sensitivity.tensors.values()
    )
    return {
        "published_setting": PUBLISHED,
        "seconds_a_tensor_and_sequence": timings,
        "products_timed": f"{timed} of {products} a tensor, on one sequence of {PUBLISHED['tokens']} tokens",
        "tensors_in_all": len(weights),
        "extrapolated_to_all": {
            "extrapolated": True,
            "rule": "5 sequences x (forward + tensors x (gradient graph + 40 products)); means over the 4 tensors",
            "wall_seconds": round(everything["wall"], 1),
            "cpu_seconds": round(everything["cpu"], 1),
        },
        "gnb": {
            "sequences": enough,
            "tokens": PUBLISHED["tokens"],
            "wall_seconds": round(gnb["wall"] * enough, 2),
            "cpu_seconds": round(gnb["cpu"] * enough, 2),
            "relative_standard_error": relative_errors(sensitivity, enough),
        },
        "hutchpp_error_from_five_sequences_alone": {
            "value": round(five, 4),
            "meaning": "median over tensors of the spread between sequences (of the Gauss-Newton samples) over sqrt(5)",
        },
        "times_less": {
            "wall": round(everything["wall"] / (gnb["wall"] * enough), 1),
            "cpu": round(everything["cpu"] / (gnb["cpu"] * enough), 1),
            "goal": 50,
        },
    }


SYMBOLS = " abcdefghijklmnopqrstuvwxyz.,'\"-"


def characters(count: int) -> Tensor:
    """The bundled text in 32 symbols."""
    with lzma.open(tiny.text_path("train"), "rt", encoding="utf-8") as handle:
        text = handle.read(count * 2).lower()
    place = {symbol: k for k, symbol in enumerate(SYMBOLS)}
    return torch.tensor([place[c] for c in text if c in place][:count])


def small_model(steps: int) -> tuple[LlamaForCausalLM, Tensor, float]:
    """A two-layer Llama of 3,840 weights without its head, trained on characters; 48 sequences of 32; its loss."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(SYMBOLS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config)
    blocks = characters(32 * 4000).view(-1, 32)
    held, train = blocks[-48:], blocks[:-48]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=steps)
    draws = torch.Generator().manual_seed(SEED)
    loss = torch.zeros(())
    for _ in range(steps):
        batch = train[torch.randint(len(train), (32,), generator=draws)]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval(), held, float(loss.detach())


def exact_traces(
    model: LlamaForCausalLM, weights: Mapping[str, nn.Parameter], ids: Tensor
) -> tuple[dict[str, float], dict[str, float]]:
    """tr(G_i) and tr(H_i) of all sequences together: full Jacobians, and a product with every unit vector."""
    gauss_newton, hessian = dict.fromkeys(weights, 0.0), dict.fromkeys(weights, 0.0)
    problem = Problem(
        model=model,
        forward=lambda batch: model(input_ids=batch).logits,
        weights=weights,
        candidates=Candidates(weights, {}),
    )
    for row in ids:
        curvature = Curvature(problem, row)
        logits = curvature.logits
        p_TV = torch.softmax(logits.detach(), -1)
        every = torch.eye(logits.numel()).view(-1, *logits.shape)
        listed = list(weights.values())
        jacobians = torch.autograd.grad(logits, listed, grad_outputs=every, is_grads_batched=True, retain_graph=True)
        for path, jacobian in zip(weights, jacobians, strict=True):
            j_TVn = jacobian.reshape(*logits.shape, -1)
            mean_Tn = torch.einsum("tv,tvn->tn", p_TV, j_TVn)
            first = torch.einsum("tv,tvn->", p_TV, j_TVn.square())
            gauss_newton[path] += float(first - mean_Tn.square().sum()) / len(logits) / len(ids)
        for path, weight in weights.items():
            (gradient,) = torch.autograd.grad(curvature.loss, weight, create_graph=True)
            units = torch.eye(weight.numel()).view(-1, *weight.shape)
            (rows,) = torch.autograd.grad(
                gradient, weight, grad_outputs=units, is_grads_batched=True, retain_graph=True
            )
            hessian[path] += float(rows.reshape(len(units), -1).diagonal().double().sum()) / len(ids)
    return gauss_newton, hessian


def part_exact(steps: int = 800, trials: int = 5) -> dict[str, Any]:
    """Error against the exact value, each estimator against its own target, over random choices of sequences."""
    model, ids, loss = small_model(steps)
    weights = {path: linear.weight for path, linear in select(model).candidates.items()}
    announce(f"trained: loss {loss:.3f}")
    with Timer() as timer:
        gauss_newton, hessian = exact_traces(model, weights, ids)
    announce(f"exact traces: {timer.wall:.0f} s")
    draws = torch.Generator().manual_seed(SEED)

    def errors(estimator: Any, sequences: int, truth: Mapping[str, float], repeats: int) -> dict[str, Any]:
        squares: dict[str, list[float]] = {path: [] for path in weights}
        replaced = 0
        with Timer() as timer:
            for trial in range(repeats):
                pick = torch.randperm(len(ids), generator=draws)[:sequences]
                found = calibrate(model, weights, ids[pick], estimator=estimator, seed=trial)
                replaced += sum(tensor.gauss_newton is not None for tensor in found.tensors.values())
                for path, tensor in found.tensors.items():
                    squares[path].append((tensor.trace / truth[path] - 1.0) ** 2)
        rmse = {path: statistics.fmean(column) ** 0.5 for path, column in squares.items()}
        return {
            "sequences": sequences,
            "trials": repeats,
            "relative_rmse_median": round(statistics.median(rmse.values()), 4),
            "relative_rmse_largest": round(max(rmse.values()), 4),
            "intervals_with_zero": replaced / repeats / len(weights),
            "seconds_a_trial": {k: round(v / repeats, 3) for k, v in timer.record.items()},
            "relative_rmse": {path: round(value, 4) for path, value in rmse.items()},
        }

    published = HutchPlusPlus(rank=PUBLISHED["rank"], probes=PUBLISHED["probes"])
    gnb = {n: errors("gnb", n, gauss_newton, 6 * trials) for n in (5, 10, 20)}
    hutch = errors(published, PUBLISHED["sequences"], hessian, trials)
    better = [n for n, row in gnb.items() if row["relative_rmse_median"] <= hutch["relative_rmse_median"]]
    ratio = None
    if better:
        seconds = gnb[better[0]]["seconds_a_trial"]["cpu_seconds"]
        ratio = {
            "gnb_sequences": better[0],
            "cpu": round(hutch["seconds_a_trial"]["cpu_seconds"] / seconds, 1),
        }
    return {
        "model": f"Llama, 2 layers, 16 wide, {sum(w.numel() for w in weights.values()):,} quantizable weights",
        "training_loss": round(loss, 4),
        "text": {"sequences": len(ids), "tokens": ids.shape[1]},
        "traces": {path: {"G": gauss_newton[path], "H": hessian[path]} for path in weights},
        "gnb_against_exact_G": gnb,
        "hutchpp_against_exact_H": hutch,
        "times_less_at_smaller_error": ratio,
    }


def part_memory() -> dict[str, Any]:
    """In a fresh process, so that nothing measured before leaves its pages behind."""
    command = [sys.executable, __file__, "--memory-child"]
    # glibc keeps freed blocks for reuse by a threshold that it moves; held still, what is freed is given back
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout)


def anonymous() -> int:
    """RssAnon of this process in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this system has no RssAnon")


def memory_child() -> dict[str, Any]:
    """Peak over the level before, sampled every millisecond, and its parts counted from tensors."""
    tokens = 512
    model, weights, ids = bundled(8, tokens)
    specs = candidate_specs([weight.shape[1] for weight in weights.values()], "row")
    calibrate(model, weights, ids[:2, :16])  # the libraries' own buffers
    gc.collect()
    level = anonymous()
    peak, running = level, True

    def watch() -> None:
        nonlocal peak
        while running:
            peak = max(peak, anonymous())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    sensitivity = calibrate(model, weights, ids, candidates=specs)
    running = False
    watcher.join()

    kept: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(input_ids=ids[:1]).logits
    out = cotangents(logits, ids[0], SEED)
    drawn = min(logits.numel(), CHUNK)
    parts = {
        "one_gradient": max(weight.numel() for weight in weights.values()) * 4,
        "activations_of_one_sequence": sum(kept.values()),
        "logits_and_their_cotangents": logits.nbytes + out.nbytes,
        "drawing_the_cotangents": drawn * (4 + 4 + 8 + 8),  # p and root p e in fp32, words' bits and signs in int64
        "candidates": sensitivity.candidate_bytes,
    }
    measured = peak - level
    return {
        "tokens": tokens,
        "candidates": list(specs),
        "parameters_bytes": sum(p.numel() * 4 for p in model.parameters()),
        "peak_above_level_bytes": measured,
        "parts_bytes": parts,
        "sum_of_parts_bytes": sum(parts.values()),
        "measured_over_sum": round(measured / sum(parts.values()), 3),
        "all_gradients_would_be_bytes": sum(weight.numel() * 4 for weight in weights.values()),
    }


def main() -> None:
    """Run the parts and put each into benchmarks/results/curvature/cost.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--memory-child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "cost.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_child:
        print(json.dumps(memory_child()))
        return
    enable()
    run: dict[str, Callable[[], dict[str, Any]]] = {
        "gnb": part_gnb,
        "hutchpp": part_hutchpp,
        "exact": part_exact,
        "memory": part_memory,
    }
    for part in options.parts:
        started = datetime.now(UTC).isoformat(timespec="seconds")
        found = {
            "started": started,
            "command": ["python", *sys.argv],
            "machine": machine(torch.device("cpu")),
            "versions": versions(),
            "seed": SEED,
            **run[part](),
        }
        record = read_json(options.out, schema=1) if options.out.exists() else {"schema": 1, "what": __doc__}
        write_json(options.out, {**record, part: found})
        print(part, json.dumps(found)[:600])


if __name__ == "__main__":
    main()
