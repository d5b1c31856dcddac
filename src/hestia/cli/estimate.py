"""``hestia estimate MODEL``: what a run will cost, before it costs anything."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..errors import ConfigError
from .shared import JobCommand, config_option, job_options, json_option, options_from, show

if TYPE_CHECKING:
    from ..estimate.whole import Estimate
    from ..options import Options

NOT_ASKED = (
    "data", "eval_data", "separator", "text_column", "joiner", "held_out_share", "seed", "report_to", "log_every",
    "compile",
)  # fmt: skip


@click.command(name="estimate", cls=JobCommand)
@click.argument("model", required=False)
@click.option("--processes", type=int, default=1, show_default=True, help="that share the training (torchrun)")
@click.option("--fsdp", is_flag=True, help="processes shard weights, gradients and moments (FSDP2) instead of DDP")
@click.option("--memory", metavar="BYTES", help="to hold a process against, such as 80G; default: its share here")
@click.option("--disk", metavar="BYTES", help="to hold the run's folder against; default: what is free at --out")
@click.option("--flops", metavar="NUMBER", help="FLOP/s of one process, in training precision, such as 300T; or probed")
@click.option("--bandwidth", metavar="NUMBER", help="bytes/s of one process's memory, such as 2T; default: probed")
@job_options(leave_out=NOT_ASKED)
@config_option
@json_option
def command(
    model: str | None,
    processes: int,
    fsdp: bool,
    memory: str | None,
    disk: str | None,
    flops: str | None,
    bandwidth: str | None,
    config: str | None,
    as_json: bool,
    **typed: Any,
) -> None:
    """Memory, hours and file sizes of `hestia quantize MODEL` with the same options. Reads config.json, no weights.

    MODEL is a folder, the path of a config.json, or a hub id.
    """
    from ..estimate.whole import Layout, estimate

    options = options_from(config, {"model": model, **typed})
    if not options.model:
        raise ConfigError("MODEL is missing: a folder, the path of a config.json, or a hub id")
    layout = Layout(processes=processes, sharded=fsdp)
    found = estimate(options, layout, memory=memory, disk=disk, flops=flops, bandwidth=bandwidth)
    show(found.to_json(), as_json, table(found, options))


def table(found: Estimate, options: Options) -> str:
    """The estimate of a run with these options, for people."""
    run, machine = found.job, found.machine
    lines = [
        f"{found.model['name']}: {found.parameters:,} parameters, {found.quantized:,} of them become low-bit",
        f"{run.steps:,} steps of {run.batch} blocks of {run.tokens} tokens: "
        f"{run.steps * run.batch * run.tokens:,} tokens",
        *([] if found.alike is None else [f"without --sensitivity no mixed plan: all at {found.alike:g} bits here"]),
        "",
        f"{'stage':<16}{'memory':>10}{'time':>12}   of which",
    ]
    for stage in [*found.stages, *found.alternatives]:
        parts = ", ".join(f"{name} {amount(n)}" for name, n in stage.parts.items())
        spent = found.seconds.get(stage.name)
        lines.append(f"{stage.name:<16}{amount(stage.peak):>10}{duration(spent):>12}   {parts}")
        if stage.note:
            lines.append(f"{'':<41}{stage.note}")
    if "pilot" in found.seconds:
        lines.append(f"{'pilot':<16}{'as train':>10}{duration(found.seconds['pilot']):>12}   --lr NUMBER skips it")
    lines.append(f"{'total':<16}{amount(found.peak):>10}{duration(sum(found.seconds.values())):>12}   a process")
    lines += ["", f"{'file':<16}{'bytes':>10}{'bits':>10}"]
    for file in found.files:
        if file.bytes is None or file.bits_per_weight is None:
            lines.append(f"{file.target:<16}{'-':>10}{'-':>10}   {file.refusal}")
        else:
            lines.append(f"{file.target:<16}{amount(file.bytes):>10}{file.bits_per_weight:>10.2f}")
    folder = ", ".join(f"{name} {amount(n)}" for name, n in found.folder.items() if n)
    lines += [
        "",
        f"run folder: {amount(sum(found.folder.values()))} ({folder})",
        f"machine: {machine.flops:.3g} FLOP/s, {machine.exact:.3g} in fp32, {machine.bandwidth:.3g} bytes/s "
        f"({machine.source})",
        verdict("memory", found.peak, machine.memory) + (" (each process)" if found.layout.processes > 1 else ""),
        verdict("disk", sum(found.folder.values()), machine.disk),
    ]
    if found.fits_memory is False and machine.memory is not None:
        lines.append(f"less memory: {', '.join(less_memory(found, options))}")
        largest = max(found.stages, key=lambda stage: stage.peak)
        fixed = sum(largest.parts.get(part, 0) for part in ("weights", "optimizer", "gradients", "importance"))
        if largest.name == "train" and fixed > machine.memory:
            lines.append(f"which is not enough: weights, optimizer and gradients alone take {amount(fixed)}")
    return "\n".join(lines)


def less_memory(found: Estimate, options: Options) -> list[str]:
    """What makes the largest stage smaller, of what is not yet done; the batch and so the result stay as they are."""
    run, largest = found.job, max(found.stages, key=lambda stage: stage.peak)
    ways: list[str] = []
    if largest.name == "train":
        if run.micro > 1:
            most = run.batch // found.layout.processes
            ways.append(f"--accumulation up to {most} (now micro-batches of {run.micro} blocks)")
        if not options.gradient_checkpointing:
            ways.append("--gradient-checkpointing")
        if found.layout.processes > 1 and not found.layout.sharded:
            ways.append("--fsdp (in a loop of your own)")
        if options.embeddings == "train":
            ways.append("--embeddings freeze")
        if options.teacher is not None:
            ways.append("--teacher none")
    if largest.name == "calibrate":
        ways.append("--sensitivity FILE, measured elsewhere")
    if largest.name in ("train", "calibrate", "score"):
        ways.append(f"--seq-len under {run.tokens}")
    return ways or ["a smaller model: its weights alone take that much"]


def verdict(what: str, needed: int, there: int | None) -> str:
    """One line: does it fit."""
    if there is None:
        return f"{what}: {amount(needed)} needed; how much there is could not be found out, give --{what}"
    return f"{what}: {amount(needed)} needed, {amount(there)} there: {'fits' if needed <= there else 'DOES NOT FIT'}"


def amount(size: float) -> str:
    """Bytes for people.

    >>> amount(12_300_000_000), amount(9_400_000), amount(120)
    ('12.3 GB', '9.4 MB', '0.1 kB')
    """
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 1e3:.1f} kB"


def duration(seconds: float | None) -> str:
    """Seconds for people.

    >>> duration(None), duration(12.0), duration(600.0), duration(7200.0), duration(1e6)
    ('', '12 s', '10 min', '2.0 h', '11.6 days')
    """
    if seconds is None:
        return ""
    for unit, scale, digits in (("days", 86400.0, 1), ("h", 3600.0, 1), ("min", 60.0, 0)):
        if seconds >= 2 * scale or (unit == "h" and seconds >= scale):
            return f"{seconds / scale:.{digits}f} {unit}"
    return f"{seconds:.0f} s"
