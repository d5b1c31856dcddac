"""Tables of the controlled comparison, from its result files and from nothing else.

    win    the 95 % t interval of the per-seed paired difference excludes zero over three seeds or more, and so it does
           after Holm's correction over the whole family: every arm of the stage against the baseline, or every
           difference of a question, at every budget. A comparison that has not been run stands in it with p = 1
    gap    closed = (NLL_baseline - NLL) / (NLL_baseline - NLL_control), seed by seed

The YAML file of a stage says which arms there are, in which order, and which are baseline and control; every number is
from ``results/experiments/stage_NAME``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from hestia.errors import ConfigError
from hestia.evaluation import PairedDifference, gap_closed, holm, paired_difference, paired_p_value
from hestia.evaluation.comparison import SEEDS_TO_CLAIM
from hestia.files import read_json

from . import stages
from .stages import Question, Stage

Records = dict[str, dict[int, dict[str, Any]]]
"""Arm -> seed -> result, at one token budget."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One arm at one budget.

    Attributes:
        name: of the arm.
        rate: learning rates of its final runs, one unless they were tuned apart.
        nll: of each seed, in the order of the seeds.
        gap: gap closed, over the seeds that baseline and control have too; None for these two.
        difference: to the baseline, over common seeds; None with fewer than two.
        p: of that difference; None with too few seeds to claim anything, and for baseline and control.
        adjusted_p: Holm's.
        cost: processor seconds per token, as a multiple of the baseline's.
        means: of KL, top-1, zero share and flip rate; None where a run has none.
        pairs: how many of the seeds the baseline has too; of the baseline and the control, its own.
        planned: how many seeds the stage asks for.
        bits: stored bits per weight, scales included, of an arm that names the format of its files; else None.
    """

    name: str
    rate: tuple[float, ...]
    nll: tuple[float, ...]
    gap: PairedDifference | float | None
    difference: PairedDifference | None
    p: float | None
    adjusted_p: float | None
    cost: float | None
    means: Mapping[str, float | None]
    pairs: int
    planned: int
    bits: float | None = None

    @property
    def verdict(self) -> str:
        """win, loss, tie, or why there is none yet."""
        return _verdict(self.pairs, self.planned, self.difference, self.adjusted_p)

    @property
    def rank(self) -> tuple[bool, float]:
        """Where it stands: arms with too few seeds last, then by the difference to the baseline over common seeds."""
        return self.pairs < SEEDS_TO_CLAIM, self.difference.mean if self.difference else 0.0


def final_records(stage: Stage, folder: Path) -> dict[str, Records]:
    """Token budget -> arm -> seed -> result of every final run that is there and did not diverge.

    Raises:
        ConfigError: a result was made with other settings than the stage's, or on another parent or text.
    """
    return {
        tokens: {arm: there for arm, runs in records.items() if (there := _finite(runs))}
        for tokens, records in _all_final_records(stage, folder).items()
    }


def diverged(stage: Stage, folder: Path) -> list[str]:
    """Every final run that is there and ended without a finite loss: ``ARM, 2M tokens, seed 1``."""
    return [
        f"{arm}, {tokens} tokens, seed {seed}"
        for tokens, records in _all_final_records(stage, folder).items()
        for arm, runs in records.items()
        for seed in sorted(runs.keys() - _finite(runs).keys())
    ]


def _finite(runs: Mapping[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    return {seed: record for seed, record in runs.items() if not record["diverged"]}


def _all_final_records(stage: Stage, folder: Path) -> dict[str, Records]:
    found: dict[str, Records] = {tokens: {} for tokens in stage.final.tokens}
    if not (folder / "parent.json").is_file():
        return found
    parent = read_json(folder / "parent.json", schema=stages.SCHEMA)
    for arm in stage.arms:
        for job in stages.final_jobs(stage, arm, folder):
            if job.result(folder).is_file():
                record = stages.load_result(job, folder)
                stages.require_same(record, parent["model"], parent["texts"])
                found[job.tokens].setdefault(arm.name, {})[job.seed] = record
    return found


def rows(stage: Stage, everything: Mapping[str, Records]) -> dict[str, list[Row]]:
    """Budget -> every arm that has results, best first.

    Holm's correction is over all arms of the stage but the references, at all budgets.
    """
    compared = [arm.name for arm in stage.arms if arm.name not in (stage.baseline, stage.control)]
    p_values = dict.fromkeys(((tokens, name) for tokens in everything for name in compared), 1.0)
    made = {tokens: _rows(stage, records) for tokens, records in everything.items()}
    p_values |= {(tokens, row.name): row.p for tokens, found in made.items() for row in found if row.p is not None}
    adjusted = _holm(p_values)
    return {
        tokens: [row if row.p is None else replace(row, adjusted_p=adjusted[tokens, row.name]) for row in found]
        for tokens, found in made.items()
    }


def _holm(p_values: Mapping[tuple[str, ...], float]) -> dict[tuple[str, ...], float]:
    return dict(zip(p_values, holm(list(p_values.values())), strict=True))


def _rows(stage: Stage, records: Records) -> list[Row]:
    baseline, control = records.get(stage.baseline, {}), records.get(stage.control, {})
    made: list[Row] = []
    for name, runs in records.items():
        seeds = sorted(runs)
        nll = tuple(float(runs[s]["nll"]) for s in seeds)
        shared = _shared(runs, baseline)
        difference = p = None
        if name != stage.baseline and len(shared) > 1:
            ours, theirs = _nlls(runs, shared), _nlls(baseline, shared)
            difference = paired_difference(ours, theirs)
            if len(shared) >= SEEDS_TO_CLAIM and name != stage.control:
                p = paired_p_value(ours, theirs)
        gap = None if name in (stage.baseline, stage.control) else _gap(runs, baseline, control)
        made.append(
            Row(
                name=name,
                rate=tuple(sorted({float(r["config"]["learning_rate"]) for r in runs.values()})),
                nll=nll,
                gap=gap,
                difference=difference,
                p=p,
                adjusted_p=None,
                cost=_cost(runs, baseline),
                means=_means(list(runs.values())),
                pairs=len(runs if name in (stage.baseline, stage.control) else shared),
                planned=len(stage.final.seeds),
                bits=_stored_bits(stage.arm(name).target, list(runs.values())),
            )
        )
    return sorted(made, key=lambda row: row.rank)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One arm minus one other at one budget, over the seeds that both have.

    Attributes:
        arm, other: the second is subtracted from the first.
        seeds: how many.
        planned: how many the stage asks for.
        difference: of the mean over the texts.
        texts: of every test file.
        kl: of the KL to the parent, mean over the texts; it is told beside the score and no verdict rests on it.
        p: of ``difference``; None with too few seeds to claim anything.
        adjusted_p: Holm's over all differences of the question at all budgets.
    """

    arm: str
    other: str
    seeds: int
    planned: int
    difference: PairedDifference
    texts: Mapping[str, PairedDifference]
    kl: PairedDifference
    p: float | None
    adjusted_p: float | None

    @property
    def verdict(self) -> str:
        """win, loss, tie, or why there is none yet."""
        return _verdict(self.seeds, self.planned, self.difference, self.adjusted_p)


def answers(stage: Stage, question: Question, everything: Mapping[str, Records]) -> dict[str, list[Answer]]:
    """Budget -> what the final runs say to a question; pairs with fewer than two common seeds are left out."""
    p_values = dict.fromkeys(((tokens, *pair) for tokens in everything for pair in question.differences), 1.0)
    made = {tokens: _answers(stage, question, records) for tokens, records in everything.items()}
    p_values |= {(tokens, a.arm, a.other): a.p for tokens, found in made.items() for a in found if a.p is not None}
    adjusted = _holm(p_values)
    return {
        tokens: [a if a.p is None else replace(a, adjusted_p=adjusted[tokens, a.arm, a.other]) for a in found]
        for tokens, found in made.items()
    }


def _answers(stage: Stage, question: Question, records: Records) -> list[Answer]:
    made: list[Answer] = []
    for pair in question.differences:
        ours, theirs = (records.get(name, {}) for name in pair)
        shared = _shared(ours, theirs)
        if len(shared) < 2:
            continue
        mean = _nlls(ours, shared), _nlls(theirs, shared)
        made.append(
            Answer(
                arm=pair[0],
                other=pair[1],
                seeds=len(shared),
                planned=len(stage.final.seeds),
                difference=paired_difference(*mean),
                texts={
                    file: paired_difference(_nlls(ours, shared, file), _nlls(theirs, shared, file))
                    for file in stage.texts.test
                },
                kl=paired_difference(*([runs[s]["kl_to_parent"] for s in shared] for runs in (ours, theirs))),
                p=paired_p_value(*mean) if len(shared) >= SEEDS_TO_CLAIM else None,
                adjusted_p=None,
            )
        )
    return made


def _shared(ours: Mapping[int, Any], theirs: Mapping[int, Any]) -> list[int]:
    return sorted(ours.keys() & theirs.keys())


def _nlls(runs: Mapping[int, Any], seeds: Sequence[int], file: str | None = None) -> list[float]:
    """NLL of each seed, of one test file or of their mean."""
    return [runs[seed]["nll"] if file is None else runs[seed]["test"][file]["nll"] for seed in seeds]


def _verdict(seeds: int, planned: int, difference: PairedDifference | None, adjusted_p: float | None) -> str:
    if adjusted_p is None or difference is None:
        return f"{seeds} of {planned} seeds" if seeds < SEEDS_TO_CLAIM else "-"
    word = "tie"
    if adjusted_p < 0.05 and difference.excludes_zero:
        word = "**win**" if difference.mean < 0 else "loss"
    return word if seeds >= planned else f"{word} so far, {seeds} of {planned} seeds"


def _gap(
    runs: Mapping[int, Any], baseline: Mapping[int, Any], control: Mapping[int, Any]
) -> PairedDifference | float | None:
    """Gap closed with its interval over seeds; one seed gives a number, a missing gap nothing."""
    shared = [s for s in _shared(runs, baseline) if s in control]
    try:
        values = [gap_closed(runs[s]["nll"], baseline[s]["nll"], control[s]["nll"]) for s in shared]
    except ConfigError:
        return None
    if len(values) < 2:
        return values[0] if values else None
    return paired_difference(values, [0.0] * len(values))


def _stored_bits(target: str, runs: Sequence[Mapping[str, Any]]) -> float | None:
    """The ``hf`` of all but the stages about bits says nothing: how its bytes are counted changed between results."""
    found = [r["plan"]["bits_per_weight"] for r in runs if "bits_per_weight" in (r.get("plan") or {})]
    return fmean(found) if found and target != "hf" else None


def _cost(runs: Mapping[int, Any], baseline: Mapping[int, Any]) -> float | None:
    """Processor seconds per token over the baseline's, medians of the runs on one machine; None where they share none.

    The clock's seconds do not compare on a shared machine.
    """
    seconds: tuple[dict[str, list[float]], ...] = ({}, {})
    for made, records in zip(seconds, (runs, baseline), strict=True):
        for record in records.values():
            if record.get("seconds_per_token"):
                made.setdefault(_place(record), []).append(record["seconds_per_token"]["processor"])
    ours, theirs = seconds
    most = max(ours.keys() & theirs.keys(), key=lambda place: len(ours[place]), default=None)
    return None if most is None else median(ours[most]) / median(theirs[most])


def _place(record: Mapping[str, Any]) -> str:
    """Where a run was made: the GPU, or the processor and how much of it."""
    machine = record["machine"]
    return machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} thread(s)"


def _means(runs: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    out: dict[str, float | None] = {}
    for key in ("kl_to_parent", "top1_agreement", "zero_share", "flip_rate"):
        values = [r[key] for r in runs if r.get(key) is not None]
        out[key] = fmean(values) if values else None
    return out


# --- Markdown -----------------------------------------------------------------------------------------------------


def budget_table(made: Sequence[Row], baseline: str, parent: float) -> str:
    """The ranking at one budget; ``parent`` is the parent's NLL. Stored bits where the arms differ in them."""
    told = any(row.bits is not None for row in made)
    lines = [
        f"| arm {'| bits ' if told else ''}| seeds | rate | NLL median (min to max) | over parent | minus {baseline} "
        "| Holm p | | gap closed | KL "
        "| top-1 | zero | flipped | cost |",
        f"|---|{'--:|' if told else ''}--:|--:|--:|--:|--:|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in made:
        spread = f"{median(row.nll):.4f} ({min(row.nll):.4f} to {max(row.nll):.4f})"
        p = "-" if row.adjusted_p is None else f"{row.adjusted_p:.2g}"
        cells = [
            row.name,
            *([number(row.bits, 3)] if told else []),
            str(len(row.nll)),
            ", ".join(f"{rate:g}" for rate in row.rate),
            spread if len(row.nll) > 1 else f"{row.nll[0]:.4f}",
            number(median(row.nll) - parent, 4),
            interval(row.difference, 4),
            p,
            row.verdict,
            interval(row.gap, 2),
            number(row.means["kl_to_parent"], 4),
            percent(row.means["top1_agreement"]),
            percent(row.means["zero_share"]),
            percent(row.means["flip_rate"]),
            "-" if row.cost is None else f"{row.cost:.2f} x",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def question_table(question: Question, found: Sequence[Answer], budgets: int) -> str:
    """One arm minus another: the difference of the mean, what Holm leaves of it, that of every text, and that of KL."""
    files = list(found[0].texts)
    lines = [
        f"### {question.title}",
        "",
        f"Holm's correction is over {budgets * len(question.differences)}.",
        "",
        f"| | seeds | nats per token | Holm p | | {' | '.join(files)} | KL to the parent |",
        "|---|--:|--:|--:|---|" + "--:|" * (len(files) + 1),
    ]
    for answer in found:
        p = "-" if answer.adjusted_p is None else f"{answer.adjusted_p:.2g}"
        what = f"{answer.arm} − {answer.other}"
        cells = [what, str(answer.seeds), interval(answer.difference, 4), p, answer.verdict]
        rest = [interval(difference, 4) for difference in (*(answer.texts[file] for file in files), answer.kl)]
        lines.append(f"| {' | '.join([*cells, *rest])} |")
    return "\n".join(lines)


def text_table(stage: Stage, records: Records, parent: Mapping[str, Any]) -> str:
    """Mean NLL on every test text and the gap closed there, over the seeds that all arms shown have; parent first."""
    files = stage.texts.test
    enough = {name: runs for name, runs in records.items() if len(runs) >= SEEDS_TO_CLAIM}
    seeds = sorted(set.intersection(*(set(runs) for runs in enough.values()))) if enough else []
    if not seeds:
        return ""
    means = {name: {f: fmean(_nlls(runs, seeds, f)) for f in files} for name, runs in enough.items()}
    lines = [
        f"Text by text, over seeds {', '.join(map(str, seeds))}; in brackets the gap closed.",
        "",
        f"| arm | {' | '.join(files)} |",
        "|---|" + "--:|" * len(files),
    ]
    for name in ("parent", "round_to_nearest"):
        lines.append(f"| *{name}* | {' | '.join(number(parent[name]['test'][f]['nll'], 4) for f in files)} |")
    references = [enough.get(name) for name in (stage.baseline, stage.control)]
    for name in sorted(means, key=lambda name: fmean(means[name].values())):
        cells = [number(means[name][f], 4) for f in files]
        if name not in (stage.baseline, stage.control) and references[0] and references[1]:
            gaps = [_gap_there(enough[name], references[0], references[1], seeds, f) for f in files]
            cells = [f"{cell} ({number(gap, 2)})" for cell, gap in zip(cells, gaps, strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _gap_there(
    runs: Mapping[int, Any], baseline: Mapping[int, Any], control: Mapping[int, Any], seeds: Sequence[int], file: str
) -> float | None:
    """Gap closed on one text, mean over seeds; None where the control is no better than the baseline."""
    three = (_nlls(of, seeds, file) for of in (runs, baseline, control))
    try:
        return fmean(gap_closed(*nlls) for nlls in zip(*three, strict=True))
    except ConfigError:
        return None


def tuning_table(stage: Stage, folder: Path, parent: Mapping[str, Any]) -> str:
    """NLL on the valid files of every tuning run; the chosen rate in bold, and whether it is at an end of its list."""
    lines = ["| arm | valid NLL at each rate | |", "|---|---|---|"]
    for arm in stage.arms:
        cells: list[tuple[float, float | None]] = []
        for job in stages.tuning_jobs(stage, arm):
            if job.result(folder).is_file():
                record = stages.load_result(job, folder)
                stages.require_same(record, parent["model"], parent["texts"])
                cells.append((float(job.rate or 0.0), record["valid_nll"]))
        if not cells:
            continue
        try:
            best = stages.best_rate(stage, arm, folder)
            end = "not complete" if best is None else ""
        except stages.AllDivergedError:
            best, end = None, "all diverged"
        if best is not None:
            rates = stage.rates(arm)
            end = "the lowest tried" if best == min(rates) else "the highest tried" if best == max(rates) else ""
        shown = []
        for rate, nll in cells:
            text = f"{rate:g}: " + ("diverged" if nll is None else f"{nll:.4f}")
            shown.append(f"**{text}**" if rate == best else text)
        lines.append(f"| {arm.name} | {', '.join(shown)} | {end} |")
    return "\n".join(lines)


def section(stage: Stage, folder: Path | None = None) -> str:
    """Markdown of one stage; empty where it has no result yet."""
    folder = folder or stage.folder
    if not (folder / "parent.json").is_file():
        return ""
    parent = read_json(folder / "parent.json", schema=stages.SCHEMA)
    everything = final_records(stage, folder)
    tuned = len(stages.tuning_jobs(stage, stage.arms[0]))
    tests = parent["texts"]["test"]
    blocks = ", ".join(f"{entry['blocks']} blocks of {name}" for name, entry in tests.items())
    lines = [
        f"# Stage {stage.name.upper() if len(stage.name) == 1 else stage.name}: {stage.title}",
        "",
        f"Parent `{stage.parent}`, {parent['parent']['nll']:.4f} nats per token; rounded without training "
        f"{parent['round_to_nearest']['nll']:.4f}. Each arm had {tuned} tuning runs of "
        f"{' and '.join(stage.tuning.tokens)} tokens, judged on the valid files. Scored: {blocks}, of "
        f"{stage.training.seq_len} tokens; NLL is the mean over the texts, of the frozen model. Brackets: 95 % t "
        "intervals over seeds. Cost: processor seconds a training token over the baseline's. How to read the tables: "
        "[benchmarks.md](../benchmarks.md).",
        f"Command: `python benchmarks/experiments/run.py {stage.name} --data DIR --models DIR`.",
        _provenance(stage, folder, parent, everything),
        *([stage.note] if stage.note else []),
        "",
    ]
    ranked, asked = rows(stage, everything), [(q, answers(stage, q, everything)) for q in stage.questions]
    for tokens, records in everything.items():
        if records:
            table = budget_table(ranked[tokens], stage.baseline, parent["parent"]["nll"])
            lines += [f"## {tokens} tokens", "", table, ""]
            if texts := text_table(stage, records, parent):
                lines += [texts, ""]
            for question, found in asked:
                if found[tokens]:
                    lines += [question_table(question, found[tokens], len(everything)), ""]
    lines += ["## Tuning", "", tuning_table(stage, folder, parent), ""]
    there = {name for records in everything.values() for name in records}
    missing = [arm.name for arm in stage.arms if arm.name not in there]
    if without := diverged(stage, folder):
        lines += [f"Diverged: {'; '.join(without)}.", ""]
    if missing:
        lines += [f"Without a final run so far: {', '.join(missing)}.", ""]
    if notes := [f"- `{arm.name}`: {arm.note}." for arm in stage.arms if arm.note]:
        lines += ["## Notes on arms", "", *notes, ""]
    return "\n".join(lines)


def _provenance(stage: Stage, folder: Path, parent: Mapping[str, Any], everything: Mapping[str, Records]) -> str:
    final = [(a, r) for records in everything.values() for a, runs in records.items() for r in runs.values()]
    runs = [run for _, run in final] or [parent]
    tuned = [
        stages.load_result(job, folder)
        for arm in stage.arms
        for job in stages.tuning_jobs(stage, arm)
        if job.result(folder).is_file()
    ]
    places: dict[str, Counter[str]] = {_place(run): Counter() for run in runs}
    for arm, run in final:
        places[_place(run)][arm] += 1
    where = "; ".join(sorted(places))
    if len(places) > 1:
        where = "; ".join(
            f"{place} (final runs: {', '.join(f'{count} of {arm}' for arm, count in sorted(made.items()))})"
            for place, made in sorted(places.items())
        )
    elsewhere = "; ".join(sorted({_place(run) for run in tuned} - places.keys()))
    torches = sorted({r["versions"]["torch"] for r in runs})
    versions = sorted({r["versions"].get("hestia-lm", "") for r in runs} - {""})
    commits = sorted({_short(r.get("commit")) for r in runs})
    at = f"at {commits[0]}" if len(commits) == 1 else f"at {len(commits)} commits"
    changed = sum(str(r.get("commit")).endswith("+") for r in runs)
    if changed:
        at += f" ({changed} of {len(runs)} final runs with changes beside theirs)"
    return (
        f"Machine: {where}. {f'Tuned on {elsewhere}. ' if elsewhere else ''}"
        f"torch {', '.join(torches)}, hestia {' '.join([', '.join(versions), at]).strip()}."
    )


def _short(commit: str | None) -> str:
    """The first digits of a commit, and the "+" of one with changes beside it."""
    return "unknown" if commit is None else commit[:7] + "+" * commit.endswith("+")


def number(value: float | None, digits: int) -> str:
    """A number, or a dash."""
    return "-" if value is None else f"{value:.{digits}f}".replace("-", "−")


def percent(value: float | None) -> str:
    """A share in per cent, or a dash."""
    return "-" if value is None else f"{100 * value:.1f} %"


def interval(value: PairedDifference | float | None, digits: int) -> str:
    """``mean [low, high]``; a number alone where one seed gives no interval."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return number(value, digits)
    text = f"{value.mean:+.{digits}f} [{value.low:+.{digits}f}, {value.high:+.{digits}f}]"
    return text.replace("-", "−")


def all_stages() -> list[Stage]:
    """The lettered stages, in order, and the one that varies the bits."""
    return [*(stages.load(path.stem) for path in sorted(stages.HERE.glob("?.yaml"))), stages.load("bits")]
