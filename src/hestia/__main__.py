"""``python -m hestia`` is the same as ``hestia``."""

from .cli.main import run

run()
