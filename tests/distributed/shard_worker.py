"""Trains a toy under ``fully_shard`` on two processes, freezes it, and leaves the tensors in FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import toy_models
import toy_training
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import hestia
from hestia import processes
from hestia.nn import knobs_of, quantized_modules
from hestia.training.clock import correct, hand_over_importance

CASES = {
    "tensor": ("hestia", "tensor", {}),
    "row": ("hestia", "row", {}),
    "block": ("hestia", 8, {}),
    "learned": ("lsq", "row", {}),
    "pulled": ("cage", "row", {}),
    "weighted": ("quasar", 8, {}),
    "shifted": ("tequila", "row", {}),
}


def build(name: str) -> tuple[torch.nn.Module, hestia.Plan]:
    recipe, group, options = CASES[name]
    model = toy_models.llama()
    plan = hestia.plan(model, recipe, group_size=group, options=options)
    hestia.apply(model, plan)
    model.train()
    knobs_of(model).set(pressure=0.7, temperature=0.2)
    return model, plan


def train(model: torch.nn.Module, plan: hestia.Plan, share: slice) -> list[float]:
    """Two AdamW steps on a share of the same blocks; the loss before each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = toy_training.blocks(8).input_ids[share]
    losses = []
    for step in range(2):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        layers = [layer for _, layer in quantized_modules(model)]
        hand_over_importance(layers, optimizer, 10 + step)
        if plan.correction is not None:
            correct(layers, optimizer, plan.correction, 0.95)
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def main() -> None:
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    with processes.joined():
        mesh = init_device_mesh("cpu", (2,))
        for name in CASES:
            model, plan = build(name)
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            assert all(isinstance(p, DTensor) for p in model.parameters())
            losses = train(model, plan, slice(processes.rank(), None, 2))
            mean = processes.added(torch.tensor(losses, dtype=torch.float64)) / 2
            state = {
                key: value.full_tensor() if isinstance(value, DTensor) else value
                for key, value in model.state_dict().items()
            }
            frozen = hestia.freeze(model)
            tensors = {f"state/{key}": value.detach().clone() for key, value in state.items()}
            for path, tensor in frozen.items():
                tensors |= {f"codes/{path}": tensor.codes, f"scales/{path}": tensor.scales}
            model.eval()
            with torch.no_grad():
                tensors["logits"] = model(input_ids=toy_training.blocks(2, seed=3).input_ids).logits
            save_file(
                {key: value.contiguous() for key, value in tensors.items()} | {"losses": mean},
                out / f"{name}-{processes.rank()}.safetensors",
            )


if __name__ == "__main__":
    main()
