"""In and out: ``apply`` a plan to a model, ``freeze`` it to integers, or ``restore`` it as it was."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import nn

from ..errors import GuardError, PlanError
from ..plans import Plan
from ..quant import QuantizedTensor
from .biases import declare
from .knobs import Knobs
from .latents import mark, refuse_latents, unmark
from .linear import QuantLinear
from .select import is_plain_linear, unwrapped, users_of
from .shards import is_sharded, whole


def quantized_modules(model: nn.Module) -> Iterator[tuple[str, QuantLinear]]:
    """(module path, layer) of every quantized layer, in the order of the model, by the paths that plans name."""
    for path, module in unwrapped(model).named_modules():
        if isinstance(module, QuantLinear):
            yield path, module


def apply(model: nn.Module, plan: Plan) -> nn.Module:
    """Replace the plan's linear layers by ``QuantLinear``, in place; the Parameters stay the same objects.

    Latent weights become fp32 (a bf16 latent swallows small updates; fp64 stays); everything else keeps its dtype.
    State-dict keys do not change, but for what a scale rule holds (``PATH._hestia.*``); forward and backward hooks of a
    layer stay. All layers share one ``Knobs`` module, which starts at the schedule's t = 0; it is registered in the
    layers alone, because a root that counts or runs its children (``nn.Sequential``) would meet it.

    A model that is converted on the meta device and gets its weights after ``to_empty`` wants ``QuantLinear.restart()``
    of every layer (``hestia.nn.quantized_modules``) then, which fills what its scale rule holds.

    Raises:
        PlanError: the plan names a layer that the model lacks, of another shape or kind, or whose weight another
            layer shares, or the model is already converted; nothing is changed then.
    """
    given, model = model, unwrapped(model)
    found = dict(model.named_modules())
    if any(isinstance(module, QuantLinear) for module in found.values()):
        raise PlanError("the model is already converted; hestia.restore(model) first")
    refuse_latents(model)
    users = users_of(model)
    for path, layer in plan.layers.items():
        module = found.get(path)
        if module is None:
            raise PlanError(f"{path}: the plan names it, the model has no such module; was it made for another model?")
        if not isinstance(module, nn.Linear):
            raise PlanError(f"{path}: the plan wants an nn.Linear, the model has {type(module).__name__}")
        if not is_plain_linear(module):
            raise PlanError(f"{path}: more than an nn.Linear (a forward or parameters of its own), which would be lost")
        shape = (module.out_features, module.in_features)
        if shape != layer.shape:
            raise PlanError(f"{path}: the plan says {layer.shape}, the model has {shape}")
        if others := [other for other in users[id(module.weight)] if other != path]:
            raise PlanError(
                f"{path}: its weight is also that of {' and '.join(others)}; make the plan for this very model, "
                "which keeps shared weights"
            )
    schedule = plan.schedule
    knobs = Knobs(**schedule.at(0.0))
    knobs.moved = schedule.at(0.0) == schedule.at(1.0)
    knobs.to(next(model.parameters()).device)
    for path, layer in plan.layers.items():
        linear = found[path]
        assert isinstance(linear, nn.Linear)
        quantized = QuantLinear(linear, layer.spec, knobs, layer.temperature_factor)
        quantized.weight.data = quantized.weight.data.to(torch.promote_types(quantized.weight.dtype, torch.float32))
        _replace(model, path, quantized)
    mark(model, plan.recipe)
    return given


def restore(model: nn.Module) -> nn.Module:
    """Undo ``apply``: plain linear layers with the latent weights, in the parent's dtype; Parameters stay the same."""
    given, model = model, unwrapped(model)
    for path, module in list(quantized_modules(model)):
        module.weight.data = module.weight.data.to(module.parent_dtype)
        _replace(model, path, module.unquantized())
    unmark(model)
    return given


@torch.no_grad()
def freeze(model: nn.Module) -> dict[str, QuantizedTensor]:
    """Replace every quantized layer by a plain one that holds ``codes * scales``, in place, and return the codes.

    The weights return to the parent's dtype, which holds them exactly: snapped scales are bf16 and fp16 numbers, and
    ``snap`` leaves room for the product with every level of the grid. An output shift moves into the bias, and where
    the parent had none, the model's configuration says so from then on. Under ``fully_shard`` all processes call it,
    and each ends with whole frozen weights.

    Raises:
        PlanError: no layer is quantized: ``apply`` was not called, or ``freeze`` already was.
        GuardError: a latent weight, a learned scale or an importance is NaN or infinite; it is named and nothing is
            changed.

    Warns:
        UserWarning: the weights were trained, and the knobs never moved.
    """
    model = unwrapped(model)
    layers = list(quantized_modules(model))
    if not layers:
        raise PlanError("there is nothing to freeze: no layer was converted by hestia.apply, or all are frozen already")
    for path, module in layers:
        held = "learned scale" if module.quantizer.spec.learns else "importance"
        for what, tensor in (("weight", module.weight), (held, module.held)):
            if tensor is not None and not bool(torch.isfinite(whole(tensor)).all()):
                raise GuardError(f"{path}: the {what} holds NaN or infinity and cannot be frozen")
    if not layers[0][1].knobs.moved and any(layer.weight._version > layer.born for _, layer in layers):
        warnings.warn(
            "the weights have changed since hestia.apply, and pressure and temperature never moved: they were trained "
            "in full precision. A Trainer needs hestia.QATCallback(plan), a loop of your own hestia.Clock",
            stacklevel=3,  # past torch.no_grad
        )
    frozen: dict[str, QuantizedTensor] = {}
    shifted: list[str] = []
    for path, module in layers:
        frozen[path] = tensor = module.codes()
        if module.quantizer.spec.output_shift is not None:
            shifted.append(path)
            module.fold_shift()
        dense = tensor.dense(module.parent_dtype)
        if is_sharded(module.weight):
            module.weight = nn.Parameter(dense, requires_grad=module.weight.requires_grad)
        else:
            module.weight.data = dense
        _replace(model, path, module.unquantized())
    if shifted:
        declare(model, shifted)
    unmark(model)
    return frozen


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    before = model.get_submodule(path)
    if not hasattr(before, "unshard"):  # the hooks of fully_shard gather a weight that is whole from now on
        for hooks in _HOOKS:  # the very dictionaries, so that the handles of the hooks still remove them
            setattr(module, hooks, getattr(before, hooks))
    setattr(model.get_submodule(parent), name, module)
