"""Zero-shot tasks through lm-eval (extra ``eval``): the one file that imports it.

Tasks come from lm-eval's registry by name (it downloads them), or, offline, from a folder of ``NAME.jsonl`` files with
one item a line. The keys of the first item say which of four kinds a file is:

    UID, sentence_good, sentence_bad              a minimal pair (BLiMP): is the good sentence more likely?
    query, choices, label                         multiple choice: which choice is the most likely after the query?
    context_options, continuation, gold           WinoGrande: after which context is the continuation most likely?
    context, continuation                         LAMBADA: is the continuation what greedy decoding gives?

``acc`` takes the highest total log-probability, ``acc_norm`` divides it by the choice's length in characters. As in
lm-eval's own tasks, one space stands before every choice and continuation; a sentence without context follows the
tokenizer's BOS, or its EOS where there is none. Prompts longer than the model's context are cut on the left.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import io
import json
import logging
import math
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from torch import nn

from ..errors import ConfigError, GuardError, nearest
from ..progress import bar


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """One kind of jsonl file: its keys with their types, and what lm-eval must be told about it.

    ``answer`` names the key that holds the number of the right option and the key of the options.
    """

    keys: dict[str, type]
    answer: tuple[str, str] | None = None
    text: str
    choice: str | None = None
    target: str | int
    metrics: tuple[str, ...]


_KINDS = (
    _Kind(
        keys={"UID": str, "sentence_good": str, "sentence_bad": str},
        text="",
        choice="{{[sentence_good, sentence_bad]}}",
        target=0,
        metrics=("acc",),
    ),
    _Kind(
        keys={"query": str, "choices": list, "label": int},
        answer=("label", "choices"),
        text="query",
        choice="choices",
        target="label",
        metrics=("acc", "acc_norm"),
    ),
    _Kind(
        keys={"context_options": list, "continuation": str, "gold": int},
        answer=("gold", "context_options"),
        text="gold",
        choice="context_options",
        target="continuation",
        metrics=("acc",),
    ),
    _Kind(
        keys={"context": str, "continuation": str},
        text="context",
        target="{{' ' + continuation}}",
        metrics=("acc", "perplexity"),
    ),
)
_METRICS = {
    "acc": {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    "acc_norm": {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
    "perplexity": {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
}
_PARADIGM = "UID"


def run_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    data_dir: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, Any]]:
    """Zero-shot results of a transformers causal LM on lm-eval tasks.

    The model is evaluated as it stands, in evaluation mode (a ``QuantLinear`` then computes its frozen weights); its
    training modes are restored, and the tokenizer is not changed.

    Args:
        model: a loaded transformers causal LM.
        tokenizer: its tokenizer.
        tasks: task names: files ``data_dir/NAME.jsonl``, or without ``data_dir`` names of lm-eval's registry.
        data_dir: folder of local tasks; with it nothing is downloaded.
        limit: only the first so many items of each task (of each paradigm of a minimal-pair file).
        batch_size: sequences a forward pass.

    Returns:
        ``{task: {metric: value, metric + "_stderr": standard error, "n": items}}`` with lm-eval's metric names (acc,
        acc_norm, perplexity, ...). Standard errors are std / sqrt(n) over the items, by the delta method for
        perplexity; None where a metric is not a mean or n is 1. A minimal-pair task also has
        ``"paradigms": {UID: {"acc", "acc_stderr", "n"}}``; a group of the registry gives its tasks one by one.

    Raises:
        ConfigError: lm-eval is not installed, an unknown task, a damaged file (named with its line), a limit below 1.
        GuardError: the model gives log-probabilities that are NaN or infinite, which lm-eval would count as correct.
    """
    check_tasks(tasks, data_dir, limit)
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has neither BOS nor EOS: lm-eval has nothing to put before a first sentence")

    trained = [module for module in model.modules() if module.training]
    with tempfile.TemporaryDirectory(prefix="hestia-tasks-") as folder, _quiet():
        loaded = _local(tasks, data_dir, limit, Path(folder)) if data_dir is not None else _registered(tasks)
        wrapper: Any = HFLM  # its decorator hides the constructor from type checkers
        try:
            # The copy is for lm-eval, which sets a padding token on the tokenizer it is given.
            lm = wrapper(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
            output: Any = evaluate(lm, loaded, limit=limit if data_dir is None else None, bootstrap_iters=0)
        finally:
            for module in trained:
                module.training = True
    return {name: _summary(name, output["results"][name], output["samples"][name]) for name in loaded["tasks"]}


def check_tasks(tasks: Sequence[str], data_dir: Path | None, limit: int | None) -> None:
    """Refuse what ``run_tasks`` would, before any model is loaded; the items of a local task are read.

    Raises:
        ConfigError: lm-eval is not installed, an unknown task, a damaged file (named with its line), a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is a number of items, 1 or more, got {limit}")
    if not tasks:
        raise ConfigError("no tasks given; name at least one, such as 'blimp'")
    try:
        import lm_eval.evaluator
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"tasks need lm-eval ({error}); write: pip install 'hestia-lm[eval]'") from None
    if data_dir is None:
        with _quiet():
            _known(tasks)
    else:
        for path in _files(tasks, data_dir):
            _read(path, limit)


def _known(tasks: Sequence[str]) -> Any:
    """lm-eval's manager, which has these tasks."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    for name in tasks:
        if name not in manager.task_index:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            raise ConfigError(
                f"lm-eval has no task {name!r}; close names: {', '.join(close) or 'none'} "
                "(`lm-eval ls tasks` lists all; a folder of jsonl files needs --tasks-dir)"
            )
    return manager


def _files(tasks: Sequence[str], data_dir: Path) -> list[Path]:
    """The file of every local task."""
    files = {path.stem: path for path in sorted(data_dir.glob("*.jsonl"))}
    if not files:
        raise ConfigError(f"{data_dir}: no such folder, or no .jsonl file in it")
    for name in tasks:
        if name not in files:
            raise ConfigError(f"{data_dir}: no {name}.jsonl; {nearest(name, files)}")
    return [files[name] for name in tasks]


def _registered(tasks: Sequence[str]) -> Any:
    """Tasks of lm-eval's registry, zero-shot unless a task says otherwise."""
    manager = _known(tasks)
    try:
        loaded = manager.load(list(tasks))
    except (OSError, ValueError) as error:
        raise ConfigError(f"lm-eval could not load {', '.join(tasks)}: {error}") from None
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(f"task {name!r} runs code that a model wrote; hestia does not run it")
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
    return loaded


def _local(tasks: Sequence[str], data_dir: Path, limit: int | None, folder: Path) -> Any:
    """Tasks of ``data_dir``; the items that count are copied to ``folder``, where datasets keeps its cache too."""
    from lm_eval.tasks import TaskManager

    configs = []
    for name, path in zip(tasks, _files(tasks, data_dir), strict=True):
        kind, items = _read(path, limit)
        copied = folder / f"{name}.jsonl"
        copied.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
        config: dict[str, Any] = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(copied)},
                "cache_dir": str(folder / "cache"),
                "keep_in_memory": True,
            },
            "test_split": "test",
            "output_type": "multiple_choice" if kind.choice else "loglikelihood",
            "doc_to_text": kind.text,
            "doc_to_target": kind.target,
            "metric_list": [_METRICS[metric] for metric in kind.metrics],
            "num_fewshot": 0,
        }
        if kind.choice:
            config["doc_to_choice"] = kind.choice
        configs.append(config)
    return TaskManager(include_defaults=False).load(configs)


def _read(path: Path, limit: int | None) -> tuple[_Kind, list[dict[str, Any]]]:
    """The kind of a jsonl file and its first ``limit`` items (of each paradigm), with the kind's keys alone."""
    kind: _Kind | None = None
    items: list[dict[str, Any]] = []
    taken: Counter[str] = Counter()
    for number, record in _records(path):
        if kind is None:
            kind = next((k for k in _KINDS if k.keys.keys() <= record.keys()), None)
            if kind is None:
                kinds = "; ".join(", ".join(k.keys) for k in _KINDS)
                raise ConfigError(f"{path}:{number}: keys {', '.join(record)} are of no known kind; known: {kinds}")
        for key, expected in kind.keys.items():
            if type(record.get(key)) is not expected:
                raise ConfigError(f"{path}:{number}: {key} must be {expected.__name__}, got {record.get(key)!r}")
        if kind.answer is not None:
            answer, options = record[kind.answer[0]], record[kind.answer[1]]
            if not 0 <= answer < len(options) or not all(isinstance(option, str) for option in options):
                raise ConfigError(
                    f"{path}:{number}: {kind.answer[1]} must be strings and {kind.answer[0]} the number of one, "
                    f"counted from 0; got {kind.answer[0]} {answer} and {options!r}"
                )
        paradigm = str(record.get(_PARADIGM, ""))
        taken[paradigm] += 1
        if limit is None or taken[paradigm] <= limit:
            items.append({key: record[key] for key in kind.keys})
    if kind is None:
        raise ConfigError(f"{path}: the file is empty")
    return kind, items


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of every line of a jsonl file that is not blank."""
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ConfigError(f"{path}:{number}: expected a JSON object, got {type(record).__name__}")
                yield number, record
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: not a readable jsonl file ({error})") from None


def _summary(name: str, results: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, Any]:
    """lm-eval's numbers of one task with standard errors computed here from the items."""
    for sample in samples:
        for response in sample["filtered_resps"]:
            # A (log-probability, greedy) pair; argmax over NaN is choice 0, which lm-eval would then score.
            if isinstance(response, tuple) and not math.isfinite(response[0]):
                raise GuardError(f"{name}, item {sample['doc_id']}: the model's log-probability is {response[0]}")

    by_filter: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for sample in samples:
        by_filter[sample["filter"]].append(sample)
    summary: dict[str, Any] = {}
    for key, value in results.items():
        metric, _, filtered = key.partition(",")
        if filtered not in by_filter or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        label = metric if filtered == "none" else key
        summary[label] = value
        summary[f"{label}_stderr"] = _stderr(value, metric, [sample[metric] for sample in by_filter[filtered]])
    first = next(iter(by_filter.values()))
    summary["n"] = len(first)
    if _PARADIGM in first[0]["doc"] and "acc" in first[0]:
        hits: dict[str, list[float]] = defaultdict(list)
        for sample in first:
            hits[sample["doc"][_PARADIGM]].append(sample["acc"])
        summary["paradigms"] = {
            uid: {"acc": fmean(hit), "acc_stderr": _stderr(fmean(hit), "acc", hit), "n": len(hit)}
            for uid, hit in hits.items()
        }
    return summary


def _stderr(value: float, metric: str, items: list[Any]) -> float | None:
    """Standard error of a mean, or of exp(-mean) for a perplexity; None for every other statistic."""
    if len(items) < 2 or not all(isinstance(item, (int, float)) for item in items):
        return None
    error = stdev(map(float, items)) / math.sqrt(len(items))
    if metric == "perplexity":
        return value * error
    return error if math.isclose(fmean(map(float, items)), value, rel_tol=1e-6, abs_tol=1e-9) else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's warnings off, and its progress bars too unless hestia shows its own."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()) if bar().disable else contextlib.nullcontext():
            yield
    finally:
        logger.setLevel(level)
