"""The options of the main job, in one place: the command line, run.yaml and the Python function share them.

Each field is a key of ``--config`` files and an option of ``hestia quantize``; its metadata is the help text.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from .errors import ConfigError, nearest
from .files import read_text

PLANNING = (
    "target", "recipe", "options", "bits", "widths", "max_kl", "group_size", "skip", "fallback", "allow_partial",
    "calibrate", "estimator", "sensitivity",
)  # fmt: skip
"""The options that make a plan, and that a plan made beforehand has decided."""

SECTIONS: dict[str, tuple[str, ...]] = {
    "What goes in and comes out": ("data", "eval_data", "out", "target"),
    "Quantization": (
        "recipe", "options", "bits", "widths", "max_kl", "group_size", "skip", "fallback", "head", "allow_partial",
        "plan", "plan_sha256", "calibrate", "estimator", "sensitivity",
    ),
    "Training": (
        "tokens", "steps", "batch_size", "accumulation", "lr", "warmup", "lr_decay", "lr_final",
        "second_stage", "second_factor", "weight_decay", "clip", "scale_rate", "norm_rate", "embedding_rate",
        "embeddings", "precision", "gradient_checkpointing", "compile",
    ),
    "Teacher": ("teacher", "distill", "distill_weight", "distill_noise"),
    "Text": ("seq_len", "separator", "text_column", "joiner", "held_out_share", "eval_tokens"),
    "Seed, machine and log": ("seed", "device", "threads", "save_every", "log_every", "report_to", "trust_remote_code"),
}  # fmt: skip
"""Every option but the model under what it is about, as help pages list them."""


def _option(default: Any, text: str, **extra: Any) -> Any:
    if isinstance(default, (list, dict)):
        raise TypeError("options are immutable")
    return field(default=default, metadata={"help": text, **extra})


BYSTANDERS = frozenset({"out", "threads", "device", "report_to", "log_every", "save_every"})
"""Options that may differ in a run that is resumed, and make no other arm: no number of the result hangs on them."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Everything ``hestia quantize`` can be told.

    Raises:
        ConfigError: a value out of range; the option is named.
    """

    model: str = _option("", "local folder or hub id of the parent model")
    data: tuple[str, ...] = _option((), "training text: files, saved data sets or hub ids")
    eval_data: tuple[str, ...] = _option((), "held-out text; without it a part of --data is held out")
    out: str = _option("", "the run's folder")
    target: tuple[str, ...] = _option(
        ("hf",), "file format (repeatable): each has to hold the plan exactly; --bits counts in the first"
    )
    recipe: str = _option("hearth", "how to quantize; see `hestia recipes`")
    options: Mapping[str, Any] = field(
        default_factory=dict, metadata={"help": "option of the recipe as KEY=VALUE (repeatable)"}
    )
    bits: float = _option(
        1.58, "bits per weight: a width of the recipe, or a budget such as 1.9 to be spent where the damage falls most"
    )
    widths: tuple[str, ...] = _option((), "widths that such a plan may mix (repeatable); 16 keeps a tensor as it is")
    max_kl: float | None = _option(None, "instead of --bits: the cheapest plan whose predicted KL is at most this")
    group_size: str = _option("row", "weights that share a scale: a number, row or tensor")
    skip: tuple[str, ...] = _option((), "shell pattern of module paths to keep (repeatable)")
    fallback: bool = _option(False, "let single tensors use another exact type of the target format")
    head: str = _option("auto", "embedding and head of .gguf files: auto (exact), f16, bf16, q8_0 or f32")
    allow_partial: bool = _option(False, "accept a plan that quantizes under half of the non-embedding weights")
    plan: str | None = _option(None, "follow this plan.json, from `hestia plan`, instead of making a plan")
    plan_sha256: str | None = _option(None, "digest that the file of --plan must have; run.yaml records it")
    tokens: str = _option("2M", "tokens to train on, such as 600k or 2M")
    steps: int | None = _option(None, "optimizer steps, instead of --tokens")
    seq_len: int | None = _option(None, "tokens per block; default min(1024, the model's maximum)")
    batch_size: int | None = _option(None, "blocks per step; default such that at least 300 steps fit, 16 at most")
    accumulation: int = _option(1, "micro-batches per step")
    lr: str = _option(
        "auto", "peak learning rate, or auto: a pilot of short runs at four rates, then longer ones at the best two"
    )
    warmup: float = _option(0.05, "share of the run that warms up the learning rate")
    lr_decay: float = _option(0.2, "share of the run over which the learning rate decays at the end")
    lr_final: float = _option(0.1, "learning rate at the end, as a share of the one before the decay")
    second_stage: float | None = _option(None, "share of the run after which a second, lower rate holds")
    second_factor: float = _option(0.5, "the second stage's rate, as a share of the peak")
    weight_decay: float = _option(0.01, "AdamW's weight decay on matrices")
    clip: float = _option(1.0, "gradient norm limit")
    teacher: str | None = _option(
        "parent", "distil from the parent itself, from another model folder or hub id, or from none"
    )
    distill: str = _option("forward_kl", "what --teacher gives: forward_kl, reverse_kl or akl")
    distill_weight: float = _option(1.0, "the teacher's share in the loss; the rest is cross entropy")
    distill_noise: float = _option(0.0, "share of the tokens that teacher and student read replaced by random ones")
    scale_rate: float = _option(1.0, "factor on the learning rate of learned scales")
    norm_rate: float = _option(1.0, "factor on the learning rate of norms and biases")
    embedding_rate: float = _option(1.0, "factor on the learning rate of embeddings")
    embeddings: str = _option("train", "train or freeze the embeddings (and a tied head)")
    calibrate: int = _option(256, "most sequences of the curvature estimate, which stops when it has settled; 0: none")
    estimator: str = _option("gnb", "how curvature is measured: gnb, fisher, kl, hutchinson, hutchpp, xtrace, eigen")
    sensitivity: str | None = _option(None, "use this sensitivity.json instead of calibrating")
    separator: str = _option("auto", "line that separates documents in .txt files")
    text_column: str | None = _option(None, "column or key that holds the text; default messages (a chat), else text")
    joiner: str = _option("auto", "join documents by bos, eos or both; auto asks the tokenizer")
    held_out_share: float = _option(0.05, "share of --data held out when there is no --eval-data")
    eval_tokens: str = _option("131072", "most held-out tokens to score")
    precision: str = _option("auto", "bf16 (autocast over fp32 weights), fp32, or auto")
    gradient_checkpointing: bool = _option(False, "recompute activations to save memory")
    compile: bool = _option(False, "run the model through torch.compile")
    save_every: int | None = _option(None, "steps between checkpoints; default a fifth of the run or half an hour")
    log_every: int | None = _option(None, "steps between log lines; default a fiftieth of the run")
    report_to: tuple[str, ...] = _option((), "the Trainer's loggers, such as tensorboard (repeatable)")
    seed: int = _option(0, "order of the data, probes, every random draw")
    device: str = _option("auto", "cpu, cuda or auto")
    threads: int | None = _option(None, "CPU threads")
    trust_remote_code: bool = _option(False, "run code that the model folder carries")

    def __post_init__(self) -> None:
        for item in fields(self):
            object.__setattr__(self, item.name, _coerce(item.name, getattr(self, item.name), _HINTS[item.name]))
        if self.teacher == "none":
            object.__setattr__(self, "teacher", None)
        object.__setattr__(self, "target", tuple(dict.fromkeys(self.target)))
        if not self.target:
            raise ConfigError("--target: no file format is given; name one, such as hf")
        if self.text_column == "":
            raise ConfigError("--text-column is the name of a column; leave it out for messages, else text")
        _choice("embeddings", self.embeddings, ("train", "freeze"))
        _choice("precision", self.precision, ("auto", "bf16", "fp32"))
        _choice("head", self.head, ("auto", "f32", "f16", "bf16", "q8_0"))
        _choice("joiner", self.joiner, ("auto", "bos", "eos", "both"))
        _choice("device", self.device, ("auto", "cpu", "cuda"))
        _choice("distill", self.distill, ("forward_kl", "reverse_kl", "akl"))
        for name in ("distill_weight", "distill_noise"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"--{name.replace('_', '-')} must lie in [0, 1], got {getattr(self, name)}")
        for name in ("accumulation", "batch_size", "steps", "seq_len", "threads", "save_every", "log_every"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= _MOST[name]:
                raise ConfigError(
                    f"--{name.replace('_', '-')} must be at least 1 and at most {_MOST[name]}, got {value}"
                )
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"--seed must lie between 0 and 2**32 - 1, got {self.seed}")
        if self.calibrate < 0 or self.calibrate == 1 or self.calibrate > 10**9:
            raise ConfigError(f"--calibrate needs at least 2 sequences (or 0 for none), got {self.calibrate}")
        if not 0.0 < self.held_out_share < 0.5:
            raise ConfigError(f"--held-out-share must lie between 0 and 0.5, got {self.held_out_share}")
        for name in ("clip", "weight_decay", "scale_rate", "norm_rate", "embedding_rate"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ConfigError(
                    f"--{name.replace('_', '-')} must be 0 or a positive number, got {getattr(self, name)}"
                )
        for name in ("tokens", "eval_tokens"):
            count(getattr(self, name), name)
        if not 0.0 < self.bits <= 32.0:
            raise ConfigError(f"--bits must be a positive number, got {self.bits:g}")
        if self.max_kl is not None and not 0.0 < self.max_kl < math.inf:
            raise ConfigError(f"--max-kl must be a positive number of nats per token, got {self.max_kl}")
        self.group()
        self.mix()
        self.learning_rate()
        self._check_plan()

    def _check_plan(self) -> None:
        """Refuse what a plan made beforehand has decided."""
        if self.plan is None:
            if self.plan_sha256 is not None:
                raise ConfigError("--plan-sha256 is the digest of a --plan; give that too")
            return
        told = [
            "--option" if item.name == "options" else f"--{item.name.replace('_', '-')}"
            for item in fields(self)
            if item.name in PLANNING and getattr(self, item.name) != _default(item)
        ]
        if told:
            raise ConfigError(f"--plan {self.plan} has decided {', '.join(told)}; leave it out, or plan again with it")

    def group(self) -> Any:
        """The group size as the quantizer wants it.

        Raises:
            ConfigError: neither a number, row nor tensor.
        """
        if self.group_size in ("row", "tensor"):
            return self.group_size
        if self.group_size.isdecimal() and int(self.group_size) > 0:
            return int(self.group_size)
        raise ConfigError(f"--group-size must be a positive number, row or tensor, got {self.group_size!r}")

    def mix(self) -> tuple[float, ...] | None:
        """The widths a mixed plan may use; None where the recipe's own will do.

        Raises:
            ConfigError: something that is no width.
        """
        widths = {"1": 1.0, "1.58": 1.58, "2": 2.0, "3": 3.0, "4": 4.0, "16": 16.0}
        for text in self.widths:
            if text not in widths:
                raise ConfigError(f"--widths {text!r}: {nearest(text, widths)}")
        return tuple(widths[text] for text in self.widths) or None

    def learning_rate(self) -> float | None:
        """The peak rate, or None for auto.

        Raises:
            ConfigError: neither a positive number nor auto.
        """
        if self.lr == "auto":
            return None
        try:
            rate = float(self.lr)
        except ValueError:
            rate = 0.0
        if not 0.0 < rate < 10.0:
            raise ConfigError(f"--lr must be auto or a positive number, got {self.lr!r}")
        return rate

    def to_yaml(self) -> str:
        """run.yaml: every option but those that a plan decided, so that ``--config run.yaml`` repeats the run."""
        decided = PLANNING if self.plan is not None else ()
        values = {k: v for k, v in dataclasses.asdict(self).items() if k not in decided}
        record = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return yaml.safe_dump(record, sort_keys=False, allow_unicode=True)


_HINTS = typing.get_type_hints(Options)
_MOST = {
    "accumulation": 1 << 16, "batch_size": 1 << 20, "steps": 10**9, "seq_len": 1 << 24, "threads": 4096,
    "save_every": 10**9, "log_every": 10**9,
}  # fmt: skip


def load_config(path: Path) -> dict[str, Any]:
    """The options in a YAML file.

    Raises:
        ConfigError: unreadable, not a mapping, or with an unknown key; the nearest valid key is named.
    """
    if not path.exists():
        raise ConfigError(f"{path}: no such configuration file")
    text = read_text(path)
    try:
        record = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(record, dict):
        raise ConfigError(f"{path}: expected options as key: value, got {type(record).__name__}")
    return {_known(str(key), str(path)): value for key, value in record.items()}


def _known(key: str, where: str) -> str:
    name = key.replace("-", "_")
    if name not in _HINTS:
        raise ConfigError(f"{where}: unknown option {key!r}: {nearest(name, _HINTS)}")
    return name


def count(text: str, name: str) -> int:
    """A number of tokens as people write it.

    >>> count("600k", "tokens"), count("2M", "tokens"), count("1.5b", "tokens"), count("4096", "tokens")
    (600000, 2000000, 1500000000, 4096)

    Raises:
        ConfigError: no number from 1 to 10^18; ``name`` is the option it stands for.
    """
    units = {"k": 10**3, "m": 10**6, "b": 10**9}
    lowered = text.strip().lower().replace("_", "")
    if re.fullmatch(r"\d{1,3}(,\d{3})+[kmb]?", lowered):  # and no decimal comma
        lowered = lowered.replace(",", "")
    factor = units.get(lowered[-1:], 1)
    try:
        value = round(float(lowered[:-1] if factor > 1 else lowered) * factor)
    except (ValueError, OverflowError):
        value = 0
    if not 1 <= value <= 10**18:
        raise ConfigError(f"--{name.replace('_', '-')} must be a positive number such as 600k or 2M, got {text!r}")
    return value


def _default(item: dataclasses.Field[Any]) -> Any:
    return {} if item.default is dataclasses.MISSING else item.default


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"--{name} {value!r}: {nearest(value, allowed)}")


def _coerce(name: str, value: Any, hint: Any) -> Any:
    """``value`` as the declared type; lists become tuples, and 1e-2, which is text in YAML, a number."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    kind = next(option for option in options if option is not type(None))
    if typing.get_origin(kind) is tuple:
        items = value if isinstance(value, (list, tuple)) else (value,)
        if all(isinstance(item, (str, Path, int, float)) and not isinstance(item, bool) for item in items):
            return tuple(f"{item:g}" if isinstance(item, float) else str(item) for item in items)
        raise ConfigError(f"--{name.replace('_', '-')} wants one value or a list of them, got {value!r}")
    if kind is bool or isinstance(value, bool):
        if kind is bool and isinstance(value, bool):
            return value
    elif kind is int and isinstance(value, int):
        return value
    elif kind is float and isinstance(value, (int, float, str)):
        with contextlib.suppress(ValueError):
            return float(value)
    elif kind is str and isinstance(value, (str, int, float, Path)):
        return str(value)
    elif typing.get_origin(kind) is not None and isinstance(value, Mapping):
        return {str(key): _as_python(item) for key, item in value.items()}
    wanted = getattr(kind, "__name__", str(kind))
    raise ConfigError(f"--{name.replace('_', '-')} wants a {wanted}, got {value!r}")


def _as_python(value: Any) -> Any:
    """A number of numpy or torch as Python's, which YAML and JSON can write; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value
