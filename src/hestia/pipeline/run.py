"""The main job: the stages in order, each leaving its artefact in the run's folder.

    quantize = prepare data, plan, calibrate, plan again, [pilot], train, freeze, score, export, verify, report

With ``resume`` a stage whose artefact is there is not repeated, nor an export that is there as it was verified.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, set_seed

from .. import loading, processes
from ..data import cache as token_cache
from ..errors import ConfigError, DiskSpaceError, HestiaError, VerifyError
from ..export.frozen import CODES_FILE, FrozenModel
from ..files import TEMPORARY, read_json, require_inside, sweep, write_json, write_text
from ..lock import LOCK_FILE, locked
from ..options import BYSTANDERS, Options, count, load_config
from ..plans import Plan
from ..progress import announce as say
from ..resources import free_disk
from ..settings import widths_may_differ
from ..training import Interrupted, checkpoints
from .artefacts import CACHE_FOLDER, EXPORTS_FILE, EXPORTS_FOLDER, OPTIONS_FILE, PLAN_FILE, REPORT_FILE
from .delivery import deliver
from .fitting import check_teacher, train_and_freeze
from .inputs import check_inputs, keep_inputs
from .planning import calibrates, given_plan, plan_run, plan_without_curvature
from .record import publish, record_of
from .scoring import score_run
from .workspace import Workspace


def quantize(options: Options, *, resume: bool = False) -> dict[str, Any]:
    """From a pretrained checkpoint to verified low-bit files.

    Under torchrun or accelerate every process calls it: they share calibration, training and scoring; the first alone
    writes, freezes, exports and returns the record, the others an empty one. Before the exports the group is ended, one
    that the caller joined too: loaders of packed models would wait for the others.

    Args:
        options: what to do; see ``Options``.
        resume: continue the run in ``options.out``, or start it where none is.

    Returns:
        The record that report.json holds.

    Raises:
        ConfigError, PlanError: bad input; nothing was written.
        DiskSpaceError: no room for the run; nothing was written, or earlier checkpoints are whole.
        GuardError, Interrupted: training was stopped; the last good checkpoint is kept.
        VerifyError: an exported file differs from the frozen model.
    """
    with processes.joined():
        return Run(options, resume=resume).execute()


def check(options: Options, *, resume: bool = False) -> dict[str, Any]:
    """What ``quantize`` would do with these options, after everything that it refuses before its first write.

    Args:
        options, resume: as for ``quantize``.

    Returns:
        Plan, text, length, learning rate and device, as a JSON object; the same in every process.

    Raises:
        ConfigError, PlanError, DiskSpaceError: what ``quantize`` would say; nothing is written either way.
    """
    with processes.joined():
        return Run(options, resume=resume).check()


class Run:
    """One run: a workspace, a plan made beforehand or none, and the stages in order.

    Args:
        options: what to do.
        resume: continue where an earlier call stopped.
        baselines: further rows of the report's table, scored elsewhere on the same blocks.
        reference: scores.json of another run by the same plan and text, whose parent and rounding need no second
            scoring.
    """

    def __init__(
        self,
        options: Options,
        *,
        resume: bool = False,
        baselines: Sequence[dict[str, Any]] = (),
        reference: dict[str, Any] | None = None,
    ) -> None:
        options, self.given_plan = given_plan(options)
        self.work = Workspace(options, resume=resume)
        self.baselines, self.reference = list(baselines), reference
        self._held = contextlib.ExitStack()
        self._taken = False

    def execute(self) -> dict[str, Any]:
        """All stages, then the record of report.json; no other process may work on the folder meanwhile.

        Raises:
            BusyError: one does.
        """
        set_seed(self.work.options.seed)
        with self._held:
            self._check_folder()
            if (self.work.folder / OPTIONS_FILE).is_file():
                self._take_folder()
            return self.work.stopwatch.measure("total", self._stages)

    def check(self) -> dict[str, Any]:
        """The stages up to the first write; see ``check`` of this module."""
        self._check_folder()
        if (self.work.folder / OPTIONS_FILE).is_file():
            check_inputs(self.work)
        plan = plan_without_curvature(self.work, self.given_plan)
        self._refuse_early(trains=plan.trains)
        work, options = self.work, self.work.options
        teacher = options.teacher if plan.trains else None
        open_yet = calibrates(options) and widths_may_differ(options)
        return {
            "schema": 1,
            "model": loading.describe(work.source, work.config)["name"],
            "recipe": dict(plan.recipe),
            "teacher": None if teacher is None else {"model": teacher, "divergence": options.distill},
            "calibration_sequences": options.calibrate if calibrates(options) else 0,
            "tensors": {"quantized": len(plan.layers), "kept": len(plan.kept)},
            "weights": {"quantized": plan.quantized_weights, "kept": plan.kept_weights},
            "bits_per_weight": {name: None if open_yet else plan.bits_per_weight(name) for name in plan.targets},
            "seq_len": work.seq_len,
            "blocks": {
                "train": len(work.training),
                "tuning": len(work.tuning),
                "held_out": len(work.text.held_out),
                "scored": len(work.scored),
            },
            "steps": work.steps if plan.trains else 0,
            "batch_size": work.batch_size,
            "learning_rate": options.learning_rate(),
            "device": work.device.type,
            "precision": "bf16" if work.bf16 else "fp32",
            "out": str(work.folder),
        }

    def _take_folder(self) -> None:
        """Lock the folder, tidy up after a process that was killed, and check what this run would go on from."""
        folder = self.work.folder
        if processes.first():  # of several processes of one run, the first holds it for all
            self._held.enter_context(locked(folder))
            self._check_folder()  # again: someone may have been here meanwhile
            require_inside(folder)
            exports = folder / EXPORTS_FOLDER
            for place in (folder, folder / CACHE_FOLDER, exports, *exports.glob("*")):
                sweep(place)
        check_inputs(self.work)
        self._taken = True

    def _stages(self) -> dict[str, Any]:
        work, started = self.work, time.perf_counter()
        plan = plan_without_curvature(work, self.given_plan)
        text = work.text
        self._refuse_early(trains=plan.trains)
        self._open_folder()
        say(f"{len(text.train):,} training blocks, {len(text.held_out):,} held-out blocks of {work.seq_len} tokens")
        plan = plan_run(work, self.given_plan, plan)
        frozen = self._frozen(plan)
        if set(frozen.quantized) != set(plan.layers):
            raise ConfigError(
                f"{work.folder / PLAN_FILE} is not the plan that this run was frozen by: another was written over it. "
                "Put it back, or choose another --out"
            )
        scores = score_run(work, plan, self.reference)
        first = processes.first()
        processes.leave()
        if not first:
            return {}
        before = _report_before(work.folder)
        exports, refused = self._exports(plan, frozen, before)
        total = work.stopwatch.total(time.perf_counter() - started)
        exports += _made_later(work.folder, before, {entry["path"] for entry in exports}, plan.targets)
        record = record_of(work, plan, scores, exports)
        record["baselines"] = self.baselines or before.get("baselines", [])
        record["seconds"]["total"] = total
        if refused:
            record["refused"] = {name: str(error) for name, error in refused}
        publish(work.folder, record)
        (work.folder / EXPORTS_FILE).unlink(missing_ok=True)
        for name, error in refused[1:]:
            say(f"{name}: {error}")
        if refused:
            raise refused[0][1]
        return record

    def _exports(
        self, plan: Plan, frozen: FrozenModel, before: dict[str, Any]
    ) -> tuple[list[dict[str, Any]], list[tuple[str, HestiaError]]]:
        """The entries of the files, and why others could not be written: one format's refusal costs no other's file."""
        made: list[dict[str, Any]] = []
        refused: list[tuple[str, HestiaError]] = []
        kept = self.work.folder / EXPORTS_FILE  # of a call that ended between two files
        earlier = [*_entries(before), *(_entries(_read_or_empty(kept)) if self.work.resume else [])]
        for name in plan.targets:
            try:
                made.append(deliver(self.work, plan, name, frozen, earlier))
                paths = {entry["path"] for entry in made}
                write_json(kept, {"schema": 1, "exports": [*made, *(e for e in earlier if e.get("path") not in paths)]})
            except (ConfigError, VerifyError) as error:
                refused.append((name, error))
        if not made:
            raise refused[0][1]
        return made, refused

    def _frozen(self, plan: Plan) -> FrozenModel:
        if not (self.work.resume and (self.work.folder / CODES_FILE).is_file()):
            stopped = train_and_freeze(self.work, plan)
            processes.barrier()
            if asked := processes.largest(stopped or 0):
                raise Interrupted(
                    "stopped when the training was done; the model is frozen. Continue with --resume.", asked
                )
        return FrozenModel(self.work.folder)

    def _check_folder(self) -> None:
        """Refuse a folder that holds something else; nothing is written yet."""
        folder, options = self.work.folder, self.work.options
        recorded = folder / OPTIONS_FILE
        if recorded.is_file():
            before = Options(**load_config(recorded))
            differing = [
                f"{item.name} is {getattr(before, item.name)!r} there and {getattr(options, item.name)!r} here"
                for item in dataclasses.fields(Options)
                if item.name not in BYSTANDERS and _meant(before, item.name) != _meant(options, item.name)
            ]
            if differing:
                more = "Choose another --out"
                if all(line.startswith("target is ") for line in differing):
                    more += f", or add files to a finished run by `hestia export {folder} --to NAME`"
                raise ConfigError(f"{folder} holds a different run: {'; '.join(differing)}. {more}")
            if not self.work.resume:
                raise ConfigError(f"{folder} already holds this run; continue it with --resume")
        elif folder.exists() and (not folder.is_dir() or any(not _left_behind(path) for path in folder.iterdir())):
            raise ConfigError(f"{folder} exists and is not a run of hestia; choose another --out")

    def _refuse_early(self, *, trains: bool) -> None:
        """Refuse what stops a later stage: too little text, an odd batch, a wrong teacher, damaged weights, no room."""
        self.work.tuning_count()
        _ = self.work.batch_size
        check_teacher(self.work)
        if not (self.work.folder / OPTIONS_FILE).is_file():
            self._check_disk(self.work.load_model(), trains)

    def _check_disk(self, model: PreTrainedModel, trains: bool) -> None:
        """Refuse a disk that the run would fill, before anything is computed; the exported files are smaller."""
        parameters = sum(p.numel() for p in model.parameters())
        needed = (checkpoints.space(parameters, parameters) if trains else 0) + 4 * parameters
        if (free := free_disk(self.work.folder)) < needed:
            raise DiskSpaceError(
                f"{self.work.folder}: checkpoints and the frozen model take up to {needed / 1e9:.2f} GB, and "
                f"{free / 1e9:.2f} GB are free there; make room or choose another --out"
            )

    def _open_folder(self) -> None:
        """The first write: options and tokens, after everything that can be refused has been checked."""
        work = self.work
        processes.barrier()  # every process has looked at the folder as it was
        if processes.first():
            work.folder.mkdir(parents=True, exist_ok=True)
        processes.barrier()
        if not self._taken:
            self._take_folder()
        if processes.first():
            write_text(work.folder / OPTIONS_FILE, work.options.to_yaml())
            keep_inputs(work)
            text = work.text
            if text.fresh:
                cache = work.folder / CACHE_FOLDER
                token_cache.save(cache, text.record["key"], text.train, text.held_out, text.record)
            work.stopwatch.keep()
        processes.barrier()


def _report_before(folder: Path) -> dict[str, Any]:
    """The report of a run that is resumed though it was finished; empty where there is none that can be read."""
    return _read_or_empty(folder / REPORT_FILE)


def _read_or_empty(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except ConfigError:
        return {}


def _entries(report: dict[str, Any]) -> list[dict[str, Any]]:
    entries = report.get("exports")
    return [entry for entry in (entries if isinstance(entries, list) else []) if isinstance(entry, dict)]


def _made_later(
    folder: Path, report: dict[str, Any], written: set[str], targets: Iterable[str]
) -> list[dict[str, Any]]:
    """The entries of files that ``hestia export`` made after the run, which a resumed run does not write again."""
    return [
        entry
        for entry in _entries(report)
        if isinstance(entry.get("path"), str)
        and entry["path"] not in written
        and (entry.get("target") not in set(targets) or "refit" in entry)
        and (folder / entry["path"]).exists()
    ]


def _meant(options: Options, name: str) -> Any:
    """An option's value, however it was written: MODEL, MODEL/ or ./MODEL, 2M or 2000000; whether there is a plan."""
    value = getattr(options, name)
    if name in ("data", "eval_data"):
        return [Path(given).resolve() if Path(given).exists() else given for given in value]
    if name == "plan":
        return value is not None  # its SHA-256 is another option, and pins it wherever it lies
    if name in ("model", "teacher", "sensitivity") and value and Path(value).exists():
        return Path(value).resolve()
    if name in ("tokens", "eval_tokens"):
        return count(value, name)
    return options.learning_rate() if name == "lr" else value


def _left_behind(path: Path) -> bool:
    """Whether a process that was killed in its first moments may have left this, and nothing else."""
    return path.name == LOCK_FILE or TEMPORARY.fullmatch(path.name) is not None
