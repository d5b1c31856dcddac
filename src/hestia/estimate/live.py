"""Live bytes and work of a computation that is only pretended: fake tensors have shapes and dtypes, and no data.

The model's own forward and backward code runs, with autocast, activation checkpointing and hestia's quantizers, so what
is counted is what the real step holds, for any architecture, without a byte of weights.
"""

from __future__ import annotations

import weakref
from typing import Any, Self

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage that operations inside the block create, for as long as it is alive.

    Attributes:
        now: bytes alive.
        peak: the most that were alive at once since ``restart``.
        moved: bytes that operations read and wrote, views aside: what memory bandwidth has to carry.
        flops: of matrix products and attention, by torch's own formulas. (Its counter holds on to what activation
            checkpointing recomputes, and so would spoil the peaks.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.moved = self.flops = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace == "prim":  # a question, such as where a tensor lies
            return out
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        touched = 0
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._note(value)
                touched += value.numel() * value.element_size()
        if not func.is_view:
            inputs = (value for value in tree_iter(args) if isinstance(value, Tensor))
            self.moved += touched + sum(value.numel() * value.element_size() for value in inputs)
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        known = self._alive.get(key)
        if known is not None and known() is storage:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            if self._alive.pop(key, None) is not None:
                self.now -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def restart(self) -> int:
        """Forget the peak so far, and return it."""
        peak, self.peak = self.peak, self.now
        return peak
