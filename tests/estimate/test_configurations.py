"""Real configurations from 135M to 70B: parameter counts as published, and estimates that hang together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from hestia import loading
from hestia.estimate.whole import Layout, estimate
from hestia.options import Options

CONFIGS = Path(__file__).parents[2] / "benchmarks" / "estimate" / "configs"

PARAMETERS = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
}
"""As the repositories' safetensors files count them."""


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_repository(name: str) -> None:
    source = loading.config_source(str(CONFIGS / f"{name}.json"))
    empty = loading.empty_model(source, loading.load_config(source))
    assert sum(parameter.numel() for parameter in empty.parameters()) == PARAMETERS[name]


FILES = sorted((CONFIGS.parents[2] / "configs").glob("*.yaml"))


@pytest.mark.slow  # five seconds each
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_configuration_file_fits_its_model_its_targets_and_one_gpu(path: Path) -> None:
    options = Options(
        **{**yaml.safe_load(path.read_text()), "model": str(CONFIGS / f"{path.stem}.json"), "device": "cuda"}
    )
    found = estimate(options, memory="80G", disk="1T", flops="400T", bandwidth="2e12")
    assert found.fits_memory and found.fits_disk
    sizes = {file.target: file.bytes for file in found.files}
    assert all(sizes[target] for target in options.target), "every file of the configuration can hold the model"
    assert found.job.steps > 1000 and found.job.batch * found.job.tokens == 1 << 18, "the paper's tokens per step"


@pytest.mark.slow  # about ten seconds
def test_70b_on_eight_processes() -> None:
    """By hand: 4 + 8 bytes per parameter for weights and moments, an eighth under FSDP2, all under DDP."""
    options = Options(
        model=str(CONFIGS / "llama-3.1-70b.json"), seq_len=1024, batch_size=8, gradient_checkpointing=True, steps=100,
        lr="1e-5", calibrate=0, target=("gguf:tq2_0",),
    )  # fmt: skip
    found = estimate(
        options, Layout(processes=8, sharded=True), memory="80G", disk="10T", flops="400T", bandwidth="1e25"
    )
    total = PARAMETERS["llama-3.1-70b"]
    stages = {stage.name: stage for stage in found.stages}
    alternatives = {stage.name: stage for stage in found.alternatives}
    assert stages["train"].parts["weights"] == pytest.approx(4 * total / 8, rel=1e-6)
    assert stages["train"].parts["optimizer"] == pytest.approx(8 * total / 8, rel=1e-6)
    assert stages["train"].parts["gradients"] == pytest.approx(4 * total / 8, rel=1e-6)
    assert alternatives["train, FSDP2"].peak == stages["train"].peak
    assert alternatives["train, DDP"].parts["weights"] == 4 * total
    assert not found.fits_memory and found.fits_disk
    # forward 2, backward 4 and recomputing 2 FLOPs a weight and token, but for the head, which is in no block, and for
    # the last product of a block, whose output nobody needs twice; the embedding has none, attention adds a little
    tokens, head, last = 100 * 8 * 1024, 128256 * 8192, 80 * 8192 * 28672
    taught = 2 * (total - head)
    flops = (8 * (total - head) - 2 * head - 2 * last + taught) * tokens
    assert found.seconds["train"] == pytest.approx(flops / 400e12 / 8, rel=0.02)
    sizes = {file.target: file.bytes for file in found.files}
    kept = 2 * 2 * 128256 * 8192
    assert sizes["gguf:tq2_0"] == pytest.approx(2.0625 * found.quantized / 8 + kept, rel=3e-3)
    assert json.dumps(found.to_json(), allow_nan=False)
