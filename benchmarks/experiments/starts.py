"""Where training begins: the parent of stage A, rounded to ternary by scales of different care.

    python benchmarks/experiments/starts.py --data DIR

absmean         code and level from mean|w|
least_squares   the same codes, the level that rebuilds the row best
twn             threshold 0.75 mean|w|, the level that rebuilds the row best
rows            threshold and level of a row fitted in turns, the least squared error that one scale per row allows
channels        the same, and one factor for every input channel, shared by the layers that read the same input: what
                could be folded into norms and the layers before

Nothing is trained. Scored: nats per token on the first 16 blocks of each valid file; relative squared error of weights.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import stages
import torch
from texts import SCORED, prepare_texts
from torch import Tensor, nn
from train_job import open_parent

from hestia import loading
from hestia.evaluation import model_logits, score
from hestia.files import write_json
from hestia.provenance import machine, versions
from hestia.quant import LeastSquares, Quantizer, QuantSpec, ScaleRule

RULES: dict[str, ScaleRule | None] = {
    "absmean": ScaleRule.make("absmean"), "least_squares": LeastSquares(), "twn": ScaleRule.make("twn"),
    "rows": None, "channels": None,
}  # fmt: skip
TURNS = 20
BLOCKS = 16


def readers(model: Any) -> Iterator[list[nn.Linear]]:
    """Linear layers, those with one input together."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        yield from ([attention.q_proj, attention.k_proj, attention.v_proj], [attention.o_proj])
        yield from ([mlp.gate_proj, mlp.up_proj], [mlp.down_proj])


def fitted(w_OI: Tensor, *, channels: bool) -> Tensor:
    """``row * factor * q``: codes, a factor a row and, with ``channels``, one an input, each the best in turn."""
    factor, q = torch.ones(1, w_OI.shape[1]), w_OI.sign() * (w_OI.abs() > 0.75 * w_OI.abs().mean(1, keepdim=True))
    row = _best(w_OI, factor * q, dim=1)
    for _ in range(TURNS):
        if channels:
            factor = _best(w_OI, row * q, dim=0)
        q = (w_OI / (row * factor)).round().clamp(-1, 1)
        row = _best(w_OI, factor * q, dim=1)
    return row * factor * q


def _best(w_OI: Tensor, shape_OI: Tensor, dim: int) -> Tensor:
    power = shape_OI.square().sum(dim, keepdim=True).clamp_min(1e-12)
    return ((w_OI * shape_OI).sum(dim, keepdim=True) / power).clamp_min(1e-6)


def main() -> None:
    """Round, score, write benchmarks/results/experiments/starts.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/experiments"), help="cached tokens")
    given = parser.parse_args()
    torch.set_num_threads(1)
    stage = stages.load("a")
    parent = open_parent(stages.HERE / "parents" / stage.parent)
    cache = given.work / "tokens" / f"{stage.parent}-{stage.texts.pool}-{stage.training.seq_len}"
    texts = prepare_texts(stage, given.data, loading.load_tokenizer(parent.source), cache, SCORED)

    def nats(model: Any) -> float:
        blocks = (text[:BLOCKS] for text in texts.valid.values())
        return statistics.fmean(score(model_logits(model), some, description="").nll for some in blocks)

    rows: dict[str, dict[str, float]] = {"parent": {"nll": nats(parent.load()), "relative_error": 0.0}}
    for name, rule in RULES.items():
        model, errors = parent.load(), []
        for layers in readers(model):
            w = torch.cat([layer.weight.data for layer in layers])
            if rule is None:
                w_hat = fitted(w, channels=name == "channels")
            else:
                w_hat = Quantizer(QuantSpec(scale=rule, group_size="row")).codes(w).dense()
            errors.append(float((w_hat - w).square().sum() / w.square().sum()))
            for layer, part in zip(layers, w_hat.split([len(layer.weight) for layer in layers]), strict=True):
                layer.weight.data = part.clone()
        rows[name] = {"nll": nats(model), "relative_error": statistics.fmean(errors)}
    for name, row in rows.items():
        print(f"{name:<14} {row['nll']:.4f} nats   relative error {row['relative_error']:.4f}")
    record = {
        "schema": 1,
        "command": "python benchmarks/experiments/starts.py --data DIR",
        "parent": parent.record,
        "rows": rows,
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
    }
    write_json(stages.RESULTS / "starts.json", record)


if __name__ == "__main__":
    main()
