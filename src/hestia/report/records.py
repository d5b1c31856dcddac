"""A run's folder, read: report.json strictly, everything beside it if it is there.

``report.json`` is what other tools read too, so a key that the format promises must be there, and the message names
the one that is not. A promised *number* may still be null: NaN is written as null, and a recipe that only rounds has
no learning rate. The other artefacts are optional:

    plan.json  sensitivity.json  diagnostics.json  run.yaml    absent is fine, damaged is an error
    log.jsonl                                                  absent is fine, damaged lines are skipped and counted

Every text that comes from a run (names, prompts, what a model wrote) goes through ``fields.text``, which makes it
encodable, and is escaped where it is printed: HTML in html.py, Markdown in model_card.py, control characters in
tables.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError
from ..files import read_json
from .diagnostics import CodeShares, Histogram, Sample, read_codes, read_histograms, read_samples
from .exports import Export, read_export
from .fields import SCHEMA, Object, mapping, number, optional, text
from .sensitivity import SENSITIVITY_SCHEMA, Sensitivity, read_sensitivity
from .training_log import TrainingLog, read_log

REPORT_FILE = "report.json"


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
class RunRecord:
    """Everything a report needs to know about one run.

    Attributes:
        nll_parent, nll_round_to_nearest, nll_quantized: nats per token on the same held-out blocks.
        bits_quantized, bits_whole: stored bits per weight, counted from the bytes of the file.
        nll_intervals: paired differences by name, ``quantized_minus_round_to_nearest``.
        data, versions, machine, options: as recorded; shown, never interpreted.
        teacher: model, divergence, weight and noise; empty where the text alone taught.
        refused: targets that were asked for and not written, and why.
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
    refused: Mapping[str, str] = field(default_factory=dict)
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
    log: TrainingLog = field(default_factory=TrainingLog)
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
        return mapping((self.plan or {}).get("layers"))

    @property
    def kept(self) -> Mapping[str, Any]:
        """The plan's entry of every kept parameter, by name; empty without a plan."""
        return mapping((self.plan or {}).get("kept"))

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
        report = Object(read_json(where, schema=SCHEMA), str(where))
        targets = report.value("target")
        nll, bits = report.object("nll"), report.object("bits_per_weight")
        weights, seconds = report.object("weights"), report.object("seconds")
        model = report.raw.get("model") or ""
        model_name, commit = (model, report.raw.get("commit")) if isinstance(model, str) else _model(model, where)
        plan = optional(run / "plan.json")
        diagnostics = optional(run / "diagnostics.json")
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
            exports=tuple(read_export(entry, run) for entry in report.objects("exports")),
            refused={text(name): text(why) for name, why in mapping(report.raw.get("refused")).items()},
            baselines=_baselines(report),
            nll_intervals=_intervals(report.raw.get("nll_interval")),
            model=text(model_name),
            commit=text(commit),
            model_details={k: v for k, v in mapping(model).items() if k not in ("id", "name", "path", "commit")},
            parent_dtype=text(report.raw.get("parent_dtype")).removeprefix("torch."),
            license=text(report.raw.get("license")),
            started=text(report.raw.get("started")),
            command=_command(report.raw.get("command")),
            data=mapping(report.raw.get("data")),
            versions=mapping(report.raw.get("versions")),
            machine=mapping(report.raw.get("machine")),
            options=_options(run / "run.yaml"),
            recipe_options=mapping(report.raw.get("recipe_options")),
            teacher=_teacher(mapping(report.raw.get("teacher"))),
            parent_hard_loss=number(report.raw.get("parent_hard_loss")),
            plan=None if plan is None else plan.raw,
            sensitivity=read_sensitivity(optional(run / "sensitivity.json", SENSITIVITY_SCHEMA)),
            log=read_log(run / "log.jsonl"),
            histograms=read_histograms(diagnostics),
            codes=read_codes(diagnostics),
            samples=read_samples(diagnostics),
        )


def _model(model: Any, where: Path) -> tuple[Any, Any]:
    if not isinstance(model, dict):
        raise ConfigError(f"{where}: 'model' must be a name or an object with 'id' and 'commit', got {model!r}")
    return model.get("id") or model.get("name") or model.get("path"), model.get("commit")


def _command(value: Any) -> tuple[str, ...]:
    return tuple(text(v) for v in value) if isinstance(value, list) else ((text(value),) if value else ())


def _baselines(report: Object) -> tuple[Baseline, ...]:
    """The other recipes; rounding from the ``scores`` of the report where it is not among them."""
    found = [_baseline(entry) for entry in report.objects("baselines", required=False)]
    rounding = mapping(mapping(report.raw.get("scores")).get("round_to_nearest"))
    if rounding and "round_to_nearest" not in {b.recipe for b in found}:
        kl, top1 = number(rounding.get("kl_to_parent")), number(rounding.get("top1_agreement"))
        nll = report.object("nll").number("round_to_nearest")
        found.insert(0, Baseline(recipe="round_to_nearest", nll=nll, kl_to_parent=kl, top1_agreement=top1))
    return tuple(found)


def _baseline(entry: Object) -> Baseline:
    return Baseline(
        recipe=text(entry.value("recipe")),
        nll=entry.number("nll"),
        kl_to_parent=number(entry.raw.get("kl_to_parent")),
        top1_agreement=number(entry.raw.get("top1_agreement")),
        seconds=number(entry.raw.get("seconds")),
    )


def _intervals(value: Any) -> dict[str, Interval]:
    found: dict[str, Interval] = {}
    for name, entry in mapping(value).items():
        ends = [number(mapping(entry).get(key)) for key in ("mean", "low", "high")]
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
    return mapping(options)


def _teacher(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    keys = {"model": text, "divergence": text, "weight": number, "noise": number}
    return {key: read(raw.get(key)) for key, read in keys.items()} if raw else {}
