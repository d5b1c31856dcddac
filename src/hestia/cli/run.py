"""``hestia run FILE.gguf [--prompt "..."]``: talk to a file, or let it continue a text."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ..errors import ConfigError
from .shared import gpu_layers_option, json_option, show, threads_option


@click.command(name="run")
@click.argument("file")
@click.option("--prompt", help="text to continue; without it a conversation, read from standard input line by line")
@click.option("--chat", is_flag=True, help="put --prompt through the file's chat template")
@click.option("--tokens", type=click.IntRange(min=1), default=64, show_default=True, help="most new tokens an answer")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy")
@click.option("--seed", type=int, default=0, show_default=True, help="of the sampling, where temperature is not 0")
@threads_option
@gpu_layers_option
@json_option
def command(
    file: str,
    prompt: str | None,
    chat: bool,
    tokens: int,
    temperature: float,
    seed: int,
    threads: int | None,
    gpu_layers: int,
    as_json: bool,
) -> None:
    """Chat with FILE, a .gguf, or continue a text, in llama.cpp (needs `pip install 'hestia-lm[run]'`)."""
    from ..export.llama_session import Session

    path = Path(file)
    if path.suffix != ".gguf":
        raise ConfigError(f"{file}: not a .gguf file")
    if as_json and prompt is None:
        raise click.UsageError("--json needs --prompt")
    with Session(path, threads=threads, gpu_layers=gpu_layers) as session:
        if chat and not session.has_template:
            raise ConfigError(f"{file}: carries no chat template; leave out --chat")
        sampling = {"temperature": temperature, "seed": seed}
        if prompt is None:
            _converse(session, tokens, sampling)
            return
        if chat:
            pieces = session.chat([{"role": "user", "content": prompt}], tokens, **sampling)  # type: ignore[arg-type]
        else:
            pieces = session.complete(prompt, tokens, **sampling)  # type: ignore[arg-type]
        if not as_json:
            click.echo("" if chat else prompt, nl=False)
        text = ""
        for piece in pieces:
            text += piece
            if not as_json:
                click.echo(piece, nl=False)
        speed = session.speed
    if as_json:
        show({"prompt": prompt, "text": text, "tokens_per_second": speed.tokens_per_second, **vars(speed)}, True, "")
        return
    click.echo()
    click.echo(f"{speed.tokens} tokens at {speed.tokens_per_second:.1f} per second", err=True)


def _converse(session: object, tokens: int, sampling: dict[str, float | int]) -> None:
    """A turn a line until standard input ends; a model without a template continues each line."""
    from ..export.llama_session import Session

    assert isinstance(session, Session)
    messages: list[dict[str, str]] = []
    asks = sys.stdin.isatty()
    click.echo("an empty line or Ctrl-D ends the conversation" if asks else "", err=True, nl=asks)
    while True:
        click.echo("> " if asks else "", err=True, nl=False)
        line = sys.stdin.readline()
        if not line.strip():
            return
        said = line.rstrip("\n")
        if session.has_template:
            messages.append({"role": "user", "content": said})
            pieces = session.chat(messages, tokens, **sampling)  # type: ignore[arg-type]
        else:
            pieces = session.complete(said, tokens, **sampling)  # type: ignore[arg-type]
        answer = ""
        for piece in pieces:
            answer += piece
            click.echo(piece, nl=False)
        click.echo()
        messages.append({"role": "assistant", "content": answer})
        click.echo(f"[{session.speed.tokens_per_second:.1f} tokens/s]", err=True)
