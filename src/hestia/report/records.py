"""A run's folder, read: report.json strictly, everything beside it if it is there.

``report.json`` is what other tools read too, so a key that the format promises must be there, and the message names
the one that is not. A promised *number* may still be null: NaN is written as null, and a recipe that only rounds has
no learning rate. The other artefacts are optional:

    plan.json  sensitivity.json  diagnostics.json  run.yaml    absent is fine, damaged is an error
    log.jsonl                                                  absent is fine, damaged lines are skipped and counted

Every text that comes from a run (names, prompts, what a model wrote) is made encodable here, and is escaped where it
is printed: HTML in html.py, Markdown in model_card.py, control characters in tables.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError
from ..files import read_json

SCHEMA, SENSITIVITY_SCHEMA = 1, 2
REPORT_FILE = "report.json"


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What re-reading the written file showed.

    Attributes:
        codes_equal: every code and scale of the file equals the frozen model's; None where nobody looked.
        max_abs_logit_diff: largest difference of a logit between the engine and the frozen model.
        kl: nats per token between their predictions.
        engine: the program that ran the file; empty where none was installed.
        differences: what else differs, kept tensors and metadata too; ``notes``: what could not be checked.
        ok: the verdict of ``verify`` itself; None where it gave none.
        kl_emulated: the KL of an emulation of the engine's rounding of activations; ``kl_bound``: what is allowed.
        nll_frozen, nll_engine: nats a token on ``tokens`` held-out tokens; ``nll_bound``: the change that is allowed.
        strings, strings_equal: strings that were tokenized by both, and alike.
        head_nll_change: what rounding the embedding and head cost, nats a token; None where they are exact.
    """

    codes_equal: bool | None
    max_abs_logit_diff: float | None
    kl: float | None
    engine: str
    differences: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    ok: bool | None = None
    kl_emulated: float | None = None
    kl_bound: float | None = None
    nll_frozen: float | None = None
    nll_engine: float | None = None
    nll_bound: float | None = None
    tokens: int | None = None
    strings: int | None = None
    strings_equal: int | None = None
    head_nll_change: float | None = None

    @property
    def failed(self) -> bool:
        """Whether anything of the file was found to differ."""
        return self.codes_equal is False or self.ok is False or bool(self.differences)


@dataclass(frozen=True, kw_only=True)
class Export:
    """One written file or folder; ``path`` is relative to the run where it lies inside it.

    Attributes:
        head: sentences about embeddings and head that were rounded on request; empty where all is exact.
        refit: a sentence about scales that were re-fitted on request; empty where none was.
    """

    target: str
    path: str
    bytes: int | None
    sha256: str
    verify: Verification | None
    head: str = ""
    refit: str = ""


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """Another recipe on the same parent, data and held-out blocks."""

    recipe: str
    nll: float | None
    kl_to_parent: float | None = None
    top1_agreement: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Interval:
    """A paired difference of NLL, nats per token, with its confidence interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What was measured of one weight matrix (sensitivity.json), by the file's ``primary`` quantity.

    Attributes:
        path: its module path.
        trace: arithmetic mean over sequences, and ``standard_error`` of it.
        geometric_mean: exp of the mean log, which ``low`` to ``high`` covers; None for signed estimates, whose interval
            covers ``trace``.
        largest_share: the part of the sum that one sequence gives; a mean above 0.1 rests on few sequences.
        weights: number of weights.
    """

    path: str
    trace: float | None
    standard_error: float | None = None
    geometric_mean: float | None = None
    low: float | None = None
    high: float | None = None
    largest_share: float | None = None
    weights: int | None = None


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """sensitivity.json without its samples; ``primary`` names the quantity, such as ``trace`` or ``kl:ternary``."""

    estimator: str
    primary: str
    seed: int | None
    sequences: int | None
    scored_positions: int | None
    tensors: tuple[Trace, ...]


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Latent weights of one matrix in units of their scale, before and after training.

    Attributes:
        path: its module path.
        edges: n + 1 bounds; ``before`` and ``after`` count the weights in the n bins between them.
    """

    path: str
    edges: tuple[float, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]


@dataclass(frozen=True)
class CodeShares:
    """Shares of one matrix's codes, 0 to 1: those that are zero at the end, and those that training changed."""

    zero: float | None = None
    flipped: float | None = None


@dataclass(frozen=True)
class Sample:
    """One prompt and what both models make of it."""

    prompt: str
    parent: str
    quantized: str


@dataclass(frozen=True, kw_only=True)
class TrainingRow:
    """One training line of log.jsonl; ``loss`` is the soft loss, of the weights on their way to the grid."""

    step: int
    loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    pressure: float | None = None
    temperature: tuple[float | None, float | None, float | None] = (None, None, None)
    saturated: float | None = None


@dataclass(frozen=True)
class TrainingLog:
    """log.jsonl.

    Attributes:
        rows: the training lines in order of step; of steps that a resumed run repeated, the later line.
        hard: (step, loss of the model that would be exported at this step, on text it is not trained on; not
            the held-out blocks of the report, which no decision of a run may see).
        pilots: (learning rate, steps, hard loss on that same text) of the pilot runs; the loss is None where the pilot
            diverged, the steps where an older log does not say.
        events: (step, what happened): losses that jumped, tensors whose codes collapsed or came back.
        skipped: lines that could not be read.
    """

    rows: tuple[TrainingRow, ...] = ()
    hard: tuple[tuple[int, float], ...] = ()
    pilots: tuple[tuple[float, int | None, float | None], ...] = ()
    events: tuple[tuple[int, str], ...] = ()
    skipped: int = 0


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Everything a report needs to know about one run.

    Attributes:
        nll_parent, nll_round_to_nearest, nll_quantized: nats per token on the same held-out blocks.
        bits_quantized, bits_whole: stored bits a weight, counted from the bytes of the file.
        nll_intervals: paired differences by name, ``quantized_minus_round_to_nearest``.
        data, versions, machine, options: as recorded; shown, never interpreted.
        teacher: model, divergence, weight and noise; empty where the text alone taught.
        parent_hard_loss: the parent on the text of the logged hard losses; None in runs that did not measure it.
        plan: plan.json as it is, or None.
    """

    run: Path
    recipe: str
    targets: tuple[str, ...]
    seed: int | None
    tokens: int | None
    learning_rate: float | None
    nll_parent: float | None
    nll_round_to_nearest: float | None
    nll_quantized: float | None
    kl_to_parent: float | None
    top1_agreement: float | None
    bits_quantized: float | None
    bits_whole: float | None
    weights_quantized: int | None
    weights_kept: int | None
    seconds_calibrate: float | None
    seconds_train: float | None
    seconds_total: float | None
    tokens_per_second: float | None
    exports: tuple[Export, ...]
    baselines: tuple[Baseline, ...] = ()
    nll_intervals: Mapping[str, Interval] = field(default_factory=dict)
    model: str = ""
    commit: str = ""
    model_details: Mapping[str, Any] = field(default_factory=dict)
    parent_dtype: str = ""
    license: str = ""
    started: str = ""
    command: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    recipe_options: Mapping[str, Any] = field(default_factory=dict)
    teacher: Mapping[str, Any] = field(default_factory=dict)
    parent_hard_loss: float | None = None
    plan: Mapping[str, Any] | None = None
    sensitivity: Sensitivity | None = None
    log: TrainingLog = TrainingLog()
    histograms: tuple[Histogram, ...] = ()
    codes: Mapping[str, CodeShares] = field(default_factory=dict)
    samples: tuple[Sample, ...] = ()

    @property
    def name(self) -> str:
        """What to call the run: the name of its folder."""
        return text(self.run.resolve().name)

    @property
    def method(self) -> str:
        """The recipe, and that it had a teacher: ``hearth + teacher``."""
        return f"{self.recipe} + teacher" if self.teacher else self.recipe

    @property
    def layers(self) -> Mapping[str, Any]:
        """The plan's entry of every quantized tensor, by module path; empty without a plan."""
        return _mapping((self.plan or {}).get("layers"))

    @property
    def kept(self) -> Mapping[str, Any]:
        """The plan's entry of every kept parameter, by name; empty without a plan."""
        return _mapping((self.plan or {}).get("kept"))

    @classmethod
    def load(cls, run: Path) -> RunRecord:
        """Read the folder of a finished run.

        Raises:
            ConfigError: no such run, a missing or mistyped key of report.json (it is named), or a damaged artefact.
        """
        where = run / REPORT_FILE
        if not where.is_file():
            raise ConfigError(
                f"{run}: holds no {REPORT_FILE}. It is written at the end of `hestia quantize` or `hestia train`; "
                f"finish the run with --resume, or name the folder of a finished one"
            )
        report = _Object(read_json(where, schema=SCHEMA), str(where))
        targets = report.value("target")
        nll, bits = report.object("nll"), report.object("bits_per_weight")
        weights, seconds = report.object("weights"), report.object("seconds")
        model = report.raw.get("model") or ""
        model_name, commit = (model, report.raw.get("commit")) if isinstance(model, str) else _model(model, where)
        plan = _optional(run / "plan.json")
        diagnostics = _optional(run / "diagnostics.json")
        return cls(
            run=run,
            recipe=text(report.value("recipe")),
            targets=tuple(text(t) for t in targets) if isinstance(targets, list) else (text(targets),),
            seed=report.integer("seed"),
            tokens=report.integer("tokens"),
            learning_rate=report.number("learning_rate"),
            nll_parent=nll.number("parent"),
            nll_round_to_nearest=nll.number("round_to_nearest"),
            nll_quantized=nll.number("quantized"),
            kl_to_parent=report.number("kl_to_parent"),
            top1_agreement=report.number("top1_agreement"),
            bits_quantized=bits.number("quantized_layers"),
            bits_whole=bits.number("whole_model"),
            weights_quantized=weights.integer("quantized"),
            weights_kept=weights.integer("kept"),
            seconds_calibrate=seconds.number("calibrate"),
            seconds_train=seconds.number("train"),
            seconds_total=seconds.number("total"),
            tokens_per_second=report.number("tokens_per_second"),
            exports=tuple(_export(entry, run) for entry in report.objects("exports")),
            baselines=_baselines(report),
            nll_intervals=_intervals(report.raw.get("nll_interval")),
            model=text(model_name),
            commit=text(commit),
            model_details={k: v for k, v in _mapping(model).items() if k not in ("id", "name", "path", "commit")},
            parent_dtype=text(report.raw.get("parent_dtype")).removeprefix("torch."),
            license=text(report.raw.get("license")),
            started=text(report.raw.get("started")),
            command=_command(report.raw.get("command")),
            data=_mapping(report.raw.get("data")),
            versions=_mapping(report.raw.get("versions")),
            machine=_mapping(report.raw.get("machine")),
            options=_options(run / "run.yaml"),
            recipe_options=_mapping(report.raw.get("recipe_options")),
            teacher=_teacher(_mapping(report.raw.get("teacher"))),
            parent_hard_loss=number(report.raw.get("parent_hard_loss")),
            plan=None if plan is None else plan.raw,
            sensitivity=_sensitivity(_optional(run / "sensitivity.json", SENSITIVITY_SCHEMA)),
            log=_log(run / "log.jsonl"),
            histograms=_histograms(diagnostics),
            codes=_codes(diagnostics),
            samples=_samples(diagnostics),
        )


def _teacher(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    keys = {"model": text, "divergence": text, "weight": number, "noise": number}
    return {key: read(raw.get(key)) for key, read in keys.items()} if raw else {}


def text(value: Any) -> str:
    """``value`` as text that UTF-8 can encode; empty for None. JSON can carry half a surrogate pair, files cannot."""
    return "" if value is None else str(value).encode("utf-8", "replace").decode("utf-8")


def number(value: Any) -> float | None:
    """``value`` if it is a finite number, else None; true and false are not numbers."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


class _Object:
    """A JSON object that knows where it lies, so a missing key is named with its full address."""

    def __init__(self, raw: dict[str, Any], where: str, prefix: str = "") -> None:
        self.raw, self.where, self.prefix = raw, where, prefix

    def value(self, key: str) -> Any:
        if key not in self.raw:
            raise ConfigError(f"{self.where}: missing key {self.prefix + key!r}; write the run's report again")
        return self.raw[key]

    def number(self, key: str) -> float | None:
        value = self.value(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ConfigError(f"{self.where}: {self.prefix + key!r} must be a number or null, got {value!r}")
        return number(value)

    def integer(self, key: str) -> int | None:
        value = self.number(key)
        return None if value is None else int(value)

    def object(self, key: str) -> _Object:
        value = self.value(key)
        if not isinstance(value, dict):
            raise ConfigError(f"{self.where}: {self.prefix + key!r} must be an object, got {value!r}")
        return _Object(value, self.where, f"{self.prefix}{key}.")

    def objects(self, key: str, *, required: bool = True) -> list[_Object]:
        values = self.value(key) if required else self.raw.get(key) or []
        if not isinstance(values, list) or not all(isinstance(v, dict) for v in values):
            raise ConfigError(f"{self.where}: {self.prefix + key!r} must be a list of objects, got {values!r}")
        return [_Object(v, self.where, f"{self.prefix}{key}[{i}].") for i, v in enumerate(values)]


def _optional(path: Path, schema: int = SCHEMA) -> _Object | None:
    return _Object(read_json(path, schema=schema), str(path)) if path.is_file() else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _model(model: Any, where: Path) -> tuple[Any, Any]:
    if not isinstance(model, dict):
        raise ConfigError(f"{where}: 'model' must be a name or an object with 'id' and 'commit', got {model!r}")
    return model.get("id") or model.get("name") or model.get("path"), model.get("commit")


def _command(value: Any) -> tuple[str, ...]:
    return tuple(text(v) for v in value) if isinstance(value, list) else ((text(value),) if value else ())


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(text(v) for v in value) if isinstance(value, list) else ()


def _export(entry: _Object, run: Path) -> Export:
    path = Path(text(entry.value("path")))
    for root in (run, run.resolve()):
        if path.is_relative_to(root):
            path = path.relative_to(root)
    if ".." in path.parts:  # a card is published, the folders around the run are not
        path = Path(path.name)
    verify = entry.raw.get("verify")
    if verify is not None:
        checked = entry.object("verify")
        verify = Verification(
            codes_equal=None if checked.value("codes_equal") is None else checked.raw["codes_equal"] is True,
            max_abs_logit_diff=number(checked.raw.get("max_abs_logit_diff")),
            kl=number(checked.raw.get("kl")),
            engine=text(checked.raw.get("engine")),
            differences=_texts(checked.raw.get("differences")),
            notes=_texts(checked.raw.get("notes")),
            ok=None if checked.raw.get("ok") is None else checked.raw["ok"] is True,
            kl_emulated=number(checked.raw.get("kl_emulated")),
            kl_bound=number(checked.raw.get("kl_bound")),
            nll_frozen=number(_mapping(checked.raw.get("nll")).get("frozen")),
            nll_engine=number(_mapping(checked.raw.get("nll")).get("engine")),
            nll_bound=number(_mapping(checked.raw.get("nll")).get("bound")),
            tokens=_whole(checked.raw.get("tokens")),
            strings=_whole(_mapping(checked.raw.get("tokenizer")).get("strings")),
            strings_equal=_whole(_mapping(checked.raw.get("tokenizer")).get("equal")),
            head_nll_change=number(checked.raw.get("head_nll_change")),
        )
    return Export(
        target=text(entry.value("target")),
        path=path.as_posix(),
        bytes=entry.integer("bytes"),
        sha256=text(entry.value("sha256")),
        verify=verify,
        head=_head_sentence(entry, verify),
        refit=_refit_sentence(entry),
    )


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _head_sentence(entry: _Object, verify: Verification | None) -> str:
    """What rounding the embedding and head on request changed."""
    head = _mapping(entry.raw.get("head"))
    if not head or head.get("exact") is not False:
        return ""
    types = ", ".join(f"{name} as {_mapping(t).get('type')}" for name, t in _mapping(head.get("tensors")).items())
    change = verify.head_nll_change if verify is not None else None
    cost = "its cost was not measured" if change is None else f"this moves the NLL by {change:+.2g} nats a token"
    return f"On request {types}, which rounds: {cost}."


def _refit_sentence(entry: _Object) -> str:
    """What re-fitting scales on request changed."""
    refit = _mapping(entry.raw.get("refit"))
    if not refit:
        return ""
    change, error = number(refit.get("nll_change")), number(refit.get("relative_error"))
    cost = "its cost was not measured" if change is None else f"this moves the NLL by {change:+.3g} nats a token"
    moved = "" if error is None else f" (relative error {error:.2g})"
    return (
        f"This file is not the trained model itself: on request {refit.get('tensors')} tensors got coarser scales, "
        f"one for {refit.get('group_size')} weights{moved}; {cost}."
    )


def _baselines(report: _Object) -> tuple[Baseline, ...]:
    """The other recipes; rounding from the ``scores`` of the report where it is not among them."""
    found = [_baseline(entry) for entry in report.objects("baselines", required=False)]
    rounding = _mapping(_mapping(report.raw.get("scores")).get("round_to_nearest"))
    if rounding and "round_to_nearest" not in {b.recipe for b in found}:
        kl, top1 = number(rounding.get("kl_to_parent")), number(rounding.get("top1_agreement"))
        nll = report.object("nll").number("round_to_nearest")
        found.insert(0, Baseline(recipe="round_to_nearest", nll=nll, kl_to_parent=kl, top1_agreement=top1))
    return tuple(found)


def _baseline(entry: _Object) -> Baseline:
    return Baseline(
        recipe=text(entry.value("recipe")),
        nll=entry.number("nll"),
        kl_to_parent=number(entry.raw.get("kl_to_parent")),
        top1_agreement=number(entry.raw.get("top1_agreement")),
        seconds=number(entry.raw.get("seconds")),
    )


def _intervals(value: Any) -> dict[str, Interval]:
    found: dict[str, Interval] = {}
    for name, entry in _mapping(value).items():
        ends = [number(_mapping(entry).get(key)) for key in ("mean", "low", "high")]
        if None not in ends:
            found[text(name)] = Interval(*(e for e in ends if e is not None))
    return found


def _options(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not a readable YAML file ({error})") from None
    return _mapping(options)


def _sensitivity(record: _Object | None) -> Sensitivity | None:
    if record is None:
        return None
    tensors = record.object("tensors")
    traces: list[Trace] = []
    for path, entry in tensors.raw.items():
        values = _mapping(entry)
        weights = number(values.get("weights"))
        traces.append(
            Trace(
                path=text(path),
                trace=number(values.get("trace")),
                standard_error=number(values.get("standard_error")),
                geometric_mean=number(values.get("geometric_mean")),
                low=number(values.get("low")),
                high=number(values.get("high")),
                largest_share=number(values.get("largest_share")),
                weights=None if weights is None else int(weights),
            )
        )
    seed, sequences, positions = (number(record.raw.get(k)) for k in ("seed", "sequences", "scored_positions"))
    return Sensitivity(
        estimator=text(record.raw.get("estimator")),
        primary=text(record.raw.get("primary")) or "trace",
        seed=None if seed is None else int(seed),
        sequences=None if sequences is None else int(sequences),
        scored_positions=None if positions is None else int(positions),
        tensors=tuple(traces),
    )


def _log(path: Path) -> TrainingLog:
    if not path.is_file():
        return TrainingLog()
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise ConfigError(f"{path}: not readable ({error})") from None
    rows: dict[int, TrainingRow] = {}
    hard: dict[int, float] = {}
    pilots: list[tuple[float, int | None, float | None]] = []
    events: set[tuple[int, str]] = set()
    skipped = 0
    for line in filter(str.strip, lines):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):  # a killed run can leave half a line
            skipped += 1
            continue
        if not isinstance(entry, dict):
            skipped += 1
            continue
        pilot = entry.get("pilot")
        if isinstance(pilot, dict):
            rate = number(pilot.get("learning_rate"))
            if rate is not None:
                steps = number(pilot.get("steps"))
                pilots.append((rate, None if steps is None else int(steps), number(pilot.get("held_out_loss"))))
            continue
        step = number(entry.get("step"))
        if step is None:
            continue
        if (loss := number(entry.get("hard_loss"))) is not None:
            hard[int(step)] = loss
        if "loss" in entry:
            rows[int(step)] = _training_row(int(step), entry)
        events |= {(int(step), text) for text in _events(entry)}
    ordered = tuple(rows[step] for step in sorted(rows))
    return TrainingLog(ordered, tuple(sorted(hard.items())), tuple(pilots), tuple(sorted(events)), skipped)


def _events(entry: dict[str, Any]) -> Iterator[str]:
    spike, before = number(entry.get("loss_spike")), number(entry.get("highest_before"))
    if spike is not None and before is not None:
        yield f"the loss jumped to {spike:.3f}, from at most {before:.3f} in the steps before"
    for path, how in _mapping(entry.get("collapsed")).items():
        yield f"{path}: codes {'use both signs again' if how is None else f'collapsed, {how}'}"


def _training_row(step: int, entry: dict[str, Any]) -> TrainingRow:
    heat = entry.get("temperature")
    low, mean, high = (number(_mapping(heat).get(key)) for key in ("min", "mean", "max"))
    if (single := number(heat)) is not None:
        low = mean = high = single
    return TrainingRow(
        step=step,
        loss=number(entry.get("loss")),
        learning_rate=number(entry.get("learning_rate")),
        grad_norm=number(entry.get("grad_norm")),
        pressure=number(entry.get("pressure")),
        temperature=(low, mean, high),
        saturated=number(entry.get("saturated")),
    )


def _histograms(record: _Object | None) -> tuple[Histogram, ...]:
    if record is None:
        return ()
    found: list[Histogram] = []
    for path, entry in _mapping(record.raw.get("histograms")).items():
        place = f"{record.where}: histograms[{path!r}]"
        edges, before, after = (_numbers(_mapping(entry).get(key), place, key) for key in ("edges", "before", "after"))
        if not len(edges) - 1 == len(before) == len(after) or any(
            a >= b for a, b in zip(edges, edges[1:], strict=False)
        ):
            raise ConfigError(
                f"{place}: needs n + 1 ascending edges and n counts twice, got {len(edges)} edges, "
                f"{len(before)} counts before and {len(after)} after"
            )
        found.append(Histogram(path=text(path), edges=edges, before=before, after=after))
    return tuple(found)


def _codes(record: _Object | None) -> dict[str, CodeShares]:
    entries = {} if record is None else _mapping(record.raw.get("codes"))
    return {
        text(path): CodeShares(*(number(_mapping(entry).get(key)) for key in ("zero_share", "flipped_share")))
        for path, entry in entries.items()
    }


def _numbers(value: Any, place: str, key: str) -> tuple[float, ...]:
    numbers = [number(v) for v in value] if isinstance(value, list) else [None]
    if None in numbers:
        raise ConfigError(f"{place}: {key!r} must be a list of finite numbers")
    return tuple(n for n in numbers if n is not None)


def _samples(record: _Object | None) -> tuple[Sample, ...]:
    if record is None:
        return ()
    return tuple(
        Sample(*(text(entry.raw.get(key)) for key in ("prompt", "parent", "quantized")))
        for entry in record.objects("samples", required=False)
    )
