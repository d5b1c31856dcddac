"""FSDP2: two processes that shard every weight train, freeze and compute as one process that holds them all.

A scale belongs to a whole group (a tensor, a row, a block), so a scale from one shard would show here as other codes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import shard_worker
import torch
import toy_training
from processes import run
from safetensors.torch import load_file

import hestia
from hestia.nn import quantized_modules
from hestia.nn.shards import is_sharded, sharded_as, whole


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the two processes left, for every case."""
    out = tmp_path_factory.mktemp("sharded")
    run(2, Path(shard_worker.__file__), out)
    return out


@pytest.mark.slow  # two interpreters with torch: about ten seconds, once for all cases
@pytest.mark.parametrize("case", shard_worker.CASES)
def test_two_shards_are_one_model(case: str, sharded: Path) -> None:
    first, second = (load_file(sharded / f"{case}-{rank}.safetensors") for rank in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first), "both processes end with the same"

    model, plan = shard_worker.build(case)
    losses = shard_worker.train(model, plan, slice(None))
    # the search for a threshold is discrete: rounding may decide between two that are equally good
    assert first["losses"].tolist() == pytest.approx(losses, rel=1e-3 if case == "weighted" else 1e-5)
    state = {key.removeprefix("state/"): value for key, value in first.items() if key.startswith("state/")}
    for key, value in model.state_dict().items():
        # squared gradients of the second step, after codes that may have been decided the other way
        allowed = 0.1 if key.endswith("importance") else 1e-2
        assert float((state[key] - value).norm() / value.norm()) < allowed, key

    model.load_state_dict(state)
    frozen = hestia.freeze(model)
    assert {f"codes/{path}" for path in frozen} == {key for key in first if key.startswith("codes/")}
    for path, tensor in frozen.items():
        assert torch.equal(first[f"codes/{path}"], tensor.codes), path
        assert torch.equal(first[f"scales/{path}"], tensor.scales), path
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=toy_training.blocks(2, seed=3).input_ids).logits
    torch.testing.assert_close(first["logits"], logits, rtol=1e-5, atol=1e-5)


def test_one_shard_would_give_another_scale() -> None:
    """The test above can fail: half of the rows have another mean than the tensor, half of a row than the row."""
    model, _ = shard_worker.build("tensor")
    _, layer = next(iter(quantized_modules(model)))
    half = layer.quantizer.codes(layer.weight[: layer.weight.shape[0] // 2])
    assert not torch.equal(half.scales, layer.codes().scales)


def test_plain_tensors_are_left_alone() -> None:
    tensor = torch.ones(3)
    assert not is_sharded(tensor)
    assert whole(tensor) is tensor and sharded_as(tensor, tensor) is tensor
