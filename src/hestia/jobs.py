"""The jobs of ``hestia plan``, ``calibrate`` and ``eval``; the main job is in ``pipeline/``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from . import curvature, loading
from .data import read_documents
from .data.sources import resolve
from .errors import ConfigError
from .evaluation import PAPER_TOKENS, Logits, check_tasks, hestia_protocol_perplexity, model_logits, run_tasks, score
from .export import llama_cpp
from .export.frozen import MODEL_FOLDER
from .export.gguf_reader import open_checked
from .export.precheck import check_targets
from .nn import select
from .options import Options
from .plans import Plan
from .progress import announce
from .settings import (
    DEFAULT_BLOCK,
    all_blocks,
    calibrate_on,
    candidate_specs,
    choose_device,
    longest_block,
    plan_of,
    prepare_text,
    tell_unread_curvature,
)


def plan_model(options: Options) -> Plan:
    """``hestia plan``: the plan of a model from its configuration alone.

    Raises:
        ConfigError, PlanError: see ``hestia.planner.plan``.
    """
    source = loading.resolve(options.model)
    config = loading.load_config(source, trust_remote_code=options.trust_remote_code)
    empty = loading.empty_model(source, config, trust_remote_code=options.trust_remote_code)
    loading.require_trainable(source, config, empty)
    tell_unread_curvature(options)
    made = plan_of(empty, options)
    tokenizer = loading.tokenizer_folder(source) if (Path(source.location) / "tokenizer.json").is_file() else None
    check_targets(made.targets, config, Path(source.location), tokenizer, head=options.head)
    return made


def calibrate_model(options: Options, keep: Path | None = None) -> curvature.Sensitivity:
    """``hestia calibrate``: the curvature of every quantizable tensor of a model; ``keep`` holds what is done.

    Raises:
        ConfigError, CalibrationError: bad input, or a tensor that the text does not reach.
    """
    if options.calibrate < 2:
        raise ConfigError(f"--calibrate {options.calibrate}: an interval needs at least 2 sequences; 64 are usual")
    device = choose_device(options)
    source = loading.resolve(options.model)
    config = loading.load_config(source, trust_remote_code=options.trust_remote_code)
    tokenizer = loading.load_tokenizer(source, trust_remote_code=options.trust_remote_code)
    text = prepare_text(options, tokenizer, longest_block(config, options), None)
    loading.check_vocabulary(source, config, int(text.record["max_token_id"]))
    model: Any = loading.load_model(source, trust_remote_code=options.trust_remote_code)
    model.to(device)
    linears = select(model, options.skip).candidates
    specs = candidate_specs([linear.in_features for linear in linears.values()], options.group())
    identity = loading.describe(source, config)
    return calibrate_on(model, list(linears), specs, text.train, options, identity, keep)


def evaluate_model(
    options: Options,
    *,
    against: str | None = None,
    tasks: Sequence[str] = (),
    tasks_dir: str | None = None,
    limit: int | None = None,
    protocol: str | None = None,
) -> dict[str, Any]:
    """``hestia eval``: NLL on text, KL to a parent, lm-eval tasks.

    Args:
        options: model (folder, hub id, run or .gguf file), data and machine.
        against: the parent, or run, for KL and top-1 agreement.
        tasks: lm-eval task names, or names of .jsonl files in ``tasks_dir``.
        tasks_dir: folder of local tasks.
        limit: items a task.
        protocol: "hestia" for the paper's packing of documents.

    Raises:
        ConfigError: bad input, or neither data nor tasks.
    """
    folder = Path(tasks_dir) if tasks_dir is not None else None
    _check_evaluation(options, against, tasks, folder, limit)
    device = choose_device(options)
    packed = _is_packed(options)
    in_llama_cpp = _llama_logits(Path(options.model)) if packed else None
    source = _model_source(against if packed and against is not None else options.model)
    config = loading.load_config(source, trust_remote_code=options.trust_remote_code)
    tokenizer = loading.load_tokenizer(source, trust_remote_code=options.trust_remote_code)
    seq_len = longest_block(config, options, PAPER_TOKENS if protocol == "hestia" else DEFAULT_BLOCK)
    if against is not None and not packed:
        _require_same_tokens(tokenizer, against, options)
    model: Any = None if packed else _loaded(source, options, device)
    logits = in_llama_cpp or model_logits(model)
    record: dict[str, Any] = {"model": options.model}
    if options.data and protocol == "hestia":
        record |= _paper_protocol(logits, options, tokenizer, min(PAPER_TOKENS, seq_len))
    elif options.data:
        blocks = all_blocks(options, tokenizer, seq_len)
        loading.check_vocabulary(source, config, int(blocks.input_ids.max()))
        parent = None if against is None else model_logits(_loaded(_model_source(against), options, device))
        record |= score(logits, blocks, parent=parent).to_json()
    if tasks:
        record["tasks"] = run_tasks(model, tokenizer, tasks, data_dir=folder, limit=limit)
    return record


def _check_evaluation(
    options: Options, against: str | None, tasks: Sequence[str], folder: Path | None, limit: int | None
) -> None:
    """Refuse what there is nothing to do with, before anything is loaded."""
    if not options.data and not tasks:
        raise ConfigError("nothing to evaluate on: give --data, --tasks or both")
    if against is not None and not options.data:
        raise ConfigError("--against compares on --data; give that too, or leave --against out: --tasks do without")
    if _is_packed(options) and (against is None or tasks):
        raise ConfigError("a .gguf file needs --against (its run or parent, for the tokenizer) and cannot run --tasks")
    if tasks:
        check_tasks(tasks, folder, limit)
    elif folder is not None or limit is not None:
        raise ConfigError(f"--{'limit' if folder is None else 'tasks-dir'} is of --tasks; give those too")


def _is_packed(options: Options) -> bool:
    return options.model.endswith(".gguf")


def _loaded(source: loading.Source, options: Options, device: torch.device) -> Any:
    model: Any = loading.load_model(source, trust_remote_code=options.trust_remote_code)
    return model.to(device)


def _model_source(name: str) -> loading.Source:
    """A model folder, a hub id, or the frozen model of a run."""
    frozen = Path(name) / MODEL_FOLDER
    return loading.resolve(str(frozen) if frozen.is_dir() else name)


def _require_same_tokens(tokenizer: PreTrainedTokenizerBase, against: str, options: Options) -> None:
    """Refuse a model whose ids mean other tokens: a divergence between the two would mean nothing."""
    try:
        theirs = loading.load_tokenizer(_model_source(against), trust_remote_code=options.trust_remote_code)
    except ConfigError as error:
        announce(f"--against {against}: no tokenizer can be read ({error}); its tokens are taken for the model's")
        return
    other = loading.first_other_token(theirs, tokenizer)
    if other is not None:
        raise ConfigError(
            f"--against {against} has another tokenizer: its token {other[0]} is {other[1]!r}, the model's "
            f"{other[2]!r}; KL compares models with one tokenizer"
        )


def _llama_logits(path: Path) -> Logits:
    """A .gguf file in llama.cpp as a callable; every batch is a child process."""
    open_checked(path)  # before the parent is loaded; llama.cpp may end the process on a damaged file
    threads = torch.get_num_threads()
    return lambda ids: torch.from_numpy(llama_cpp.logits_all(path, ids.tolist(), threads=threads))


def _paper_protocol(
    logits: Logits, options: Options, tokenizer: PreTrainedTokenizerBase, longest: int
) -> dict[str, Any]:
    ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in _paper_documents(options))
    adds_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]  # type: ignore[index]
    if not isinstance(tokenizer.eos_token_id, int):
        raise ConfigError("--protocol hestia needs a tokenizer with an EOS token")
    bos = tokenizer.bos_token_id if adds_bos and isinstance(tokenizer.bos_token_id, int) else None
    result = hestia_protocol_perplexity(logits, ids, eos=tokenizer.eos_token_id, bos=bos, max_len=longest)  # type: ignore[arg-type]
    return {**result.score.to_json(), "documents": result.documents, "dropped": result.dropped}


def _paper_documents(options: Options) -> Iterator[str]:
    """The paper's documents: every line of a .txt, and the whole text of a row of anything else."""
    for given in options.data:
        is_text = resolve(given).kind == "text"
        for document in read_documents([given], separator=options.separator, column=options.text_column):
            if document.text is None:
                raise ConfigError(f"--protocol hestia packs plain text; {given} holds chats")
            yield from (line for line in document.text.split("\n") if line.strip()) if is_text else [document.text]
