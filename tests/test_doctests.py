"""The examples in docstrings say what the code does."""

import doctest
import importlib
import pkgutil

import pytest

import hestia

MODULES = [m.name for m in pkgutil.walk_packages(hestia.__path__, "hestia.") if not m.name.endswith("__main__")]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples() -> None:
    found = sum(
        len(t.examples) for name in MODULES for t in doctest.DocTestFinder().find(importlib.import_module(name))
    )
    assert found >= 10
