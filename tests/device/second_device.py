"""A second device without a second device: tensors that say they lie on ``pretended:0`` and hold ordinary ones.

What they hold computes on the CPU, so that a run gives the numbers that it gives there. An operation that is handed
tensors of both places is refused, as CUDA refuses it; what CUDA lets pass passes: copies, indices from the CPU, and
numbers from there in what works element by element. Memory, streams, kernels and bf16 arithmetic of a real GPU are not
pretended.

torch knows one backend a process that Python may register, and it cannot be taken back: import this in a process of its
own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import safetensors.torch
import torch
from accelerate.state import PartialState
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "pretended"
aten = torch.ops.aten
COPIES = (aten.copy_.default, aten._to_copy.default)
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
FILLING = (aten.fill_.Tensor, aten.fill.Tensor, aten.masked_fill.Tensor, aten.masked_fill_.Tensor, *INDEXING)
"""What takes a number from the CPU, beside all that works element by element."""

REFUSED: list[str] = []
"""Operations that were refused, for callers that catch the error."""

TRAINED_ON: set[torch.device] = set()
"""Where the model lay in the training steps of pretended runs."""


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend(NAME, _Backend())
DEVICE = torch.device(NAME, 0)


_autocast = torch.library.Library("aten", "IMPL")
_all_else = torch.library.Library("_", "IMPL")
_all_else.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")


def _in_bf16(operation: Any) -> Any:
    """What autocast makes of an operation of its list: floating arguments in bf16."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
            return operation(*tree_map(_to_bf16, args), **tree_map(_to_bf16, kwargs))

    return kernel


def _to_bf16(x: Any) -> Any:
    cast = isinstance(x, Tensor) and x.dtype == torch.float32
    return x.to(torch.bfloat16) if cast else x


for _name in ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention"):
    _autocast.impl(_name, _in_bf16(getattr(aten, _name)), "AutocastPrivateUse1")


class Elsewhere(Tensor):
    """A tensor on ``DEVICE``; ``held`` is the one that computes."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, requires_grad: bool = False) -> Elsewhere:
        shape = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = Tensor._make_wrapper_subclass(cls, held.size(), device=DEVICE, requires_grad=requires_grad, **shape)
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Elsewhere:
        return Elsewhere(inner["held"])

    @property
    def data(self) -> Elsewhere:
        return Elsewhere(self.held.data)

    @data.setter
    def data(self, new: Elsewhere) -> None:
        Tensor.data.__set__(self, new)
        self.held = new.held

    def storage(self) -> Any:
        return self.held.storage()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.held.tolist()


def _clash(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether CUDA would refuse the places of an operation's tensors."""
    if func in COPIES:
        return False
    arguments = func._schema.arguments
    given = [*zip(arguments, args, strict=False), *((a, kwargs[a.name]) for a in arguments if a.name in kwargs)]
    if func in INDEXING:  # the indices may lie on the CPU, or where the tensor lies
        indices = [x for x in tree_iter(args[1]) if isinstance(x, Elsewhere)]
        if indices and not isinstance(args[0], Elsewhere):
            return True
        given = [given[0], *given[2:]]
    takes_numbers = torch.Tag.pointwise in func.tags or func in FILLING
    places: set[bool] = set()
    for argument, value in given:
        written = argument.alias_info is not None and argument.alias_info.is_write
        for x in tree_iter(value):
            number = isinstance(x, Tensor) and x.ndim == 0 and not isinstance(x, Elsewhere)
            if isinstance(x, Tensor) and not (number and takes_numbers and not written):
                places.add(isinstance(x, Elsewhere))
    return len(places) == 2


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    there = [x for x in tree_iter((args, kwargs)) if isinstance(x, Elsewhere)]
    if there and _clash(func, args, kwargs):
        REFUSED.append(str(func))
        raise RuntimeError(f"Expected all tensors to be on the same device, {func} was given {DEVICE} and cpu")
    asked = kwargs.get("device")
    to = bool(there) if asked is None else torch.device(asked).type == NAME
    if func is aten.copy_.default:
        to = isinstance(args[0], Elsewhere)
    held: dict[int, Elsewhere] = {id(x.held): x for x in there}
    kwargs = kwargs if asked is None else {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map(lambda x: x.held if isinstance(x, Elsewhere) else x, (args, kwargs))
    out = func(*args, **kwargs)
    if not to:
        return out

    def brought(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return held[id(x)] if id(x) in held else Elsewhere(x)  # what was changed in place is the tensor that was given

    return tree_map(brought, out)


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Constants(TorchFunctionMode):
    """torch.tensor makes its tensor below the dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == NAME:
            del kwargs["device"]
            return func(*args, **kwargs).to(DEVICE)
        return func(*args, **kwargs)


@contextmanager
def pretended() -> Iterator[None]:
    """``DEVICE`` exists, and the main job, its trainer and the other verbs choose it."""
    import hestia.jobs as jobs
    import hestia.pipeline.workspace as workspace
    import hestia.settings as settings
    import hestia.training.trainer as trainer
    from hestia.training import TrainConfig

    def elsewhere(*words: Any) -> Any:
        made = arguments(*words)
        made.__dict__["_setup_devices"] = DEVICE  # what it has found out it does not ask again
        PartialState._shared_state["device"] = DEVICE
        return made

    def flattened(tensors: dict[str, Tensor], kept: list[Any]) -> Any:
        return flatten({name: t.held if isinstance(t, Elsewhere) else t for name, t in tensors.items()}, kept)

    def stepped(self: Any, model: Any, *words: Any, **more: Any) -> Any:
        TRAINED_ON.update(weight.device for weight in model.parameters())
        return step(self, model, *words, **more)

    step = trainer.HestiaTrainer.training_step
    arguments, flatten, choose = trainer.arguments, safetensors.torch._flatten_as_ptr, workspace.choose_device
    check = TrainConfig.__post_init__
    PartialState()
    before = PartialState._shared_state["device"]
    trainer.arguments, safetensors.torch._flatten_as_ptr = elsewhere, flattened
    workspace.choose_device = jobs.choose_device = settings.choose_device = lambda options: DEVICE
    TrainConfig.__post_init__ = lambda self: None
    trainer.HestiaTrainer.training_step = stepped
    try:
        with _Operations(), _Constants():
            yield
    finally:
        trainer.arguments, safetensors.torch._flatten_as_ptr = arguments, flatten
        workspace.choose_device = jobs.choose_device = settings.choose_device = choose
        TrainConfig.__post_init__ = check
        PartialState._shared_state["device"] = before
        trainer.HestiaTrainer.training_step = step
