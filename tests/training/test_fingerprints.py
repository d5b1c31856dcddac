"""What a resumed run must share: every block of the data, and every tensor's temperature."""

from __future__ import annotations

import dataclasses

import pytest
from toy_models import llama
from toy_training import blocks

import hestia
from hestia.training import fingerprints


def test_a_change_in_the_last_block_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "_CHUNK", 40)  # several pieces
    changed = blocks()
    changed.input_ids[-1, -1] += 1
    assert fingerprints.of_blocks(blocks())["sha256"] != fingerprints.of_blocks(changed)["sha256"]


def test_a_change_of_one_temperature_is_seen() -> None:
    plan = hestia.plan(llama())
    path = next(iter(plan.layers))
    hotter = dataclasses.replace(plan.layers[path], temperature_factor=2.0)
    assert fingerprints.of_plan(plan) != fingerprints.of_plan(
        dataclasses.replace(plan, layers={**plan.layers, path: hotter})
    )
