"""tokenizer.json as GGUF metadata: the same text must give the same ids in llama.cpp as in transformers.

llama.cpp has its own tokenizers, so a tokenizer is not copied but translated, and only where the translation is exact:

    byte-level BPE       model "gpt2": tokens, merges, and the name of a pre-tokenizer that llama.cpp implements
    BPE with byte        model "llama": tokens and scores; llama.cpp merges like SentencePiece, by the score of the
    fallback, over "▁"   merged token, so the score is minus the rank of the merge that makes the token

Why one score a token is enough. At any moment of a BPE run, two neighbours l, r were formed by merges inside the string
l+r alone, in the order in which l+r by itself would be merged. So if l+r by itself becomes one token, the only split of
it that ever occurs is the last one of that run, and its rank is the token's score. Tokens that by themselves never
become one token, and that have a split which is no merge, would be merged by llama.cpp alone: these are refused.

An added token of spaces, "▁▁" in Gemma, is a normal token in the file: merges make it of spaces in both libraries, and
llama.cpp prints the "▁" of a user-defined token as it is. (Its own converter stores such tokens with spaces and so has
them matched before merging, which cuts the longest runs in other places.)

Known and accepted differences: llama.cpp does no Unicode normalization (NFC), takes a "▁" in the text for a space, and
puts the space prefix of SentencePiece-style models behind every special token and before text that already starts with
a space.

Sources: tokenizers 0.23 (models/bpe), llama.cpp 0c1e57098 (src/llama-vocab.cpp).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import ExportError
from ..files import read_json

Kind = Literal["u32", "i32", "f32", "bool", "str", "str[]", "i32[]", "f32[]"]


@dataclass(frozen=True)
class Value:
    """One metadata value of a GGUF file and the type it is stored with."""

    kind: Kind
    value: Any


NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"

# (how text is cut before merging, ignore_merges) -> llama.cpp's name for it
_PRE_TOKENIZERS = {
    ((_GPT2,), False): "gpt-2",
    (("digits", _GPT2), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_QWEN2,), False): "qwen2",
}


def tokenizer_metadata(folder: Path, config: dict[str, Any], rows: int) -> dict[str, Value]:
    """The ``tokenizer.*`` keys of a GGUF file for the tokenizer in ``folder``.

    Args:
        folder: holds tokenizer.json, and perhaps tokenizer_config.json, generation_config.json and chat_template.jinja.
        config: the model's config.json, for special token ids that the tokenizer does not name.
        rows: rows of the embedding; ids without a token become unused ``[PAD...]`` tokens.

    Raises:
        ExportError: llama.cpp has no exact counterpart; the part of the tokenizer is named.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ExportError(
            f"{path}: no such file; a GGUF carries its tokenizer. Write it with AutoTokenizer.from_pretrained(...)"
            f".save_pretrained({str(folder)!r})"
        )
    tokenizer = read_json(path)
    settings_path = folder / "tokenizer_config.json"
    settings = read_json(settings_path) if settings_path.is_file() else {}
    model = tokenizer.get("model") or {}
    if model.get("type") == "Unigram":
        raise ExportError(
            f"{path}: a Unigram tokenizer cannot be exported to GGUF: llama.cpp's has no byte fallback; "
            "--to hf and mlx carry it as it is"
        )
    if model.get("type") != "BPE":
        raise ExportError(f"{path}: model {model.get('type')!r} cannot be exported to GGUF, only BPE can")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise ExportError(f"{path}: llama.cpp's BPE has no {option}, the tokenizer sets {model[option]!r}")

    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model.get("merges", [])]
    ranks: dict[tuple[str, ...], int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault(pair, rank)
    tokens, types = _vocabulary(path, tokenizer, rows, ranks)
    ids = {text: index for index, text in enumerate(tokens)}
    out: dict[str, Value] = {}
    if model.get("byte_fallback"):
        if model.get("ignore_merges"):
            raise ExportError(f"{path}: llama.cpp has no ignore_merges for tokenizers with byte fallback")
        missing = next((f"<0x{b:02X}>" for b in range(256) if f"<0x{b:02X}>" not in ids), None)
        if missing:
            raise ExportError(f"{path}: byte fallback needs all 256 byte tokens, {missing} is missing")
        out["tokenizer.ggml.model"] = Value("str", "llama")
        out["tokenizer.ggml.pre"] = Value("str", "default")
        out["tokenizer.ggml.tokens"] = Value("str[]", tokens)
        out["tokenizer.ggml.scores"] = Value("f32[]", _scores(path, tokens, ranks))
        out["tokenizer.ggml.token_type"] = Value("i32[]", types)
        out["tokenizer.ggml.add_space_prefix"] = Value("bool", _space_prefix(path, tokenizer, tokens, types))
    else:
        out["tokenizer.ggml.model"] = Value("str", "gpt2")
        out["tokenizer.ggml.pre"] = Value("str", _pre_tokenizer(path, tokenizer))
        out["tokenizer.ggml.tokens"] = Value("str[]", tokens)
        out["tokenizer.ggml.token_type"] = Value("i32[]", types)
        if not merges or any(" " in part for pair in merges for part in pair):
            raise ExportError(f"{path}: a byte-level BPE needs merges whose parts hold no spaces")
        out["tokenizer.ggml.merges"] = Value("str[]", [" ".join(pair) for pair in merges])

    before, after = _wrapping(path, tokenizer.get("post_processor"))
    # what the tokenizer itself adds outranks config.json, which nobody reads when text is tokenized
    hints: dict[str, Any] = {"bos": before, "eos": after}
    generation_path = folder / "generation_config.json"
    generation = read_json(generation_path) if generation_path.is_file() else {}
    for key in ("bos", "eos", "unk", "pad"):
        given = (record.get(f"{key}_token_id") for record in (config, generation))
        hints[key] = hints.get(key) or next((value for value in given if value is not None), None)
    special = {key: _special_id(path, settings.get(f"{key}_token"), hint, ids) for key, hint in hints.items()}
    for key, added, name in (("bos", before, "front"), ("eos", after, "back")):
        if added not in ([], [special[key]]):
            raise ExportError(
                f"{path}: the post_processor puts tokens {added} in {name} of every text; llama.cpp can put only the "
                f"{key} token ({special[key]}) there"
            )
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (special_id := special[key]) is not None:
            out[f"tokenizer.ggml.{name}_token_id"] = Value("u32", special_id)
    out["tokenizer.ggml.add_bos_token"] = Value("bool", bool(before))
    out["tokenizer.ggml.add_eos_token"] = Value("bool", bool(after))
    out.update(_chat_templates(folder, settings))
    return out


def _vocabulary(
    path: Path, tokenizer: dict[str, Any], rows: int, ranks: dict[tuple[str, ...], int]
) -> tuple[list[str], list[int]]:
    """Text and type of every token id, ``rows`` of each."""
    model = tokenizer["model"]
    entries: dict[int, tuple[str, int]] = {}
    for text, index in model["vocab"].items():
        is_byte = bool(model.get("byte_fallback")) and len(text) == 6 and text.startswith("<0x") and text[-1] == ">"
        kind = BYTE if is_byte else NORMAL
        entries[index] = (text, kind)
    for added in tokenizer.get("added_tokens", []):
        for option in ("lstrip", "rstrip", "single_word"):
            if added.get(option):
                raise ExportError(f"{path}: llama.cpp has no {option} for the added token {added['content']!r}")
        if model.get("byte_fallback") and added.get("normalized") and not added.get("special"):
            raise ExportError(
                f"{path}: the added token {added['content']!r} is matched after normalization, which llama.cpp does "
                "not do; add it with normalized=False"
            )
        kind = CONTROL if added.get("special") else USER_DEFINED
        if kind == USER_DEFINED and model.get("byte_fallback") and "▁" in added["content"]:
            if added["content"] not in model["vocab"] or _completing_rank(added["content"], ranks) is None:
                raise ExportError(
                    f"{path}: no merges make the added token {added['content']!r}, and llama.cpp would print its '▁', "
                    "which transformers prints as a space"
                )
            kind = NORMAL
        entries[added["id"]] = (added["content"], kind)
    unknown = model.get("unk_token")
    if unknown is not None and model.get("byte_fallback") and unknown in model["vocab"]:
        entries[model["vocab"][unknown]] = (unknown, UNKNOWN)
    if entries and max(entries) >= rows:
        raise ExportError(
            f"{path}: token {entries[max(entries)][0]!r} has id {max(entries)}, the embedding has {rows} rows; resize "
            "the embedding before training"
        )
    filled = [entries.get(index, (f"[PAD{index}]", UNUSED)) for index in range(rows)]
    tokens, types = [text for text, _ in filled], [kind for _, kind in filled]
    seen: set[str] = set()
    for text in tokens:
        if text in seen:
            raise ExportError(f"{path}: two ids share the text {text!r}, which llama.cpp does not allow")
        seen.add(text)
    if "" in tokens:
        raise ExportError(f"{path}: token {tokens.index('')} is empty, which llama.cpp does not allow")
    return tokens, types


def _scores(path: Path, tokens: list[str], ranks: dict[tuple[str, ...], int]) -> list[float]:
    """Minus the rank of the merge that completes each token, 0 for tokens that no merge makes."""
    known = set(tokens)
    scores: list[float] = []
    for token in tokens:
        rank = _completing_rank(token, ranks)
        if rank is None and len(token) > 1:
            splits = ((token[:i], token[i:]) for i in range(1, len(token)))
            # llama.cpp begins with characters, whether they are tokens or not, and looks the joined text up
            foreign = next((s for s in splits if all(p in known or len(p) == 1 for p in s) and s not in ranks), None)
            if foreign is not None:
                raise ExportError(
                    f"{path}: the merges never make the token {token!r}, but llama.cpp would, from "
                    f"{foreign[0]!r} + {foreign[1]!r}; this tokenizer cannot be exported to GGUF exactly"
                )
        scores.append(0.0 if rank is None else float(-rank))
    return scores


def _completing_rank(token: str, ranks: dict[tuple[str, ...], int]) -> int | None:
    """Rank of the last merge when ``token`` alone is merged into itself; None if it does not become one piece."""
    pieces = list(token)
    last = None
    while len(pieces) > 1:
        found = [(ranks[pair], i) for i in range(len(pieces) - 1) if (pair := (pieces[i], pieces[i + 1])) in ranks]
        if not found:
            return None
        last, i = min(found)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return last


def _parts(component: dict[str, Any] | None, inner: str) -> Iterator[dict[str, Any]]:
    """The elements of a Sequence, flattened; a single component is a sequence of one."""
    if component is None:
        return
    if component.get("type") == "Sequence":
        for part in component[inner]:
            yield from _parts(part, inner)
    else:
        yield component


def _space_prefix(path: Path, tokenizer: dict[str, Any], tokens: list[str], types: list[int]) -> bool:
    """Whether text gets a leading space before it is cut, for a SentencePiece-style tokenizer."""
    prefix = replaced = False
    for part in _parts(tokenizer.get("normalizer"), "normalizers"):
        if part["type"] == "Prepend" and part["prepend"] == "▁" and not replaced:
            prefix = True
        elif part["type"] == "Replace" and part["pattern"] == {"String": " "} and part["content"] == "▁":
            replaced = True
        else:
            raise ExportError(f"{path}: llama.cpp has no counterpart of the normalizer {part}")
    for part in _parts(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        if part["type"] == "Metaspace" and part["replacement"] == "▁" and not replaced:
            prefix, replaced = part.get("prepend_scheme", "always") != "never", True
            inner = next((t for t, k in zip(tokens, types, strict=True) if k == NORMAL and "▁" in t[1:]), None)
            if part.get("split", True) and inner is not None:
                raise ExportError(f"{path}: the pre_tokenizer cuts at spaces, llama.cpp would still make {inner!r}")
        elif not (part["type"] == "Split" and part["pattern"] == {"String": " "} and replaced):
            raise ExportError(f"{path}: llama.cpp has no counterpart of the pre_tokenizer {part}")
    if not replaced:
        raise ExportError(f"{path}: llama.cpp writes spaces as '▁' in tokenizers with byte fallback, this one does not")
    return prefix


def _pre_tokenizer(path: Path, tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name for the way a byte-level tokenizer cuts text into words."""
    for part in _parts(tokenizer.get("normalizer"), "normalizers"):
        if part["type"] != "NFC":
            raise ExportError(f"{path}: llama.cpp has no counterpart of the normalizer {part}")
    cuts: list[str] = []
    byte_level = False
    for part in _parts(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        if part["type"] == "ByteLevel" and not byte_level:
            byte_level = True
            if part.get("add_prefix_space"):
                raise ExportError(f"{path}: llama.cpp has no add_prefix_space for byte-level tokenizers")
            if part.get("use_regex", True):
                cuts.append(_GPT2)
        elif part["type"] == "Digits" and part.get("individual_digits"):
            cuts.append("digits")
        elif part["type"] == "Split" and part.get("behavior") == "Isolated" and "Regex" in part["pattern"]:
            cuts.append(part["pattern"]["Regex"])
        else:
            raise ExportError(f"{path}: llama.cpp has no counterpart of the pre_tokenizer {part}")
    name = _PRE_TOKENIZERS.get((tuple(cuts), bool(tokenizer["model"].get("ignore_merges"))))
    if name is None or not byte_level:
        raise ExportError(
            f"{path}: hestia knows no llama.cpp name for this pre_tokenizer: cuts {cuts}, "
            f"ignore_merges {bool(tokenizer['model'].get('ignore_merges'))}, bytes {byte_level}; known names: "
            f"{', '.join(sorted(_PRE_TOKENIZERS.values()))}"
        )
    return name


def _wrapping(path: Path, processor: dict[str, Any] | None) -> tuple[list[int], list[int]]:
    """Token ids put before and behind a single text."""
    before: list[int] = []
    after: list[int] = []
    for part in _parts(processor, "processors"):
        if part["type"] == "ByteLevel":
            continue
        if part["type"] != "TemplateProcessing":
            raise ExportError(f"{path}: llama.cpp has no counterpart of the post_processor {part['type']}")
        side = before
        for element in part["single"]:
            if "Sequence" in element:
                side = after
            else:
                side.extend(part["special_tokens"][element["SpecialToken"]["id"]]["ids"])
    return before, after


def _special_id(path: Path, token: Any, fallback: Any, ids: dict[str, int]) -> int | None:
    """Id of a special token: by its text in tokenizer_config.json, else by config.json (the first of a list)."""
    text = token.get("content") if isinstance(token, dict) else token
    if isinstance(text, str):
        if text not in ids:
            raise ExportError(f"{path}: the special token {text!r} of tokenizer_config.json is not in the vocabulary")
        return ids[text]
    first = fallback[0] if isinstance(fallback, list) and fallback else fallback
    return first if isinstance(first, int) and 0 <= first < len(ids) else None


def _chat_templates(folder: Path, settings: dict[str, Any]) -> dict[str, Value]:
    """``tokenizer.chat_template``, byte for byte; named ones beside the default get keys of their own.

    Files outrank tokenizer_config.json, as in transformers.
    """
    files = {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    file = folder / "chat_template.jinja"
    if file.is_file():
        files = {"default": file, **files}
    named = {name: file.read_bytes().decode() for name, file in files.items()}
    if not named:
        template: Any = settings.get("chat_template") or []
        entries = [{"name": "default", "template": template}] if isinstance(template, str) else template
        named = {entry["name"]: entry["template"] for entry in entries}
    default = named.pop("default", None)
    out = {f"tokenizer.chat_template.{name}": Value("str", text) for name, text in named.items()}
    if out:
        out["tokenizer.chat_templates"] = Value("str[]", list(named))
    if default:
        out["tokenizer.chat_template"] = Value("str", default)
    return out
