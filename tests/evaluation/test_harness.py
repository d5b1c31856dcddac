"""lm-eval on local jsonl files against the same numbers computed here, with a tiny random Llama."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hestia.errors import ConfigError, GuardError
from hestia.evaluation import run_tasks

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs the `eval` extra: lm-eval"
)

PAIRS = [
    {"UID": uid, "sentence_good": f"the {a} see {b}.", "sentence_bad": f"the {a} sees {b}!", "field": "syntax"}
    for uid in ("agreement", "island")
    for a, b in [("cats", "him"), ("dogs", "her"), ("two boys", "it"), ("girls", "them all"), ("men", "a house")]
]
CHOICES = [
    {"query": f"Question: {q}\nAnswer:", "choices": choices, "label": label}
    for q, choices, label in [
        ("What is wet?", ["water", "a stone in the desert"], 0),
        ("Two and two?", ["five", "four", "some other number"], 1),
        ("Who barks?", ["a dog", "a cat", "a fish"], 0),
        ("Sky?", ["green as grass", "blue"], 1),
    ]
]
SCHEMAS = [
    {"context_options": ["Ann met Eve, so Ann", "Ann met Eve, so Eve"], "continuation": "smiled.", "gold": 1},
    {
        "context_options": ["The cup fell on the mat, the cup", "The cup fell on the mat, the mat"],
        "continuation": "broke.",
        "gold": 0,
    },
    {"context_options": ["Tom", "The dog of Tom"], "continuation": "barked loudly.", "gold": 1},
]
WORDS = [{"context": "once upon a", "continuation": "time"}, {"context": "a b a b a", "continuation": "b"}]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and an EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|end|>": 0} | {character: i for i, character in enumerate(alphabet, start=1)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    core.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, items in (("pairs", PAIRS), ("choices", CHOICES), ("schemas", SCHEMAS), ("words", WORDS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items) + "\n")
    return tmp_path


def log_probability(model: nn.Module, tokenizer: Any, context: str, continuation: str) -> tuple[float, bool]:
    """log p(continuation | context), and whether greedy decoding gives it."""
    before = tokenizer(context).input_ids or [tokenizer.eos_token_id]
    after = tokenizer(continuation).input_ids
    with torch.no_grad():
        rows = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1].double().log_softmax(-1)
    return float(sum(rows[i, token] for i, token in enumerate(after))), rows.argmax(-1).tolist() == after


@needs_lm_eval
def test_all_four_kinds_equal_a_direct_computation(model, tokenizer, folder):
    model.train()
    results = run_tasks(model, tokenizer, ["pairs", "choices", "schemas", "words"], data_dir=folder, batch_size=3)

    def lp(context: str, continuation: str) -> float:
        return log_probability(model, tokenizer, context, continuation)[0]

    model.eval()
    hits = [lp("", f" {d['sentence_good']}") > lp("", f" {d['sentence_bad']}") for d in PAIRS]
    pairs = results["pairs"]
    assert (pairs["acc"], pairs["n"]) == (sum(hits) / 10, 10)
    share = pairs["acc"]
    assert pairs["acc_stderr"] == pytest.approx(math.sqrt(share * (1 - share) / 9))
    assert {uid: p["acc"] for uid, p in pairs["paradigms"].items()} == {
        "agreement": sum(hits[:5]) / 5,
        "island": sum(hits[5:]) / 5,
    }

    total = [[lp(d["query"], f" {c}") for c in d["choices"]] for d in CHOICES]
    per_character = [
        [s / len(c) for s, c in zip(t, d["choices"], strict=True)] for t, d in zip(total, CHOICES, strict=True)
    ]
    for metric, table in (("acc", total), ("acc_norm", per_character)):
        right = [row.index(max(row)) == d["label"] for row, d in zip(table, CHOICES, strict=True)]
        assert results["choices"][metric] == sum(right) / 4

    right = []
    for d in SCHEMAS:
        row = [lp(context, f" {d['continuation']}") for context in d["context_options"]]
        right.append(row.index(max(row)) == d["gold"])
    assert results["schemas"]["acc"] == pytest.approx(sum(right) / 3)
    assert "acc_norm" not in results["schemas"]

    words = [log_probability(model, tokenizer, d["context"], f" {d['continuation']}") for d in WORDS]
    assert results["words"]["acc"] == sum(greedy for _, greedy in words) / 2
    assert results["words"]["perplexity"] == pytest.approx(math.exp(-sum(s for s, _ in words) / 2), rel=1e-4)
    json.dumps(results)


@needs_lm_eval
def test_limit_takes_the_first_items_of_each_paradigm_and_the_inputs_are_untouched(model, tokenizer, folder, capfd):
    model.train()
    before = sorted(path.name for path in folder.iterdir())
    limited = run_tasks(model, tokenizer, ["pairs"], data_dir=folder, limit=2)["pairs"]
    assert limited["n"] == 4
    assert {uid: p["n"] for uid, p in limited["paradigms"].items()} == {"agreement": 2, "island": 2}
    assert model.training and all(module.training for module in model.modules())
    assert tokenizer.pad_token is None
    assert sorted(path.name for path in folder.iterdir()) == before
    assert capfd.readouterr() == ("", "")  # a library call is silent


@needs_lm_eval
def test_a_model_of_nans_is_stopped_and_not_scored_as_right(tokenizer, folder):
    torch.manual_seed(0)
    broken = LlamaForCausalLM(
        LlamaConfig(vocab_size=257, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with torch.no_grad():
        broken.lm_head.weight.fill_(math.nan)
    with pytest.raises(GuardError, match="pairs, item 0"):
        run_tasks(broken, tokenizer, ["pairs"], data_dir=folder)


@needs_lm_eval
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "the file is empty"),
        ("{broken", "not a readable jsonl file"),
        ("[1]", "bad.jsonl:1: expected a JSON object, got list"),
        ('{"question": "?"}', "of no known kind; known: UID, sentence_good, sentence_bad; query, choices, label"),
        ('{"query": "q", "choices": ["a", "b"], "label": 2}', "label 2 and"),
        ('{"query": "q", "choices": ["a", 1], "label": 0}', "must be strings"),
        ('{"query": "q", "choices": ["a", "b"], "label": "0"}', "label must be int, got '0'"),
        ('{"context": "a", "continuation": "b"}\n{"context": "a"}', "bad.jsonl:2: continuation must be str, got None"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(model, tokenizer, tmp_path, line: str, message: str):
    (tmp_path / "bad.jsonl").write_text(line)
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        run_tasks(model, tokenizer, ["bad"], data_dir=tmp_path)


@needs_lm_eval
def test_unknown_names_get_the_nearest(model, tokenizer, folder):
    with pytest.raises(ConfigError, match=r"no pair\.jsonl; did you mean 'pairs'\?"):
        run_tasks(model, tokenizer, ["pair"], data_dir=folder)
    with pytest.raises(ConfigError, match="no such folder"):
        run_tasks(model, tokenizer, ["pairs"], data_dir=folder / "missing")
    with pytest.raises(ConfigError, match="limit"):
        run_tasks(model, tokenizer, ["pairs"], data_dir=folder, limit=0)
    with pytest.raises(ConfigError, match="no tasks"):
        run_tasks(model, tokenizer, [], data_dir=folder)


@needs_lm_eval
@pytest.mark.slow  # lm-eval reads its 14,000 task files
def test_an_unknown_registered_task_gets_close_names(model, tokenizer):
    with pytest.raises(ConfigError, match=r"no task 'hellaswagg'; close names: hellaswag"):
        run_tasks(model, tokenizer, ["hellaswagg"])


def test_without_lm_eval_the_extra_is_named(model, tokenizer, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(ConfigError, match=r"hestia-lm\[eval\]"):
        run_tasks(model, tokenizer, ["pairs"], data_dir=folder)
