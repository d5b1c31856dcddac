"""Biases that a frozen output shift needs and the architecture has not: which options of its configuration bring them.

Nothing here knows an architecture by name: an empty twin of the model is built with the options on and looked at.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

OPTIONS: tuple[tuple[str, ...], ...] = ((), ("attention_bias",), ("mlp_bias",), ("attention_bias", "mlp_bias"))
"""The subsets of configuration options that are tried, smallest first."""


def biased_layers(model: nn.Module, options: Collection[str]) -> set[str] | None:
    """The paths of all linear layers that have a bias when ``options`` are on; None if the configuration lacks one.

    A model without a configuration is a plain module, whose layers all may have one.
    """
    config: Any = getattr(model, "config", None)
    if config is None:
        return {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    if any(not hasattr(config, option) for option in options):
        return None
    twin = copy.deepcopy(config)
    for option in options:
        setattr(twin, option, True)
    with torch.device("meta"):
        built = type(model)(twin)
    return {p for p, m in built.named_modules() if isinstance(m, nn.Linear) and m.bias is not None}


def options_for(model: nn.Module, paths: Collection[str]) -> tuple[str, ...] | None:
    """The fewest configuration options under which every layer of ``paths`` has a bias; None if there are none."""
    for options in OPTIONS:
        layers = biased_layers(model, options)
        if layers is not None and layers.issuperset(paths):
            return options
    return None


@torch.no_grad()
def declare(model: nn.Module, paths: Collection[str]) -> None:
    """Switch the options on in the model's configuration, and give the other layers that they concern a zero bias.

    So ``save_pretrained`` and ``from_pretrained`` agree about every tensor. A model without a configuration is left.
    """
    config: Any = getattr(model, "config", None)
    options = options_for(model, paths)
    if config is None or not options:
        return
    for option in options:
        setattr(config, option, True)
    for path in biased_layers(model, options) or ():
        linear = model.get_submodule(path)
        if isinstance(linear, nn.Linear) and linear.bias is None:
            linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))
