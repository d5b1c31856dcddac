"""Run a stage of the comparison: whatever has no result yet, one job after another, until the time is up.

    python benchmarks/experiments/run.py STAGE --data DIR [--models DIR] [--only PATTERNS] [--budget-minutes M] [--list]

``STAGE`` is a letter (a.yaml beside this file) or a YAML file. ``--data`` holds the text files that it names; the
parent is looked for in ``parents/`` beside this file, then in ``--models``. A job that is interrupted, killed or out of
time goes on from its last checkpoint at the next call; a result that is there is never made again. An arm whose recipe
has not been built yet is named and passed over. One thread: to use more processors, or more of a GPU, start the same
command several times; each process takes the first job that no other is at.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from stages import (
    HERE,
    AllDivergedError,
    Job,
    Stage,
    best_rate,
    load,
    load_result,
    ordered_jobs,
    require_same,
    tuning_jobs,
)
from texts import SCORED, StageTexts, prepare_texts
from train_job import (
    NotThereYet,
    Parent,
    Paused,
    check_possible,
    needs_curvature,
    open_parent,
    parent_scores,
    parent_sensitivity,
    run_job,
)

from hestia import loading, progress
from hestia.curvature import Sensitivity
from hestia.errors import BusyError, ConfigError, HestiaError
from hestia.lock import locked
from hestia.progress import announce
from hestia.training import Interrupted

AGAIN = 5.0
"""Seconds until a process that finds every job taken looks again."""

TOGETHER = 3600.0
"""Seconds that a process waits for another one that is reading the texts."""


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the text files")
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder of parents that are not bundled")
    parser.add_argument("--only", default="*", help="shell patterns of arms, with commas between")
    parser.add_argument("--budget-minutes", type=float, default=None, help="stop after so many minutes")
    parser.add_argument("--work", type=Path, default=Path("runs/experiments"), help="checkpoints and cached tokens")
    parser.add_argument("--results", type=Path, default=None, help="another folder for the results")
    parser.add_argument("--scored", type=Path, default=SCORED, help="the list of test blocks")
    parser.add_argument("--list", action="store_true", help="say what is there and what is missing, and stop")
    given = parser.parse_args(arguments)
    progress.enable()
    torch.set_num_threads(1)
    try:
        stage = load(given.stage)
        results = given.results or stage.folder
        print("\n".join(overview(stage, given.only, results)), flush=True)
        if given.list:
            return 0
        deadline = None if given.budget_minutes is None else time.monotonic() + 60.0 * given.budget_minutes
        return run_stage(stage, given, results, deadline)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return stopped.exit_status
    except HestiaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def overview(stage: Stage, only: str, results: Path) -> list[str]:
    """A line an arm: how many runs are there, and the rate that tuning chose; the number of tuning runs above."""
    lines = [f"stage {stage.name}: {stage.title}", f"{len(tuning_jobs(stage, stage.arms[0]))} tuning runs an arm"]
    missing: Counter[str] = Counter()
    for job in ordered_jobs(stage, only, results):
        missing[job.arm.name] += not job.result(results).is_file()
    for name, count in missing.items():
        arm = stage.arm(name)
        all_runs = len(tuning_jobs(stage, arm)) + len(stage.final.seeds) * len(stage.final.tokens)
        try:
            check_possible(tuning_jobs(stage, arm)[0])
            rate = best_rate(stage, arm, results)
            chosen = "rate not chosen yet" if rate is None else f"rate {rate:g}"
            state = f"{all_runs - count} of {all_runs} runs, {chosen}"
        except (NotThereYet, AllDivergedError) as error:
            state = str(error)
        lines.append(f"  {name:<28} tier {arm.tier}  {state}")
    return lines


def run_stage(stage: Stage, given: Any, results: Path, deadline: float | None) -> int:
    """Every missing job in order; 0 when all that can be run is there, 75 when the time was up before."""
    given.work.mkdir(parents=True, exist_ok=True)
    with locked(given.work, wait=TOGETHER):
        parent, texts = open_stage(stage, given)
        start = parent_scores(stage, parent, texts, results / "parent.json")
    require_same({**start, "parent": start["model"]}, parent.record, texts.record)
    worker = Worker(stage, given, results, parent, texts, deadline)
    try:
        while (found := worker.run_first()) is not Found.NOTHING:
            if found is Found.ELSEWHERE:
                time.sleep(AGAIN)
    except Paused as paused:
        announce(str(paused))
        return 75
    return 0


class Found(Enum):
    """What a process that looks for work has found."""

    JOB = "a job, which it has run"
    ELSEWHERE = "jobs that other processes are at, or that wait for those"
    NOTHING = "nothing that is missing"


@dataclass
class Worker:
    """One of the processes that run a stage; each job is taken by a lock on its folder.

    Attributes:
        stage, given, results: what is run, the command line, and where results go.
        parent, texts: of the stage.
        deadline: ``time.monotonic()`` after which nothing goes on.
        checked: results that are there and belong to the stage.
        passed_over: arms that cannot be run.
    """

    stage: Stage
    given: Any
    results: Path
    parent: Parent
    texts: StageTexts
    deadline: float | None
    checked: set[Path] = field(default_factory=set)
    passed_over: set[str] = field(default_factory=set)

    def run_first(self) -> Found:
        """Run the first missing job that nobody is at.

        Raises:
            Paused: the time is up.
            ConfigError: a result that is there belongs to another stage, parent or text.
        """
        found = Found.NOTHING
        for job in ordered_jobs(self.stage, self.given.only, self.results):
            path = job.result(self.results)
            if job.arm.name in self.passed_over or path in self.checked:
                continue
            if path.is_file():
                require_same(load_result(job, self.results), self.parent.record, self.texts.record)
                self.checked.add(path)
                self.tidy(job)
                continue
            try:
                check_possible(job)
            except NotThereYet as error:
                self.passed_over.add(job.arm.name)
                announce(f"{job.arm.name}: {error}")
                continue
            if self.deadline is not None and time.monotonic() >= self.deadline:
                raise Paused("the time is up")
            if job.rate is not None and self.run_alone(job, path):
                return Found.JOB
            found = Found.ELSEWHERE  # in another process, or the tuning runs that it waits for are
        return found

    def place(self, job: Job) -> Path:
        """The folder of a job's checkpoints, while it has no result."""
        return self.given.work / f"stage_{self.stage.name}" / f"{job.name}-{job.digest()[:8]}"

    def tidy(self, job: Job) -> None:
        """Remove what a process left that ended between the result and its own tidying up."""
        place = self.place(job)
        if place.is_dir():
            with suppress(BusyError), locked(place):
                shutil.rmtree(place, ignore_errors=True)

    def run_alone(self, job: Job, path: Path) -> bool:
        """Run a job unless another process is at it; whether its result is there now."""
        work = self.place(job)
        work.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            try:
                held.enter_context(locked(work))
            except BusyError:
                return False
            if path.is_file():  # made since it was looked for
                shutil.rmtree(work)
                return True
            announce(f"{job.name}: {job.steps} steps at {job.rate:g}")
            sensitivity = _sensitivity(job, self.parent, self.texts, self.results)
            record = run_job(job, self.parent, self.texts, sensitivity, work, path, self.deadline)
        announce(summary(record))
        return True


def open_stage(stage: Stage, given: Any) -> tuple[Parent, StageTexts]:
    """The parent and its texts."""
    folders = [HERE / "parents" / stage.parent, given.models / stage.parent]
    folder = next((path for path in folders if (path / "config.json").is_file()), None)
    if folder is None:
        raise ConfigError(f"no parent {stage.parent} in {folders[0].parent} or {folders[1].parent}")
    parent = open_parent(folder)
    cache = given.work / "tokens" / f"{stage.parent}-{stage.texts.pool}-{stage.training.seq_len}"
    return parent, prepare_texts(stage, given.data, loading.load_tokenizer(parent.source), cache, given.scored)


def summary(record: dict[str, Any]) -> str:
    """A line for the log."""
    if record["diverged"]:
        return f"{record['name']}: {record['diverged']}"
    test = f", test {record['nll']:.4f}, KL {record['kl_to_parent']:.4f}" if "nll" in record else ""
    seconds = record["seconds_per_token"]
    speed = f", {1.0 / seconds['wall']:,.0f} tokens/s" if seconds else ""
    return f"{record['name']}: valid {record['valid_nll']:.4f}{test}{speed}"


def _sensitivity(job: Job, parent: Parent, texts: StageTexts, results: Path) -> Sensitivity | None:
    if not needs_curvature(job.arm):
        return None
    return parent_sensitivity(job.stage, parent, texts.train, results / "sensitivity.json")


if __name__ == "__main__":
    sys.exit(main())
