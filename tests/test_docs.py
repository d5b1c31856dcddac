"""What the documentation tells its readers to type is there: links, commands and their options, Python."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from itertools import pairwise
from pathlib import Path

import click
import pytest

from hestia.cli.main import VERBS, cli, spread

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("benchmarks/*.md")])
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")
COMMAND = re.compile(r"(?:^|.*\s)hestia (?P<words>[a-z].*)")
THEIRS = ("python", "torchrun", "accelerate", "pip", "make", "git", "llama-server", "vllm")
"""Programs of others, in the text."""

ELSEWHERE = {"--only", "--budget-minutes", "--models", "--multi_gpu", "--num_processes"}
"""Options of the scripts under benchmarks/ and of launchers."""


def blocks(page: Path, language: str) -> list[str]:
    return [code for name, code in FENCE.findall(page.read_text(encoding="utf-8")) if name == language]


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as they are made for people to link to."""
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> list[list[str]]:
    """The words after every ``hestia`` in a code block."""
    found = []
    for code in (code for name in ("", "bash", "sh") for code in blocks(page, name)):
        for line in re.sub(r"\\\n\s*", " ", code).splitlines():
            told = COMMAND.fullmatch(line.partition("  #")[0].split(";")[0].strip())
            if told is not None:
                found.append(shlex.split(told["words"]))
    return found


@by_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in slugs(target), link


@by_page
def test_commands_take_the_options_that_they_are_shown_with(page: Path) -> None:
    for words in commands(page):
        assert words[0] in VERBS, words
        verb = cli.get_command(click.Context(cli), words[0])
        assert verb is not None
        typed = [word for before, word in pairwise(spread(words)) if word != "..." or before.startswith("--")]
        verb.make_context(words[0], typed)  # raises for an unknown option, and for a value of another kind


@by_page
def test_options_in_the_text_are_options_of_some_verb(page: Path) -> None:
    """The changelog and the log may speak of what once was."""
    if page.name in ("CHANGELOG.md", "log.md", "decisions.md"):
        return
    known = {option for verb in VERBS for option in options_of(verb)}
    spans = re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text(encoding="utf-8")))
    spans = [span for span in spans if span.partition(" ")[0] not in THEIRS]
    told = {word for span in spans for word in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)}
    assert told <= known | ELSEWHERE, sorted(told - known - ELSEWHERE)


def options_of(verb: str) -> list[str]:
    command = cli.get_command(click.Context(cli), verb)
    assert command is not None
    return [name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)]


@by_page
def test_python_compiles_and_finds_its_names(page: Path) -> None:
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom):  # a relative one is of a recipe's file
                module = importlib.import_module("." * node.level + (node.module or ""), "hestia.recipes")
                assert [a.name for a in node.names if not hasattr(module, a.name)] == []
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "hestia":
                assert hasattr(importlib.import_module("hestia"), node.attr), node.attr


def test_there_is_something_to_check() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 25
    assert sum(len(blocks(page, "python")) for page in PAGES) >= 2
