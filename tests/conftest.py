"""One thread (the machines that run this are small and shared), and examples that are the same on every run."""

import gc

import pytest
import torch
from hypothesis import HealthCheck, settings
from toy_runs import invoke, lean, parent_copy, toy_held_out, toy_parent, toy_run, toy_text

__all__ = ["invoke", "lean", "parent_copy", "toy_held_out", "toy_parent", "toy_run", "toy_text"]
"""Fixtures that several folders use."""

torch.set_num_threads(1)

settings.register_profile("ci", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci")


@pytest.fixture(scope="session", autouse=True)
def short_collections() -> None:
    """The Trainer collects garbage at every end; half a million objects of imported modules need no second look."""
    gc.collect()
    gc.freeze()
