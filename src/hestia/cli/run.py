"""``hestia run FILE.gguf --prompt "..."``: what does it say?"""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import ConfigError
from .shared import json_option, show


@click.command(name="run")
@click.argument("file")
@click.option("--prompt", required=True, help="text to continue")
@click.option("--tokens", type=click.IntRange(min=1), default=64, show_default=True, help="most new tokens")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="CPU threads")
@json_option
def command(file: str, prompt: str, tokens: int, threads: int, as_json: bool) -> None:
    """Continue a prompt greedily with FILE, a .gguf, in llama.cpp (needs `pip install 'hestia-lm[run]'`)."""
    from ..export import llama_cpp
    from ..export.gguf_reader import read

    path = Path(file)
    if path.suffix != ".gguf":
        raise ConfigError(f"{file}: not a .gguf file")
    read(path)  # llama.cpp may abort on a damaged file; our own reader says what is wrong
    text = llama_cpp.generate(path, prompt, tokens, threads=threads).text
    show({"prompt": prompt, "text": text}, as_json, prompt + text)
