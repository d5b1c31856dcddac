"""A stage of the comparison: its YAML file, and the jobs it asks for, in the order they are run.

    STAGE.yaml    parent, data, training, tuning (tokens, rates, seeds), final (token budgets, seeds), arms
    job           one training run of one arm: (arm, phase, tokens, learning rate, seed) -> one result file

Arms carry a tier. A tier's tuning runs come first, then its final runs seed by seed, so that whole comparisons of the
most important arms are there before anything else is begun. What a job is made of is written into its result; a result
made of something else than the YAML file says today is an error, never quietly mixed in.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from hestia.errors import ConfigError, nearest
from hestia.files import read_json
from hestia.options import count

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "experiments"
SCHEMA = 1
CONTROL = "full_precision"
"""The recipe name of the control: the parent in full precision, trained on the same tokens."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One method as it is compared.

    Attributes:
        name: of the arm, a folder name.
        recipe: a recipe of hestia, or ``full_precision``.
        options: of the recipe.
        made_with: options that were the recipe's defaults when the arm's results were made and no longer are. They are
            used, and left out of ``config``, which says what those results say.
        teacher: how the parent teaches, as the training understands it; empty: cross entropy alone.
        rates: learning rates of the tuning runs where they differ from the stage's; as many.
        group_size: weights that share a scale, where it differs from the stage's.
        bits: width of the grid, or a budget of stored bits per weight.
        spend: how that budget is spent: empty, by predicted damage; ``first and last``, from both ends of the model
            inwards, which takes no curvature.
        target: the format that must hold the result exactly; it decides what a weight costs.
        factors: on the learning rate, of ``scale``, ``norm`` and ``embedding``.
        betas: of AdamW, where they differ from the training's own.
        tier: lower tiers run first; those from 3 on are ablations, which no figure against tokens shows.
        note: what the arm is there to settle, for people.
    """

    name: str
    recipe: str
    options: Mapping[str, Any] = field(default_factory=dict)
    made_with: Mapping[str, Any] = field(default_factory=dict)
    teacher: Mapping[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = ()
    group_size: str | int | None = None
    bits: float = 1.58
    spend: str = ""
    target: str = "hf"
    factors: Mapping[str, float] = field(default_factory=dict)
    betas: tuple[float, ...] = ()
    tier: int = 1
    note: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        """Every option that the recipe is made with."""
        return {**self.made_with, **self.options}


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Which files are trained on, chosen by and scored on, relative to ``--data``; ``bundled:NAME`` ships with hestia.

    Attributes:
        train, valid, test: files.
        pool: training tokens that a seed orders; the same for every job.
        valid_blocks: blocks of each valid file.
        test_blocks: blocks of each test file, or None for all of them.
    """

    train: tuple[str, ...]
    valid: tuple[str, ...]
    test: tuple[str, ...]
    pool: str
    valid_blocks: int
    test_blocks: int | None = 128


@dataclass(frozen=True, kw_only=True)
class Training:
    """What all arms share."""

    batch_size: int
    seq_len: int = 256
    group_size: str | int = "row"
    warmup: float = 0.05
    decay: float = 0.2
    final: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    train_embeddings: bool = True
    bf16: bool = True


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Tuning or final: token budgets, seeds, and for tuning the learning rates."""

    tokens: tuple[str, ...]
    seeds: tuple[int, ...]
    rates: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a stage is there to settle: differences of arms that are Holm-corrected together, run or not.

    Attributes:
        title: in words.
        arm: whose NLL stands first in the differences to ``against``.
        against: the other arms.
        pairs: further differences, first minus second.
    """

    title: str
    arm: str = ""
    against: tuple[str, ...] = ()
    pairs: tuple[tuple[str, ...], ...] = ()

    @property
    def differences(self) -> list[tuple[str, str]]:
        """Every pair of arms that is compared: the family of Holm's correction."""
        return [*((self.arm, other) for other in self.against), *((first, second) for first, second in self.pairs)]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The whole YAML file; ``note`` is printed above its tables."""

    name: str
    title: str
    parent: str
    baseline: str
    control: str
    texts: Texts
    training: Training
    tuning: Phase
    final: Phase
    arms: tuple[Arm, ...]
    questions: tuple[Question, ...] = ()
    sensitivity_sequences: int = 256
    note: str = ""

    @property
    def folder(self) -> Path:
        """Where the results of this stage lie."""
        return RESULTS / f"stage_{self.name}"

    def arm(self, name: str) -> Arm:
        """The arm called ``name``.

        Raises:
            ConfigError: there is none.
        """
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise ConfigError(f"stage {self.name}: no arm {name!r}: {nearest(name, [a.name for a in self.arms])}")

    def rates(self, arm: Arm) -> tuple[float, ...]:
        """The learning rates that an arm is tuned over."""
        return arm.rates or self.tuning.rates


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training run.

    Attributes:
        stage, arm: what it belongs to.
        phase: ``tune`` or ``final``.
        tokens: as the YAML file writes them.
        rate: learning rate; None while the tuning runs that decide it are missing.
        seed: order of the data and every random draw.
    """

    stage: Stage
    arm: Arm
    phase: str
    tokens: str
    rate: float | None
    seed: int

    @property
    def name(self) -> str:
        """``ARM/tune-500k-0.004-seed0`` or ``ARM/final-2M-seed1``."""
        rate = f"-{self.rate:g}" if self.phase == "tune" else ""
        return f"{self.arm.name}/{self.phase}-{self.tokens}{rate}-seed{self.seed}"

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        training = self.stage.training
        return max(1, count(self.tokens, "tokens") // (training.batch_size * training.seq_len))

    def config(self) -> dict[str, Any]:
        """Everything that decides the numbers, but for the code and the bytes of parent and text."""
        arm, stage = self.arm, self.stage
        return {
            "recipe": arm.recipe,
            "options": dict(arm.options),
            "teacher": dict(arm.teacher),
            "group_size": stage.training.group_size if arm.group_size is None else arm.group_size,
            **({} if arm.bits == 1.58 else {"bits": arm.bits}),  # results made before there was a choice stay valid
            **({"spend": arm.spend} if arm.spend else {}),
            **({} if arm.target == "hf" else {"target": arm.target}),
            **({"factors": dict(arm.factors)} if arm.factors else {}),
            **({"betas": list(arm.betas)} if arm.betas else {}),
            "parent": stage.parent,
            "texts": json.loads(json.dumps(asdict(stage.texts))),
            "training": {k: v for k, v in asdict(stage.training).items() if k != "group_size"},
            "sensitivity_sequences": stage.sensitivity_sequences,
            "phase": self.phase,
            "steps": self.steps,
            "learning_rate": self.rate,
            "seed": self.seed,
        }

    def digest(self) -> str:
        """SHA-256 of ``config``."""
        return hashlib.sha256(json.dumps(self.config(), sort_keys=True).encode()).hexdigest()

    def result(self, folder: Path | None = None) -> Path:
        """The result file, whether it is there or not."""
        return (folder or self.stage.folder) / f"{self.name}.json"


class AllDivergedError(ConfigError):
    """No learning rate of an arm gave a finite loss; there is nothing to compare."""


def load(name: str | Path) -> Stage:
    """A stage by its letter (``a`` is a.yaml of this folder) or by the path of a YAML file.

    Raises:
        ConfigError: no such stage, an unknown key, a value of the wrong kind, two arms of one name, or arms with
            different numbers of tuning runs.
    """
    path = Path(name) if str(name).endswith(".yaml") else HERE / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"no stage {name!r}: {nearest(str(name), [p.stem for p in sorted(HERE.glob('*.yaml'))])}")
    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not readable as YAML ({str(error).splitlines()[0]})") from None
    stage = _build(Stage, {"name": path.stem, **(record if isinstance(record, dict) else {})}, path.name)
    names = [arm.name for arm in stage.arms]
    for arm_name in names:
        if names.count(arm_name) > 1:
            raise ConfigError(f"{path.name}: two arms are called {arm_name!r}")
    for question in stage.questions:
        if any(len(pair) != 2 for pair in question.pairs) or not question.differences:
            raise ConfigError(f"{path.name}: question {question.title!r} needs an arm and others, or pairs of arms")
    asked = [("a question", name) for q in stage.questions for pair in q.differences for name in pair]
    for role, chosen in (("baseline", stage.baseline), ("control", stage.control), *asked):
        if chosen not in names:
            raise ConfigError(f"{path.name}: {role} {chosen!r} is no arm: {nearest(chosen, names)}")
    for arm in stage.arms:
        if len(stage.rates(arm)) != len(stage.tuning.rates):
            raise ConfigError(
                f"{path.name}: arm {arm.name} has {len(arm.rates)} learning rates, the others {len(stage.tuning.rates)}"
            )
    return stage


def tuning_jobs(stage: Stage, arm: Arm) -> list[Job]:
    """The runs that choose an arm's learning rate."""
    return [
        Job(stage=stage, arm=arm, phase="tune", tokens=tokens, rate=rate, seed=seed)
        for tokens in stage.tuning.tokens
        for seed in stage.tuning.seeds
        for rate in stage.rates(arm)
    ]


def final_jobs(stage: Stage, arm: Arm, folder: Path | None = None) -> list[Job]:
    """The runs that are compared; their rate is None until the tuning runs are there."""
    rate = best_rate(stage, arm, folder)
    return [
        Job(stage=stage, arm=arm, phase="final", tokens=tokens, rate=rate, seed=seed)
        for seed in stage.final.seeds
        for tokens in stage.final.tokens
    ]


def best_rate(stage: Stage, arm: Arm, folder: Path | None = None) -> float | None:
    """The rate with the lowest mean NLL on the valid files, over the tuning runs; None while one of them is missing.

    A run that diverged counts as infinitely bad.

    Raises:
        AllDivergedError: every rate did.
    """
    losses: dict[float, float] = dict.fromkeys(stage.rates(arm), 0.0)
    for job in tuning_jobs(stage, arm):
        path = job.result(folder)
        if not path.is_file():
            return None
        nll = load_result(job, folder)["valid_nll"]
        losses[typing.cast(float, job.rate)] += float("inf") if nll is None else float(nll)
    best = min(losses, key=lambda rate: losses[rate])
    if losses[best] == float("inf"):
        raise AllDivergedError(f"arm {arm.name}: every learning rate of {', '.join(f'{r:g}' for r in losses)} diverged")
    return best


def load_result(job: Job, folder: Path | None = None) -> dict[str, Any]:
    """The result of a job.

    Raises:
        ConfigError: it is missing, or was made with another configuration than the YAML file gives today.
    """
    path = job.result(folder)
    record = read_json(path, schema=SCHEMA)
    if record["config"] != job.config():
        mine = job.config()
        keys = [key for key in mine if record["config"].get(key) != mine[key]]
        raise ConfigError(
            f"{path}: made with another {', '.join(keys)} than stage {job.stage.name} says now. Results are never "
            "changed: give the arm another name, or move the old file away"
        )
    return record


def require_same(record: Mapping[str, Any], parent: Mapping[str, Any], texts: Mapping[str, Any]) -> None:
    """Refuse a result of another parent or text: it must not stand beside those of this one.

    Raises:
        ConfigError: it is one.
    """
    for what, mine in (("parent", parent), ("texts", texts)):
        if record[what] != mine:
            keys = [key for key in mine if record[what].get(key) != mine[key]]
            raise ConfigError(f"{record['name']}: its result has another {what} ({', '.join(keys)}); move it away")


def ordered_jobs(stage: Stage, only: str = "*", folder: Path | None = None) -> Iterator[Job]:
    """Every job in running order: tier by tier, tuning runs arm by arm, then final runs seed by seed.

    It is lazy: a final job's rate is looked up when its turn comes. An arm whose rates all diverged has no final jobs.

    Args:
        stage: whose jobs.
        only: shell patterns of arms, with commas between.
        folder: of the results.
    """
    chosen = [arm for arm in stage.arms if any(fnmatchcase(arm.name, pattern) for pattern in only.split(","))]
    if not chosen:
        raise ConfigError(f"--only {only!r}: no arm of that name: {nearest(only, [a.name for a in stage.arms])}")
    for tier in sorted({arm.tier for arm in chosen}):
        arms = [arm for arm in chosen if arm.tier == tier]
        for arm in arms:
            yield from tuning_jobs(stage, arm)
        for place in range(len(stage.final.seeds) * len(stage.final.tokens)):
            for arm in arms:
                with contextlib.suppress(AllDivergedError):
                    job = final_jobs(stage, arm, folder)[place]
                    yield job


def _build(kind: type[Any], record: Any, where: str) -> Any:
    """A dataclass from a mapping; unknown and missing keys and values of the wrong kind are refused by place."""
    if not isinstance(record, Mapping):
        raise ConfigError(f"{where}: expected keys and values, got {record!r}")
    hints = typing.get_type_hints(kind)
    for key in record:
        if key not in hints:
            raise ConfigError(f"{where}: unknown key {key!r}: {nearest(str(key), hints)}")
    for item in fields(kind):
        if item.name not in record and item.default is MISSING and item.default_factory is MISSING:
            raise ConfigError(f"{where}: the key {item.name!r} is missing")
    return kind(**{key: _value(value, hints[key], f"{where}: {key}") for key, value in record.items()})


def _value(value: Any, hint: Any, where: str) -> Any:
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        items: Sequence[Any] = value if isinstance(value, list) else [value]
        return tuple(_value(item, inner, f"{where}[{i}]") for i, item in enumerate(items))
    if isinstance(hint, types.UnionType):
        kinds = typing.get_args(hint)
        if any(type(value) is kind for kind in kinds):
            return value
    elif hasattr(hint, "__dataclass_fields__"):
        return _build(hint, value, where)
    elif typing.get_origin(hint) is not None:
        if isinstance(value, Mapping):
            return {str(k): v for k, v in value.items()}
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif hint is str and isinstance(value, (str, int)) and not isinstance(value, bool):
        return str(value)
    elif type(value) is hint:
        return value
    raise ConfigError(f"{where}: {value!r} is not a {getattr(hint, '__name__', hint)}")
