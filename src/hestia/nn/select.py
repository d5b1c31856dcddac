"""Which weights can become low-bit, and why every other parameter stays: nothing is left unaccounted for.

The rules, in order; the first that applies names the reason:

    1. a weight shared with an embedding, or the output head    -> kept: "output head" (tied or not)
    2. an embedding                                             -> kept: "embedding"
    3. the weight of an ``nn.Linear`` inside the blocks         -> candidate, unless a skip pattern names it
    4. a bias, a norm (1-d)                                     -> kept
    5. a matrix that is not an ``nn.Linear`` (GPT-2's Conv1D,
       a stacked tensor of experts, a convolution)              -> kept, loudly: ``Selection.warnings``
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..errors import PlanError
from ..plans import Kept

NOT_LINEAR = "not an nn.Linear"
EMBEDDING, HEAD = "embedding", "output head"


@dataclass(frozen=True)
class Selection:
    """The account of a model's parameters.

    Attributes:
        candidates: module path -> linear layer, in the order of the model.
        kept: parameter name -> reason and count.
        warnings: sentences about large weights that hestia cannot quantize.
    """

    candidates: dict[str, nn.Linear]
    kept: dict[str, Kept]
    warnings: tuple[str, ...]

    def coverage(self) -> float:
        """Share of the non-embedding, non-head weights that are candidates."""
        chosen = sum(linear.weight.numel() for linear in self.candidates.values())
        body = chosen + sum(k.weights for k in self.kept.values() if not k.reason.startswith((EMBEDDING, HEAD)))
        return chosen / body if body else 0.0


def select(model: nn.Module, skip: Sequence[str] = ()) -> Selection:
    """Account for every parameter of ``model``.

    Args:
        model: any transformers causal LM, or any module.
        skip: shell patterns of module paths to keep, such as ``model.layers.0.*``.

    Raises:
        PlanError: a skip pattern that matches no quantizable layer.
    """
    head, embeddings = _head_and_embeddings(model)
    embedding_weights = {id(p) for module in embeddings for p in module.parameters()}
    owners = {id(p): module for module in model.modules() for p in module.parameters(recurse=False)}
    candidates: dict[str, nn.Linear] = {}
    kept: dict[str, Kept] = {}
    strange: dict[str, int] = {}
    used: set[str] = set()
    linears = {f"{path}.weight": path for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, parameter in model.named_parameters():
        module = owners[id(parameter)]
        path = linears.get(name)
        pattern = next((p for p in skip if path is not None and fnmatch.fnmatchcase(path, p)), None)
        if id(parameter) in embedding_weights:
            reason = f"{EMBEDDING}, tied to the {HEAD}" if _is_tied(head, parameter) else EMBEDDING
        elif head is not None and module is head:
            reason = HEAD
        elif path is not None and isinstance(module, nn.Linear):
            if pattern is None:
                candidates[path] = module
                continue
            used.add(pattern)
            reason = f"skipped by {pattern!r}"
        elif parameter.ndim < 2:
            reason = "bias" if name.endswith("bias") else "norm or vector"
        else:
            reason = f"{type(module).__name__}: {NOT_LINEAR}"
            strange[reason] = strange.get(reason, 0) + parameter.numel()
        kept[name] = Kept(reason=reason, weights=parameter.numel())
    for pattern in skip:
        if pattern not in used:
            some = ", ".join(list(linears.values())[:3])
            raise PlanError(f"skip pattern {pattern!r} matches no linear layer; paths look like {some}")
    warnings = tuple(f"{count:,} weights are kept: {reason}" for reason, count in strange.items())
    return Selection(candidates, kept, warnings)


def _head_and_embeddings(model: nn.Module) -> tuple[nn.Module | None, list[nn.Module]]:
    embeddings: list[nn.Module] = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return (head if isinstance(head, nn.Module) else None), embeddings


def _is_tied(head: nn.Module | None, parameter: nn.Parameter) -> bool:
    return head is not None and any(p is parameter for p in head.parameters(recurse=False))
