"""The demo: the bundled model and text, two recipes, one honest table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import ConfigError
from .files import read_json
from .options import Options
from .pipeline import Run, quantize
from .pipeline.artefacts import SCORES_FILE
from .progress import announce
from .tiny import model_path, text_path

LEARNING_RATE = "6.5e-4"
"""What the pilot chooses for both runs (docs/log.md), so that the demo need not run it."""


def demo(out: Path, *, tokens: str = "120k", threads: int | None = None) -> dict[str, Any]:
    """Train the bundled model by plain ``bitnet_ste`` and by the defaults on the same blocks; report both side by side.

    Returns:
        The record of report.json of the second run, the first one among its baselines.

    Raises:
        ConfigError: ``out`` holds something already.
    """

    def options(recipe: str, teacher: str, target: tuple[str, ...]) -> Options:
        return Options(
            model=str(model_path()),
            data=(str(text_path("train")),),
            eval_data=(str(text_path("held_out")),),
            out=str(out / recipe),
            recipe=recipe,
            teacher=teacher,
            target=target,
            tokens=tokens,
            seq_len=256,
            batch_size=8,
            lr=LEARNING_RATE,
            eval_tokens="16k",
            threads=threads,
        )

    first, second = options("bitnet_ste", "none", ("hf",)), options("hearth", "parent", ("hf", "gguf:tq2_0"))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already; choose another --out, or delete it to start the demo again")
    announce("1 of 2: bitnet_ste, hard rounding from the first step, taught by the text alone")
    plain = quantize(first)
    announce("2 of 2: hearth, rounding that hardens as it trains, taught by the parent")
    row = {
        "recipe": plain["recipe"],
        "nll": plain["nll"]["quantized"],
        "kl_to_parent": plain["kl_to_parent"],
        "top1_agreement": plain["top1_agreement"],
        "seconds": plain["seconds"]["train"],
    }
    return Run(second, baselines=[row], reference=read_json(out / "bitnet_ste" / SCORES_FILE)).execute()
