"""From a frozen model to files that engines load, and the proof that they hold it.

    frozen.py       the frozen model on disk: what everything here reads; digest.py the hash of its codes
    save.py         puts it there, from a model in memory
    precheck.py     what a file format would refuse at the end of a run, asked before it
    huggingface.py  a compressed-tensors folder for transformers, vLLM and llama.cpp's converter
    packing.py      the block layouts of GGUF
    gguf.py         a .gguf file for llama.cpp and what is built on it: gguf_families, gguf_layout, gguf_tokenizer say
                    what must be in it, gguf_writer writes
    gguf_check.py   compares such a file with the frozen model, or with its own claims; gguf_reader is its own parser
    mlx.py          a folder for mlx-lm
    refit.py        scales fitted anew for a target that cannot hold the run's own, where that is asked for
    verify.py       reads a written file back (huggingface_check, gguf_check, mlx_check), compares it with the frozen
                    model, and has it run: engines, with activations, the rounding of llama.cpp's kernels in PyTorch,
                    and tokenizer_check, strings that break tokenizers
    llama_cpp.py    the door to llama-cpp-python, where it is installed; mlx_engine.py the one to mlx-lm
    llama_session.py   a conversation with a .gguf file; speed.py how fast several run, side by side

``hestia.export.verify.verify`` is not repeated here: a package cannot have a function and a module of one name.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ExportError

if TYPE_CHECKING:
    from .frozen import FrozenModel
    from .gguf_layout import Parent

__all__ = ["export_model", "require_free"]


def require_free(path: Path) -> None:
    """Check that an export to ``path`` overwrites nothing: it is not there, or an empty folder.

    Raises:
        ExportError: something is there.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ExportError(f"{path}: already exists and is not an empty folder; remove it or write to another path")


def export_model(
    frozen: FrozenModel,
    target: str,
    path: Path,
    *,
    fallback: bool = False,
    head: str = "auto",
    parent: Parent | None = None,
) -> dict[str, Any]:
    """Write the frozen model to ``path`` in the file format ``target``, ``hf`` or ``gguf:tq2_0``.

    Args:
        frozen: the run's frozen model.
        target: a name of ``hestia.targets.TARGETS``.
        path: the folder (hf) or file (gguf) to create.
        fallback: let single tensors that the format's own type cannot hold be stored as another exact type.
        head: how a GGUF file stores embedding and head: ``auto`` and ``f32`` keep every number, others may round.
        parent: what a GGUF file tells of the model that was quantized.

    Returns:
        ``{"target", "path", "bytes", "sha256", ...}``; the exporter adds what it knows.

    Raises:
        ConfigError: there is no such target.
        ExportError: the format cannot hold the model exactly, or ``path`` is taken; nothing was written.
    """
    from ..targets import target as find_target  # here, because llama.cpp's child process imports this package too

    chosen = find_target(target)
    require_free(path)
    if chosen.container == "hf":
        from .huggingface import export_hf

        return export_hf(frozen, path, bits=4 if chosen.name == "hf:int4" else 2)
    if chosen.container == "mlx":
        from .mlx import export_mlx

        return export_mlx(frozen, path)
    from .gguf import export_gguf

    return export_gguf(frozen, chosen, path, fallback=fallback, head=head, parent=parent)
