"""Which weights can become low-bit, and why every other parameter stays: nothing is left unaccounted for.

The rules, in order; the first that applies names the reason:

    1. a weight shared with an embedding, or the output head    -> kept: "output head" (tied or not)
    2. an embedding                                             -> kept: "embedding"
    3. a linear weight that several layers share                -> kept, loudly
    4. a linear weight that its parent reads by itself, past
       the layer's forward (``READERS``, ``READ_BY_NAME``)      -> kept, loudly
    5. a router of experts, by its name or its parent's         -> kept: few weights that decide much
    6. any other weight of an ``nn.Linear``                     -> candidate, unless a skip pattern names it
    7. a bias, a norm (1-d)                                     -> kept
    8. a matrix that is not an ``nn.Linear`` (GPT-2's Conv1D,
       a stacked tensor of experts, a convolution, a linear
       layer with a forward of its own)                         -> kept, loudly: ``Selection.warnings``
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import nn

from ..errors import PlanError
from ..plans import Kept
from .linear import QuantLinear

NOT_LINEAR = "not an nn.Linear"
ROUTER, ROUTERS = "router of experts", ("gate", "router", "shared_expert_gate")
EMBEDDING, HEAD = "embedding", "output head"

READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Modules that hand weights of their linear children to a kernel: a ``QuantLinear`` there would not be asked."""

READ_BY_NAME = {
    "MambaMixer": ("dt_proj",),
    "FalconMambaMixer": ("dt_proj",),
    "JambaMambaMixer": ("dt_proj",),
    "Gemma3nTextAltUp": ("prediction_coefs", "correction_coefs"),
    "LongcatFlashTopkRouter": ("classifier",),
    "LSHSelfAttention": ("query_key", "value"),
}
"""Classes of transformers -> linear children whose weights they compute with themselves, on every device."""


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

    def kept_body(self) -> dict[str, int]:
        """Reason -> kept weights, without embeddings and head; the largest first."""
        weights: dict[str, int] = {}
        for kept in self.kept.values():
            if not kept.reason.startswith((EMBEDDING, HEAD)):
                weights[kept.reason] = weights.get(kept.reason, 0) + kept.weights
        return dict(sorted(weights.items(), key=lambda item: -item[1]))

    def coverage(self) -> float:
        """Share of the non-embedding, non-head weights that are candidates."""
        chosen = sum(linear.weight.numel() for linear in self.candidates.values())
        body = chosen + sum(self.kept_body().values())
        return chosen / body if body else 0.0


def select(model: nn.Module, skip: str | Sequence[str] = ()) -> Selection:
    """Account for every parameter of ``model``.

    Args:
        model: any transformers causal LM, or any module.
        skip: shell pattern or patterns of module paths to keep, such as ``model.layers.0.*``.

    Raises:
        PlanError: a skip pattern that matches no linear layer (naming one that is kept anyway does no harm); a model
            with adapters, or offloaded.
    """
    model = unwrapped(model)
    skip = (skip,) if isinstance(skip, str) else skip
    _refuse_dressed(model)
    heads, embeddings = _heads_and_embeddings(model)
    embedding_weights = {id(p) for module in embeddings for p in module.parameters()}
    owners = {id(p): module for module in model.modules() for p in module.parameters(recurse=False)}
    candidates: dict[str, nn.Linear] = {}
    kept: dict[str, Kept] = {}
    strange: dict[str, int] = {}
    linears = {f"{path}.weight": path for path, m in model.named_modules() if is_plain_linear(m)}
    _check_patterns(skip, linears.values())
    users = users_of(model)
    readers = {id(c): type(m).__name__ for m in model.modules() for name, c in m.named_children() if _reads(m, name)}
    for name, parameter in model.named_parameters():
        module = owners[id(parameter)]
        path = linears.get(name)
        pattern = next((p for p in skip if path is not None and fnmatch.fnmatchcase(path, p)), None)
        if id(parameter) in embedding_weights:
            reason = f"{EMBEDDING}, tied to the {HEAD}" if _is_tied(heads, parameter) else EMBEDDING
        elif any(module is head for head in heads):
            reason = HEAD
        elif len(users[id(parameter)]) > 1 and parameter.ndim > 1:
            reason = f"shared by {' and '.join(users[id(parameter)])}"
            strange[reason] = parameter.numel()
        elif path is not None and id(module) in readers:
            reason = f"{path.rpartition('.')[2]} of {readers[id(module)]}, which reads the weight itself"
            strange[reason] = strange.get(reason, 0) + parameter.numel()
        elif path is not None and isinstance(module, nn.Linear):
            if pattern is None and not set(path.split(".")[-2:]) & set(ROUTERS):
                candidates[path] = module
                continue
            reason = f"skipped by {pattern!r}" if pattern is not None else ROUTER
        elif parameter.ndim < 2:
            reason = "bias" if name.endswith("bias") else "norm or vector"
        else:
            reason = f"{type(module).__name__}: {NOT_LINEAR}"
            strange[reason] = strange.get(reason, 0) + parameter.numel()
        kept[name] = Kept(reason=reason, weights=parameter.numel())
    warnings = tuple(f"{count:,} weights are kept: {reason}" for reason, count in strange.items())
    return Selection(candidates, kept, warnings)


def _reads(module: nn.Module, child: str) -> bool:
    """Whether a module takes the weight of a child past its ``forward``."""
    return isinstance(module, READERS) or child in READ_BY_NAME.get(type(module).__name__, ())


def _heads_and_embeddings(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Of the model and of whatever is within it: it may be a part of a larger module."""
    embeddings: list[nn.Module] = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    getters = [getattr(m, "get_output_embeddings", None) for m in model.modules()]
    heads = {id(head): head for getter in getters if callable(getter) and isinstance(head := getter(), nn.Module)}
    return list(heads.values()), embeddings


def _refuse_dressed(model: nn.Module) -> None:
    if hasattr(model, "peft_config"):
        raise PlanError(
            "the model carries adapters, which would become low-bit too: merge them first (merge_and_unload)"
        )
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and hasattr(module, "_hf_hook"):
            raise PlanError(f"{path}: offloaded or spread over devices by accelerate; load the model on one device")


def _check_patterns(skip: Sequence[str], paths: Collection[str]) -> None:
    for pattern in skip:
        if not any(fnmatch.fnmatchcase(path, pattern) for path in paths):
            some = ", ".join(list(paths)[:3])
            raise PlanError(f"skip pattern {pattern!r} matches no linear layer; paths look like {some}")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within ``torch.compile`` and data parallelism, whose paths a plan names."""
    while True:
        inner = model._modules.get("_orig_mod")  # torch.compile's, whose class has no public name
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner


def is_plain_linear(module: nn.Module) -> bool:
    """Whether ``QuantLinear`` can stand in for it: a forward or parameters of its own would be lost.

    Packed 4-bit weights and adapters have them in their class, offloaded layers in the instance.
    """
    if not isinstance(module, nn.Linear) or type(module).forward not in (nn.Linear.forward, QuantLinear.forward):
        return False
    return "forward" not in vars(module) and module._parameters.keys() <= {"weight", "bias"}


def users_of(model: nn.Module) -> dict[int, list[str]]:
    """id of a parameter -> the path of every module that holds it; a module used twice has two paths."""
    users: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(path)
    return users


def _is_tied(heads: Sequence[nn.Module], parameter: nn.Parameter) -> bool:
    return any(p is parameter for head in heads for p in head.parameters(recurse=False))
