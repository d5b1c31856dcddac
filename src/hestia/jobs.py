"""The smaller jobs that single verbs run, and what they share with the main job."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import curvature, loading, processes, recipes
from .data import Blocks, TokenizedText, epoch_order, pack_all, prepare, read_documents
from .data.sources import resolve
from .errors import ConfigError
from .evaluation import PAPER_TOKENS, Logits, check_tasks, hestia_protocol_perplexity, model_logits, run_tasks, score
from .export import llama_cpp
from .export.frozen import MODEL_FOLDER
from .export.gguf_reader import open_checked
from .export.precheck import check_targets
from .mixed import is_mixed
from .nn import select
from .options import Options, count
from .planner import plan as make_plan
from .plans import Plan
from .progress import announce
from .quant import Gaussian, GroupSize, QuantSpec
from .quant.grouping import group_shape
from .recipes import Recipe

LARGEST_DEFAULT_BATCH = 16
"""Blocks a step where --batch-size is not given, at most."""

DEFAULT_BLOCK = 1024
"""Tokens per block where --seq-len is not given, at most."""

TUNING_BLOCKS = 32
"""Training blocks set aside for the logged hard loss and the learning-rate pilot; the held-out text is scored once."""


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


def tell_unread_curvature(options: Options) -> None:
    """Say so where curvature is given, or how to measure it, and nothing reads it."""
    given = [f"--{k} {getattr(options, k)}" for k in ("sensitivity", "estimator", "calibrate")
             if getattr(options, k) not in (getattr(Options, k), 0)]  # fmt: skip
    if given and not recipe_of(options).uses_curvature and not widths_may_differ(options):
        announce(
            f"recipe {options.recipe} reads no curvature and all tensors get one width, so this has no effect: "
            f"{', '.join(given)}"
        )


def recipe_of(options: Options) -> Recipe:
    """The recipe that the options name, with the options that they give it.

    Raises:
        ConfigError: an unknown recipe or option of it.
    """
    return recipes.get(options.recipe, **options.options)


def widths_may_differ(options: Options) -> bool:
    """Whether the plan may give tensors different widths, which needs a sensitivity whatever the recipe."""
    return is_mixed(recipe_of(options), options.bits, options.mix(), options.max_kl)


def plan_of(model: PreTrainedModel, options: Options, **instead: Any) -> Plan:
    """The plan that the options ask for, with other arguments of ``hestia.planner.plan`` in place of theirs.

    Raises:
        ConfigError, PlanError: see there.
    """
    asked: dict[str, Any] = {
        "recipe": recipes.get(options.recipe, **options.options),
        "target": options.target,
        "sensitivity": options.sensitivity,
        "bits": options.bits,
        "widths": options.mix(),
        "max_kl": options.max_kl,
        "group_size": options.group(),
        "skip": options.skip,
        "fallback": options.fallback,
        "allow_partial": options.allow_partial,
    }
    return make_plan(model, **(asked | instead))


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
    if not options.data and not tasks:
        raise ConfigError("nothing to evaluate on: give --data, --tasks or both")
    device = choose_device(options)
    packed = options.model.endswith(".gguf")
    if against is not None and not options.data:
        raise ConfigError("--against compares on --data; give that too, or leave --against out: --tasks do without")
    if packed and (against is None or tasks):
        raise ConfigError("a .gguf file needs --against (its run or parent, for the tokenizer) and cannot run --tasks")
    folder = Path(tasks_dir) if tasks_dir is not None else None
    if tasks:
        check_tasks(tasks, folder, limit)
    elif folder is not None or limit is not None:
        raise ConfigError(f"--{'limit' if folder is None else 'tasks-dir'} is of --tasks; give those too")
    packed_logits = _llama_logits(Path(options.model)) if packed else None
    source = _model_source(against if packed and against is not None else options.model)
    config = loading.load_config(source, trust_remote_code=options.trust_remote_code)
    tokenizer = loading.load_tokenizer(source, trust_remote_code=options.trust_remote_code)
    seq_len = longest_block(config, options, PAPER_TOKENS if protocol == "hestia" else DEFAULT_BLOCK)
    if against is not None and not packed:
        _require_same_tokens(tokenizer, against, options)
    model: Any = None
    if packed:
        assert packed_logits is not None
        logits = packed_logits
    else:
        model = loading.load_model(source, trust_remote_code=options.trust_remote_code)
        logits = model_logits(model.to(device))
    record: dict[str, Any] = {"model": options.model}
    if options.data and protocol == "hestia":
        record |= _paper_protocol(logits, options, tokenizer, min(PAPER_TOKENS, seq_len))
    elif options.data:
        blocks = all_blocks(options, tokenizer, seq_len)
        loading.check_vocabulary(source, config, int(blocks.input_ids.max()))
        parent: Logits | None = None
        if against is not None:
            parent_model: Any = loading.load_model(_model_source(against), trust_remote_code=options.trust_remote_code)
            parent = model_logits(parent_model.to(device))
        record |= score(logits, blocks, parent=parent).to_json()
    if tasks:
        record["tasks"] = run_tasks(model, tokenizer, tasks, data_dir=folder, limit=limit)
    return record


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


def choose_device(options: Options) -> torch.device:
    """The device asked for, said where it is a GPU or could have been one; threads are set here too.

    Raises:
        ConfigError: CUDA asked for where there is none.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this torch sees no CUDA device")
    if options.device == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        free, size = torch.cuda.mem_get_info()
        announce(f"on {torch.cuda.get_device_name()}, {free / 1e9:.1f} of {size / 1e9:.1f} GB free")
        return torch.device("cuda")
    if shutil.which("nvidia-smi"):
        announce("on the CPU: a GPU is here and torch does not see it, `hestia doctor` says more")
    return torch.device("cpu")


def in_bf16(options: Options, config: Any, device: torch.device) -> bool:
    """Whether training runs under bf16 autocast.

    auto: on a GPU that multiplies bf16 without emulating it (from Ampere on); on a CPU if the model is 128 wide.
    """
    if options.precision != "auto":
        return options.precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return int(getattr(config.get_text_config(), "hidden_size", 1024)) >= 128


def batch_and_steps(options: Options, seq_len: int, parts: int) -> tuple[int, int]:
    """Blocks a step, the user's or as many as leave at least 300 steps, 16 at most; and optimizer steps.

    Args:
        options: of the run.
        seq_len: tokens per block.
        parts: processes that share the training.

    Raises:
        ConfigError: a batch that processes and micro-batches cannot share evenly.
    """
    total, shares = count(options.tokens, "tokens"), options.accumulation * parts
    size = options.batch_size
    if size is None:
        size = max(1, min(LARGEST_DEFAULT_BATCH, total // (300 * seq_len)))
        size = max(shares, size - size % shares)
    if size % shares:
        if parts == 1:
            raise ConfigError(f"--accumulation {shares} does not divide --batch-size {size}; choose a multiple of it")
        raise ConfigError(
            f"--batch-size {size} cannot be shared out evenly between {parts} processes in "
            f"{options.accumulation} micro-batches; choose a multiple of {shares}"
        )
    return size, options.steps or max(1, total // (size * seq_len))


def prepare_text(
    options: Options,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    cache: Path | None,
    begun: Mapping[str, Mapping[str, Any]] | None = None,
    batch: int | None = None,
) -> TokenizedText:
    """Training and held-out blocks as the options ask for; ``cache`` is only read, ``begun`` pins hub data sets.

    ``batch`` is that of a run that goes on, whatever today's number of processes would make it.
    """
    tokens = count(options.tokens, "tokens")
    batch = batch or batch_and_steps(options, seq_len, processes.world_size())[0]
    if options.steps is not None:
        tokens = options.steps * (options.batch_size or max(batch, LARGEST_DEFAULT_BATCH)) * seq_len
    return prepare(
        options.data,
        options.eval_data or None,
        tokenizer,
        seq_len=seq_len,
        joiner=options.joiner,  # type: ignore[arg-type]
        separator=options.separator,
        column=options.text_column,
        held_out_share=options.held_out_share,
        seed=options.seed,
        cache=cache,
        keep=False,
        max_train_tokens=tokens + tokens // 10 + TUNING_BLOCKS * seq_len,
        max_held_out_tokens=count(options.eval_tokens, "eval_tokens"),
        begun=begun,
    )


def all_blocks(options: Options, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Blocks:
    """Every block of ``--data``, up to ``--eval-tokens``; nothing is held out."""
    text = pack_all(
        options.data,
        tokenizer,
        seq_len=seq_len,
        joiner=options.joiner,  # type: ignore[arg-type]
        separator=options.separator,
        column=options.text_column,
        max_tokens=count(options.eval_tokens, "eval_tokens"),
    )
    return spread(text, count(options.eval_tokens, "eval_tokens") // seq_len)


def spread(blocks: Blocks, most: int) -> Blocks:
    """At most ``most`` blocks (at least one), evenly spread, so that every source keeps its share."""
    if len(blocks) <= most:
        return blocks
    rows = torch.linspace(0, len(blocks) - 1, max(1, most)).round().long()
    return Blocks(blocks.input_ids[rows], blocks.loss_mask[rows])


def longest_block(config: Any, options: Options, most: int = DEFAULT_BLOCK) -> int:
    """Tokens per block: ``--seq-len``, or the model's maximum, ``most`` at most.

    Raises:
        ConfigError: more than the model has positions for.
    """
    longest = int(getattr(config.get_text_config(), "max_position_embeddings", most) or most)
    chosen = options.seq_len or min(most, longest)
    if chosen > longest:
        raise ConfigError(f"--seq-len {chosen} is longer than the model's {longest} positions")
    return chosen


def candidate_specs(widths: Sequence[int], group_size: GroupSize) -> dict[str, QuantSpec]:
    """Label -> quantizer of every bit width, by the scale rule that suits them all.

    Raises:
        PlanError: a group size that does not divide a row of ``widths`` inputs.
    """
    for columns in sorted(set(widths)):
        group_shape((1, columns), group_size)
    return {grid.name: QuantSpec(grid=grid, group_size=group_size, scale=Gaussian()) for grid in recipes.GRIDS.values()}


def calibrate_on(
    model: PreTrainedModel,
    paths: Sequence[str],
    candidates: Mapping[str, QuantSpec],
    blocks: Blocks,
    options: Options,
    fingerprint: Mapping[str, Any],
    keep: Path | None = None,
) -> curvature.Sensitivity:
    """Curvature of the named tensors on at most ``--calibrate`` blocks drawn by seed; ``keep`` holds what is done."""
    weights = {path: model.get_parameter(f"{path}.weight") for path in paths}
    rows = epoch_order(len(blocks), options.seed, 0)[: options.calibrate]
    return curvature.calibrate(
        model,
        weights,
        blocks.input_ids[rows].long(),
        targets=blocks.loss_mask[rows],
        estimator=options.estimator,
        candidates=candidates,
        diagonals=options.group(),
        stopping=curvature.Stopping(),
        seed=options.seed,
        fingerprint=fingerprint,
        keep=keep,
    )
