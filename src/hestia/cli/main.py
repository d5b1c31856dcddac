"""``hestia``: finds the verb, runs it, and turns every error into one clear message and a documented exit status.

0 done   2 bad usage, configuration or input, nothing written   3 verification failed   4 stopped by a guard
130 Ctrl-C, 143 SIGTERM, 129 SIGHUP: saved, continue with --resume          1 anything else
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import signal
import sys
from collections.abc import Sequence

import click

from .. import __version__, progress
from ..errors import HestiaError, nearest

VERBS = {
    "demo": "the bundled model and text, the whole way, in a few minutes",
    "quantize": "calibrate, plan, train, freeze, export, verify, evaluate, report: the main job",
    "calibrate": "measure which tensors matter",
    "plan": "decide which weights become low-bit, and check that the target can hold them",
    "train": "train, freeze and score by a plan",
    "export": "write a run's model in a file format",
    "verify": "compare a written file with the run it comes from, or with what it says of itself",
    "eval": "score a model on text or tasks",
    "run": "chat with a .gguf file in llama.cpp, or let it continue a text",
    "bench": "how fast .gguf files run in llama.cpp, side by side",
    "compare": "runs side by side",
    "report": "write a run's report.html and model card again",
    "recipes": "list the recipes, or show one",
    "estimate": "memory, hours and file sizes of a run, from the model's configuration alone",
    "doctor": "is this machine fit for a run, and what to do where it is not",
}

LONGEST_MESSAGE = 1200
"""Characters of an error message; what is longer repeats the input it complains about."""

_VARIADIC = ("--data", "--eval-data", "--target", "--widths", "--skip", "--report-to", "--tasks")


class Verbs(click.Group):
    """Loads a verb's module when it is used, so that ``hestia --help`` imports nothing heavy."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f".{cmd_name}", __package__)
        return module.command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS:
            raise click.UsageError(f"unknown command {args[0]!r}: {nearest(args[0], VERBS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="hestia")
def cli() -> None:
    """Turn a pretrained language model into a verified ternary one."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    arguments = spread(list(sys.argv[1:] if argv is None else argv))
    progress.enable()
    try:
        status = cli.main(args=arguments, prog_name="hestia", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except click.exceptions.Abort:
        return _fail("interrupted; --resume goes on where a run was", 130)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        where = f" (see `{context.command_path} --help`)" if context is not None else ""
        return _fail(f"{error.format_message()}{where}", 2)
    except HestiaError as error:
        return _fail(str(error), error.exit_status)
    except (MemoryError, RuntimeError) as error:
        where = _full_memory(error)
        if where is None:
            raise
        return _fail(
            f"{where} memory is full; what a run had saved is intact: free memory, then --resume, which after training "
            "only scores, with --device cpu too; or begin in another --out with --gradient-checkpointing, a smaller "
            "--batch-size or --teacher none",
            1,
        )
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return _fail(f"the disk is full ({error}); earlier checkpoints are intact: make room, then --resume", 1)
        status = 2 if error.errno in (errno.ENAMETOOLONG, errno.ELOOP) else 1  # only a name that was typed can be
        return _fail(f"the system refused: {error}", status)


def _full_memory(error: BaseException) -> str | None:
    """Whose memory an error says is full, None for another error; by its words, since to import torch takes seconds."""
    said = str(error)
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in said:
        return "the"
    out = "CUDA error: out of memory" in said or "CUBLAS_STATUS_ALLOC_FAILED" in said
    return "the GPU's" if out or type(error).__name__ == "OutOfMemoryError" else None


def spread(arguments: list[str]) -> list[str]:
    """``--data a b`` as ``--data a --data b``: several values after one option, as people write them.

    >>> spread(["quantize", "m", "--data", "a", "b", "--out", "r"])
    ['quantize', 'm', '--data', 'a', '--data', 'b', '--out', 'r']
    """
    variadic = () if arguments[:1] == ["verify"] else _VARIADIC  # its --target takes one value
    out: list[str] = []
    current: str | None = None
    taken = 0
    for argument in arguments:
        if argument.startswith("-"):
            current, taken = (argument, 0) if argument in variadic else (None, 0)
        elif current is not None:
            taken += 1
            if taken > 1:
                out.append(current)
        out.append(argument)
    return out


def _fail(message: str, status: int) -> int:
    with contextlib.suppress(OSError):  # nobody listens any more
        print(f"hestia: {_readable(message)}", file=sys.stderr)
    return status


def _readable(message: str) -> str:
    """A message without what a name in it could do to a terminal, nor more of it than one reads."""
    shown = "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in message)
    return shown if len(shown) <= LONGEST_MESSAGE else f"{shown[:LONGEST_MESSAGE]} ..."


def run() -> None:
    """The console script; a SIGTERM outside of training tidies up and leaves too."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(_fail("terminated", 128 + number)))
    sys.exit(main())


if __name__ == "__main__":
    run()
