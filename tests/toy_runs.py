"""A toy parent, a toy text and a finished run of both, so that a test of the main job takes seconds.

The parent is a Llama of two layers, 64 wide, freshly drawn, with a byte-level BPE tokenizer of 320 tokens that puts a
BOS in front. The text is made of short stories of a dozen words, separated by ``<|endofstory|>`` lines.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hestia.cli.main import main

QUICK = ("--steps", "8", "--seq-len", "32", "--batch-size", "4", "--lr", "3e-3", "--calibrate", "2", "--threads", "1")
"""A whole run in about a second and a half: 8 steps of 4 blocks of 32 tokens."""

CALIBRATED = ("--recipe", "hestia", "--teacher", "none")
"""The recipe that calibrates, taught by the text: the toy's parent is random, and could teach nothing."""

Invoke = Callable[..., tuple[int, str, str]]
"""``invoke("plan", model, ...) -> (exit status, standard output, standard error)``."""


def stories(count: int, seed: int) -> list[str]:
    """``count`` stories of three sentences, all different, drawn by ``seed``."""
    draw = random.Random(seed)
    who = ("the cat", "the dog", "a small bird", "the old man", "a girl")
    did = ("saw", "found", "carried", "lost", "loved")
    what = ("a ball", "the river", "some bread", "a red hat", "the moon")

    def sentence() -> str:
        return f"{draw.choice(who)} {draw.choice(did)} {draw.choice(what)} {draw.randrange(100)} times"

    return [". ".join(sentence() for _ in range(3)) + "." for _ in range(count)]


def write_stories(path: Path, count: int, seed: int) -> Path:
    """A .txt of stories, each but the last followed by a separator line."""
    path.write_text("\n<|endofstory|>\n".join(stories(count, seed)) + "\n", encoding="utf-8")
    return path


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: three special tokens, 256 bytes, the rest merges learnt from the stories."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stories(60, seed=9), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=64
    )


def make_parent(folder: Path, *, tied: bool = False) -> Path:
    """A folder with config.json, model.safetensors and the tokenizer, as ``save_pretrained`` writes them."""
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def toy_parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parent's folder. Read it; copy it before you damage it."""
    return make_parent(tmp_path_factory.mktemp("toy") / "parent")


@pytest.fixture(scope="session")
def toy_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 9,000 tokens of stories in one .txt file."""
    return write_stories(tmp_path_factory.mktemp("toy") / "train.txt", 200, seed=1)


@pytest.fixture(scope="session")
def toy_held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other stories, for ``--eval-data``."""
    return write_stories(tmp_path_factory.mktemp("toy") / "held_out.txt", 30, seed=2)


@pytest.fixture(scope="session")
def toy_run(toy_parent: Path, toy_text: Path, toy_held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished ``hestia quantize`` of the toy, exported as hf and gguf:q4_0. Read it; never write into it."""
    out = tmp_path_factory.mktemp("toy") / "run"
    arguments = ["quantize", str(toy_parent), "--data", str(toy_text), "--eval-data", str(toy_held_out)]
    status = main([*arguments, "--target", "hf", "gguf:q4_0", "--out", str(out), *QUICK, *CALIBRATED])
    assert status == 0
    return out


@pytest.fixture
def parent_copy(toy_parent: Path, tmp_path: Path) -> Path:
    """A copy of the parent that a test may damage."""
    return Path(shutil.copytree(toy_parent, tmp_path / "model"))


@pytest.fixture
def invoke(capfd: pytest.CaptureFixture[str]) -> Invoke:
    """Run the command line in this process and return its exit status and what it printed."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return status, out, err

    return call


@pytest.fixture
def lean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without figures, sample continuations and model card: two thirds of a toy run's time."""
    for name in ("write_report", "write_model_card"):
        monkeypatch.setattr(f"hestia.pipeline.record.{name}", lambda run: None)
    monkeypatch.setattr("hestia.pipeline.scoring.continuations", lambda *_: [])
