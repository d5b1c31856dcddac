"""The bundled model and text: whole, licensed, small enough to ship; and the script that makes such a model."""

from __future__ import annotations

import json
import lzma
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from hestia.errors import ConfigError
from hestia.tiny import model_path, text_path

torch.set_num_threads(1)

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "make_tiny_model.py"


def documents(name: Literal["train", "held_out"]) -> list[str]:
    text = lzma.decompress(text_path(name).read_bytes()).decode("utf-8")
    assert text.endswith("\n<|endofbook|>\n")
    return text.removesuffix("\n<|endofbook|>\n").split("\n<|endofbook|>\n")


def test_everything_shipped_stays_under_14_mb_and_says_whose_it_is() -> None:
    folder = model_path().parent
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.suffix != ".pyc") < 14_000_000
    card = (model_path() / "README.md").read_text(encoding="utf-8")
    for fact in ("license: apache-2.0", "24.2 million tokens", "3.767", "3.631", "5.784", "OpenStax"):
        assert fact in card
    credits_ = (text_path("train").parent / "CREDITS.md").read_text(encoding="utf-8")
    for fact in ("public domain", "CC BY 4.0", "OpenStax", "creativecommons.org/licenses/by/4.0"):
        assert fact in credits_


def test_the_weights_are_finite_and_every_row_is_divisible_by_256() -> None:
    parameters = 0
    with safe_open(model_path() / "model.safetensors", framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118 (not a dict)
            tensor = weights.get_tensor(name)
            assert tensor.dtype == torch.bfloat16 and bool(tensor.isfinite().all()), name
            assert tensor.shape[-1] % 256 == 0, name
            parameters += tensor.numel()
    assert parameters == 5_770_496
    config = json.loads((model_path() / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["vocab_size"] == 4096


def test_the_model_predicts_the_held_out_text() -> None:
    """4 blocks: far below ln 4096 = 8.3 nats, near the card's 3.83; a swapped tensor or tokenizer would show."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    ids = torch.tensor(tokenizer("\n".join(documents("held_out"))[:8000]).input_ids)[: 4 * 256].view(4, 256)
    with torch.no_grad():
        assert 3.0 < float(model(input_ids=ids, labels=ids).loss) < 4.8


def test_the_text_is_what_the_credits_say() -> None:
    tokenizer = Tokenizer.from_file(str(model_path() / "tokenizer.json"))
    train, held_out = documents("train"), documents("held_out")
    assert (len(train), len(held_out)) == (34 + 129, 4 + 7)
    assert sum(len(tokenizer.encode(text).ids) for text in held_out) == 58_889
    assert sum(len(tokenizer.encode(text).ids) for text in train[:20]) * len(train) / 20 > 1_000_000
    assert all(len(text) > 1000 and "<|" not in text for text in train + held_out)
    sample = held_out[0]
    assert tokenizer.decode(tokenizer.encode(sample).ids) == sample


def test_no_held_out_paragraph_is_in_the_training_text() -> None:
    seen = {line for text in documents("train") for line in text.split("\n") if len(line) > 200}
    assert not [line for text in documents("held_out") for line in text.split("\n") if line in seen]


def test_another_text_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'train'"):
        text_path("trian")  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_script_makes_a_model_that_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = "\n<|endofdoc|>\n".join(documents("held_out")[k][:6000] for k in range(4))
    with lzma.open(tmp_path / "toy.txt.xz", "wt", encoding="utf-8") as handle:
        handle.write(text)
    (tmp_path / "toy_test.txt").write_text(documents("held_out")[5][:4000], encoding="utf-8")
    out = tmp_path / "model"
    size = {"steps": 3, "hidden": 64, "layers": 2, "vocab": 300, "block": 32, "batch-size": 4, "device": "cpu"}
    command = [sys.executable, str(SCRIPT), "--train", "toy.txt.xz", "--test", "toy_test.txt", "--out", "model"]
    command += [f"--{name}={value}" for name, value in size.items()]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.config.vocab_size == len(tokenizer) == 300 and model.dtype == torch.bfloat16
    assert tokenizer.decode(tokenizer("Grün – 語\n").input_ids) == "Grün – 語\n"
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "384 tokens" in card and "| toy_test.txt | 5." in card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "toy.txt.xz", "toy_test.txt"]
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert again.returncode == 2 and "exists already" in again.stderr
