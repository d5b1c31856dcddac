"""RUN/README.md: the model card, in Markdown with the YAML front matter of the Hugging Face hub.

The front matter is written by a YAML library, never by a template. In the body every string of the run passes
``plain`` (Markdown and HTML lose their meaning) unless a filter says it is code; Jinja's ``finalize`` sees to it.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from ..files import write_text
from . import wording
from .exports import Export
from .html import flat
from .records import RunRecord
from .tables import headline_rows

MODEL_CARD = "README.md"
_VERSIONS = ("hestia-lm", "torch", "transformers")
# An absolute path as a whole value or word of a command, and as a document's place, in brackets, in a sentence.
_PATH = re.compile(r"\A(-[\w-]+=|)(/.*)\Z", re.DOTALL)
_PLACE = re.compile(r"(\()(/[^()]*)")
# What means something anywhere in a line (an underscore inside a word does not), and at its start.
_MARKS = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")
_OPENING = re.compile(r"^(\d+(?=[.)](?:\s|$))|(?=[#+=-]))(.)")


def write_model_card(run: Path) -> Path:
    """Write ``RUN/README.md`` from the run's artefacts and return its path.

    Raises:
        ConfigError: the run holds no valid report.json, or another artefact is damaged.
    """
    card = run / MODEL_CARD
    write_text(card, render(RunRecord.load(run)))
    return card


def render(record: RunRecord) -> str:
    """The card as text."""
    environment = Environment(  # no autoescape: that is for HTML; `finalize` escapes Markdown
        loader=PackageLoader("hestia.report"),
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    formats = ("fixed", "significant", "perplexity", "bits", "percent", "rate", "size", "whole", "duration")
    environment.filters.update({name: getattr(wording, name) for name in formats}, code=code, fenced=fenced)
    body = environment.get_template("README.md.jinja").render(
        record=record,
        title=f"{record.model or record.name}, {wording.grid_name(record)}",
        verdict=wording.verdict(record),
        rows=headline_rows(record),
        exports=[(export, _loading(export)) for export in record.exports],
        command=shlex.join(_PATH.sub(_last_name, word) for word in record.command),
        data=_public(flat(record.data)),
        versions=[pair for pair in flat(record.versions) if pair[0] in _VERSIONS],
    )
    return f"---\n{front_matter(record)}---\n\n{body}"


def front_matter(record: RunRecord) -> str:
    """The hub's metadata as YAML: ``base_model``, ``library_name``, ``license`` where it is known, ``tags``."""
    containers = list(dict.fromkeys(export.target.split(":")[0] for export in record.exports))
    entries: dict[str, Any] = {}
    if record.model:
        entries |= {"base_model": record.model, "base_model_relation": "quantized"}
    if record.license:
        entries["license"] = record.license
    entries["library_name"] = "transformers" if "hf" in containers or not containers else containers[0]
    entries["pipeline_tag"] = "text-generation"
    formats = [c for c in containers if c != "hf"] + (["compressed-tensors"] if "hf" in containers else [])
    entries["tags"] = ["hestia", "quantized", wording.grid_name(record), *formats]
    # One line each: readers of front matter look for the next line of three dashes.
    entries = {key: " ".join(value.split()) if isinstance(value, str) else value for key, value in entries.items()}
    return yaml.safe_dump(entries, sort_keys=False, allow_unicode=True, width=math.inf)


def plain(text: str) -> str:
    r"""``text`` on one line, with everything that Markdown or HTML would interpret made literal.

    >>> plain("a_b _c_ <i> | `d`")
    'a_b \\_c\\_ &lt;i&gt; \\| \\`d\\`'
    >>> plain("# no heading"), plain("1. no list")
    ('\\# no heading', '1\\. no list')
    """
    line = " ".join(text.split())
    line = _OPENING.sub(r"\1\\\2", _MARKS.sub(r"\\\g<0>", line.replace("&", "&amp;")))
    # A bare address would become a link, which the run never asked for.
    return line.replace("<", "&lt;").replace(">", "&gt;").replace("://", "&#58;//")


def _public(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Known values only, and of absolute paths the last part: a card is published, the author's folders are not."""
    return [
        (key, _PLACE.sub(_last_name, _PATH.sub(_last_name, value))) for key, value in pairs if value != wording.UNKNOWN
    ]


def _last_name(found: re.Match[str]) -> str:
    return found[1] + Path(found[2]).name


class _Ready(str):
    """Markdown that needs no escaping any more."""


def code(text: str) -> _Ready:
    """``text`` as a code span, fenced by more backticks than it holds; usable in a table."""
    line = " ".join(text.split()).replace("|", "\\|") or " "
    fence = "`" * (1 + _longest_run(line))
    pad = " " if "`" in line else ""
    return _Ready(f"{fence}{pad}{line}{pad}{fence}")


def fenced(text: str, language: str = "") -> _Ready:
    """``text`` as a code block, fenced by more backticks than it holds."""
    fence = "`" * max(3, 1 + _longest_run(text))
    return _Ready(f"{fence}{language}\n{text}\n{fence}")


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def _finalize(value: Any) -> Any:
    return plain(value) if isinstance(value, str) and not isinstance(value, _Ready) else value


def _loading(export: Export) -> list[tuple[str, str, str]]:
    """(what it needs, language, commands) for every engine that loads the export."""
    path = export.path
    if export.target in ("hf", "hf:int4"):
        quoted = json.dumps(path, ensure_ascii=False)
        needs = "transformers with the compressed-tensors package; no remote code"
        lines = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"model = AutoModelForCausalLM.from_pretrained({quoted})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({quoted})"
        )
        served = shlex.join(["vllm", "serve", path])
        four = [("vLLM or another server without a 2-bit kernel", "sh", served)] if export.target == "hf:int4" else []
        return [(needs, "python", lines), *four]
    if export.target == "mlx":
        return [("mlx-lm", "sh", shlex.join(["mlx_lm.generate", "--model", path, "--prompt", "Once upon a time"]))]
    if export.target.startswith("gguf:"):
        needs = "llama.cpp"
        if export.target == "gguf:q2_0" or "Q2_0" in export.types:
            needs += ", a build that knows the type Q2_0 (pull request 24448, 2026)"
        llama = shlex.join(["llama-cli", "-m", path, "-p", "Once upon a time", "-n", "64"])
        ours = shlex.join(["hestia", "run", path, "--prompt", "Once upon a time"])
        return [(needs, "sh", llama), ("hestia with its run extra", "sh", ours)]
    return []
