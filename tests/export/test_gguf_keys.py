"""What a .gguf tells llama.cpp of the architecture, held against the configuration and against transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_gguf import make_run
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hestia.export.gguf import export_gguf
from hestia.export.gguf_families import _llama3_divisors
from hestia.export.gguf_reader import open_checked
from hestia.targets import target


def test_the_keys_hold_the_configuration_s_numbers(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 5e5, "factor": 8.0}
    frozen = make_run(tmp_path / "run", width=192, rope_parameters=rope, rms_norm_eps=3e-3)
    export_gguf(frozen, target("gguf:q2_0"), tmp_path / "a.gguf")
    keys = {key: value.show(0) for key, value in open_checked(tmp_path / "a.gguf").metadata}
    assert float(keys["llama.rope.freq_base"]) == 5e5
    assert float(keys["llama.rope.scaling.factor"]) == 8.0
    assert float(keys["llama.attention.layer_norm_rms_epsilon"]) == pytest.approx(3e-3)
    assert int(keys["llama.feed_forward_length"]) == 192


def test_the_frequencies_of_llama_3_are_those_of_transformers() -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=1, head_dim=64, rope_parameters=rope, max_position_embeddings=1024
    )
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    ours = [5e5 ** (-2 * i / 64) / divisor for i, divisor in enumerate(_llama3_divisors(rope, 64))]
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5)


def test_sampling_settings_are_told_only_where_the_model_samples(tmp_path: Path) -> None:
    for sample in (True, False):
        frozen = make_run(tmp_path / f"run-{sample}")
        (frozen.folder / "generation_config.json").write_text(json.dumps({"do_sample": sample, "top_k": 20}))
        export_gguf(frozen, target("gguf:q2_0"), tmp_path / f"{sample}.gguf")
        keys = dict(open_checked(tmp_path / f"{sample}.gguf").metadata)
        assert ("general.sampling.top_k" in keys) == sample and "hestia.generation_config" in keys


def test_numbers_that_the_keys_cannot_hold_are_left_to_the_file_itself(tmp_path: Path) -> None:
    frozen = make_run(tmp_path / "run")
    odd = {"do_sample": True, "top_k": 20.0, "top_p": 1, "temperature": 1e400, "repetition_penalty": True, "min_p": "a"}
    (frozen.folder / "generation_config.json").write_text(json.dumps(odd))
    export_gguf(frozen, target("gguf:q2_0"), tmp_path / "a.gguf")
    file = open_checked(tmp_path / "a.gguf")
    keys = {key: raw.show(0) for key, raw in file.metadata if key.startswith("general.sampling.")}
    assert keys == {"general.sampling.top_k": "20", "general.sampling.top_p": "1.0"}
