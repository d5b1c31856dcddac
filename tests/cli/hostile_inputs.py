"""Hostile and broken inputs: each a function that damages a copy of good ones and returns a command to refuse it.

``CASES`` has more than 700 of them. A case says which exit statuses are right: 2 for most; 0 too where a flipped byte
may happen to mean the same, or means another but possible model; 3 where the damaged file claims to be an export.
"""

from __future__ import annotations

import gzip
import json
import lzma
import os
import random
import shutil
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Arguments = list[str | Path]


@dataclass(frozen=True)
class Good:
    """Good inputs, to be copied and damaged.

    Attributes:
        folder: an empty folder of this case's own.
        parent: a model folder. Read only.
        text: a .txt of stories. Read only.
        run: a finished run of both. Read only.
    """

    folder: Path
    parent: Path
    text: Path
    run: Path

    def model(self) -> Path:
        """A copy of the model that may be damaged."""
        return Path(shutil.copytree(self.parent, self.folder / "model"))

    def copied_run(self) -> Path:
        """A copy of the run that may be damaged."""
        return Path(shutil.copytree(self.run, self.folder / "copy"))

    # --- commands ----------------------------------------------------------------------------------------------------

    def plan(self, model: Path, *more: str | Path) -> Arguments:
        """Reads config.json alone."""
        return ["plan", model, "--out", self.folder / "plan.json", *more]

    def evaluate(self, model: Path, data: str | Path | None = None, *more: str | Path) -> Arguments:
        """Reads config.json, tokenizer, weights and text."""
        words: Arguments = ["eval", model, "--data", data or self.text]
        return [*words, "--seq-len", "32", "--eval-tokens", "64", "--threads", "1", *more]

    def train(self, plan: Path) -> Arguments:
        """Reads a plan."""
        words: Arguments = ["train", self.parent, "--plan", plan, "--data", self.text, "--out", self.folder / "run"]
        return [*words, "--steps", "1", "--seq-len", "32", "--batch-size", "1", "--lr", "1e-3", "--threads", "1"]

    def quantize(self, *more: str | Path, data: str | Path | None = None) -> Arguments:
        """The main job, as short as it can be."""
        words: Arguments = ["quantize", self.parent, "--data", data or self.text, "--out", self.folder / "run"]
        words += ["--steps", "1", "--seq-len", "32", "--batch-size", "1", "--lr", "1e-3", "--threads", "1"]
        return [*words, "--calibrate", "0", *more]


@dataclass(frozen=True)
class Case:
    """One hostile input.

    Attributes:
        name: of the test.
        make: damages copies of good inputs and returns the command line that meets the damage.
        statuses: exit statuses that are right.
        says: words that the message must hold, where it is refused.
    """

    name: str
    make: Callable[[Good], Arguments]
    statuses: tuple[int, ...] = (2,)
    says: str = ""


def flipped(content: bytes, where: int, bit: int) -> bytes:
    """``content`` with one bit turned."""
    out = bytearray(content)
    out[where] ^= 1 << bit
    return bytes(out)


# --- weights ---------------------------------------------------------------------------------------------------------


def _weights(change: Callable[[bytes], bytes]) -> Callable[[Good], Arguments]:
    def make(good: Good) -> Arguments:
        model = good.model()
        path = model / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))
        return good.evaluate(model)

    return make


def _header(record: dict[str, Any] | bytes, body: int = 64) -> Callable[[Good], Arguments]:
    text = record if isinstance(record, bytes) else json.dumps(record).encode()
    return _weights(lambda _: struct.pack("<Q", len(text)) + text + bytes(body))


def _tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Good], Arguments]:
    def make(good: Good) -> Arguments:
        model = good.model()
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        return good.evaluate(model)

    return make


UP = "model.layers.1.mlp.up_proj.weight"


def weights() -> Iterator[Case]:
    """Truncated, bit-flipped and made-up safetensors."""
    for kept in (0, 1, 7, 8, 9, 64, 500, 2000, 4096, 20_000, -4096, -2, -1):
        yield Case(f"weights cut at {kept}", _weights(lambda c, k=kept: c[:k]), says="damaged or truncated")
    draw = random.Random(6)
    for number in range(30):
        place, bit = draw.randrange(2600), draw.randrange(8)
        yield Case(f"header bit {number}", _weights(lambda c, p=place, b=bit: flipped(c, p, b)), (0, 2))
    for number in range(6):
        share, bit = draw.random(), draw.randrange(8)

        def body(content: bytes, s: float = share, b: int = bit) -> bytes:
            return flipped(content, 4096 + int(s * (len(content) - 4097)), b)

        yield Case(f"weight bit {number}", _weights(body), (0, 2))
    dtype = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}
    yield Case("weights header of 2**63 bytes", _weights(lambda c: struct.pack("<Q", 1 << 63) + c[8:]))
    yield Case("weights header of 99 MB that is not there", _weights(lambda c: struct.pack("<Q", 99_000_000) + c[8:]))
    yield Case("weights header is not JSON", _header(b"\x00" * 64))
    yield Case("weights header is deep JSON", _header(b'{"a":' * 20_000 + b"1" + b"}" * 20_000))
    yield Case("weights of nothing", _header({}))
    yield Case("weights of another model", _header({"x": dtype}), says="lacks")
    yield Case("weights beyond the file", _header({"x": {**dtype, "data_offsets": [0, 1 << 40]}}))
    yield Case("weights with a negative size", _header({"x": {**dtype, "shape": [-1]}}))
    yield Case("weights of 2**62 numbers", _header({"x": {**dtype, "shape": [1 << 31, 1 << 31]}}))
    yield Case("weights of an unknown type", _header({"x": {**dtype, "dtype": "F33"}}))
    yield Case("weights that overlap", _header({"x": dtype, "y": dtype}))
    yield Case("weights with a path for a name", _header({"../../etc/passwd": dtype}))
    yield Case("weights with HTML for a name", _header({"<script>alert(1)</script>": dtype}))
    yield Case("weights zipped", _weights(gzip.compress))
    yield Case("weights are a pickle", _weights(lambda c: b"\x80\x04cos\nsystem\n(S'true'\ntR."))
    yield Case("a weight is NaN", _tensors(lambda t: t[UP].view(-1)[3:4].fill_(torch.nan)), says=UP)
    yield Case("a weight is infinite", _tensors(lambda t: t[UP].view(-1)[3:4].fill_(torch.inf)), says=UP)
    yield Case("a weight is missing", _tensors(lambda t: t.pop(UP)), says="lacks")
    yield Case("a weight is transposed", _tensors(lambda t: t.update({UP: t[UP].T.contiguous()})), says="shape")
    yield Case("a weight has no rows", _tensors(lambda t: t.update({UP: t[UP][:0].clone()})), says="shape")
    yield Case("a weight is text", _tensors(lambda t: t.update({UP: torch.zeros(128, 64, dtype=torch.uint8)})), (0, 2))
    yield Case("a weight too many", _tensors(lambda t: t.update({"x.y": torch.zeros(3)})), (0, 2))

    def index(content: str) -> Callable[[Good], Arguments]:
        def make(good: Good) -> Arguments:
            model = good.model()
            (model / "model.safetensors.index.json").write_text(content, encoding="utf-8")
            return good.evaluate(model)

        return make

    for number, content in enumerate(
        ("{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": ["b"]}}',
         '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {"a": "/etc/passwd"}}', "[" * 100_000)
    ):  # fmt: skip
        yield Case(f"index {number}", index(content))

    def pickled(good: Good) -> Arguments:
        model = good.model()
        (model / "model.safetensors").rename(model / "pytorch_model.bin")
        return good.evaluate(model)

    yield Case("weights only as .bin", pickled, says="pickled weights can run code")


# --- config.json -----------------------------------------------------------------------------------------------------


def _config(verb: str = "plan", **values: Any) -> Callable[[Good], Arguments]:
    def make(good: Good) -> Arguments:
        model = good.model()
        path = model / "config.json"
        record = {**json.loads(path.read_text(encoding="utf-8")), **values}
        path.write_text(json.dumps(record), encoding="utf-8")
        return good.plan(model) if verb == "plan" else good.evaluate(model)

    return make


def _file(name: str, content: bytes, verb: str = "evaluate") -> Callable[[Good], Arguments]:
    def make(good: Good) -> Arguments:
        model = good.model()
        (model / name).write_bytes(content)
        return good.plan(model) if verb == "plan" else good.evaluate(model)

    return make


NUMBERS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings",
)  # fmt: skip
"""The sizes in config.json."""


def configs() -> Iterator[Case]:
    """config.json with absurd sizes, wrong types and damage."""
    for name in NUMBERS:
        for value in (0, -1, 10**12, 10**30, "64", 1.5, None, [], {"a": 1}, True):
            # A few of these mean something to transformers (null, text that is a number); most do not.
            may = (0, 2) if value in ("64", None, True) or name == "max_position_embeddings" else (2,)
            yield Case(f"config {name} {value!r}", _config(**{name: value}), may)
    for name in ("num_hidden_layers", "hidden_size", "vocab_size"):
        yield Case(f"weights for config {name} 10**12", _config("evaluate", **{name: 10**12}))
        yield Case(f"weights for config {name} 100000", _config("evaluate", **{name: 100_000}))
    for name, value in (
        ("model_type", "llamma"), ("model_type", 3), ("model_type", None), ("model_type", "../llama"),
        ("model_type", "<b>llama</b>"), ("architectures", 7), ("architectures", ["Nothing"]),
        ("hidden_act", "os.system"), ("hidden_act", 5), ("rms_norm_eps", "x"), ("rms_norm_eps", -1),
        ("rope_parameters", "x"), ("rope_parameters", {"rope_type": "evil"}), ("rope_parameters", {"rope_theta": "x"}),
        ("rope_scaling", {"type": "evil", "factor": "x"}), ("torch_dtype", "float4711"), ("dtype", "float4711"),
        ("dtype", "import os"), ("head_dim", 0), ("head_dim", 10**12), ("head_dim", 7), ("attention_bias", "maybe"),
        ("tie_word_embeddings", "x"), ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ("quantization_config", {"quant_method": "evil"}), ("quantization_config", 3),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}), ("pad_token_id", 10**9), ("pad_token_id", "x"),
        ("bos_token_id", "x"), ("layer_types", ["evil", "evil"]), ("pretraining_tp", 0), ("initializer_range", "x"),
        ("transformers_version", 7), ("text_config", {}), ("id2label", "x"), ("num_labels", 10**12),
        ("attn_implementation", "evil/kernel"), ("_attn_implementation", "evil/kernel"),
        ("experts_implementation", "x"), ("auto_map", 7), ("auto_map", {"AutoConfig": 7}), ("auto_map", ["x"]),
    ):  # fmt: skip
        yield Case(f"config {name} {str(value)[:40]}", _config("evaluate", **{name: value}), (0, 2))
    for number, content in enumerate(
        (b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe{}", b"\x00" * 100, b'{"model_type": "llama", ', b'"x"', b"7",
         b"[" * 100_000, b'{"a":' * 100_000, b'{"hidden_size": ' + b"9" * 10_000 + b"}", b'{"model_type": NaN}')
    ):  # fmt: skip
        yield Case(f"config text {number}", _file("config.json", content, "plan"))


# --- code in the model folder ----------------------------------------------------------------------------------------


def code() -> Iterator[Case]:
    """auto_map, chat templates, adapters: whatever would like to be run. None may leave the mark it tries to leave."""

    def mark(good: Good) -> str:
        return f"open({str(good.folder / 'WAS RUN')!r}, 'w').close()\nclass C: pass\nclass M: pass\nclass T: pass\n"

    def own_code(known: bool, verb: str) -> Callable[[Good], Arguments]:
        def make(good: Good) -> Arguments:
            model = good.model()
            for name in ("evil.py", "modeling_llama.py", "configuration_llama.py", "tokenization_llama.py"):
                (model / name).write_text(mark(good), encoding="utf-8")
            for name, classes in (
                ("config.json", {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}),
                ("tokenizer_config.json", {"AutoTokenizer": ["evil.T", "evil.T"]}),
            ):
                record = json.loads((model / name).read_text(encoding="utf-8"))
                record |= {"auto_map": classes} if known else {"auto_map": classes, "model_type": "evil"}
                (model / name).write_text(json.dumps(record), encoding="utf-8")
            return good.plan(model) if verb == "plan" else good.evaluate(model)

        return make

    for verb in ("plan", "evaluate"):
        yield Case(f"auto_map of a known architecture, {verb}", own_code(True, verb), (0,))
        yield Case(f"auto_map of an unknown one, {verb}", own_code(False, verb), says="--trust-remote-code")

    def template(text: str) -> Callable[[Good], Arguments]:
        def make(good: Good) -> Arguments:
            model = good.model()
            (model / "chat_template.jinja").write_text(text.replace("MARK", str(good.folder / "WAS RUN")), "utf-8")
            data = good.folder / "chats.jsonl"
            turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "saw a ball " * 20}]
            data.write_text((json.dumps({"messages": turns}) + "\n") * 20, encoding="utf-8")
            return good.evaluate(model, data)

        return make

    for number, text in enumerate(
        (
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
            "{{ self.__init__.__globals__.__builtins__.__import__('os').system('touch MARK') }}",
            "{% for x in ().__class__.__base__.__subclasses__() %}{{ x.__name__ }}{% endfor %}",
            "{{ lipsum.__globals__['os'].popen('touch MARK').read() }}",
            "{{ messages.append(1) }}",
            "{{ messages.__class__ }}",
            "{% include '/etc/passwd' %}",
            "{% import 'os' as os %}{{ os }}",
            "{{ 1 / 0 }}",
            "{{ range(10 ** 9) | list | length }}",
            "{% for i in range(10 ** 9) %}x{% endfor %}",
            "{{ 'a' * 10 ** 15 }}",
            "{{ ('%' ~ 10 ** 15 ~ 'd') % 1 }}",
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "{{ undefined.thing }}",
            "{% if %}",
            "{{ raise_exception('no') }}",
            "{{ messages[7].content }}",
            "{{ strftime_now('%Y') }}",
            "{{ '\x00' }}",
            "{{ messages | tojson(indent=10 ** 12) }}",
            "{{ '{0.__class__}'.format(messages) }}",
            "",
        )
    ):
        yield Case(f"chat template {number}", template(text), (0, 2))

    def adapter(good: Good) -> Arguments:
        model = good.model()
        record = {"peft_type": "LORA", "base_model_name_or_path": "nobody/nothing", "auto_mapping": {"x": "evil"}}
        (model / "adapter_config.json").write_text(json.dumps(record), encoding="utf-8")
        (model / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
        return good.evaluate(model)

    yield Case("an adapter in the folder", adapter, (0, 2))
    for name in ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        for number, content in enumerate((b"{", b"[]", b"7", b"\xff", b"[" * 100_000, b'{"a": {}}')):
            yield Case(f"{name} {number}", _file(name, content), (0, 2))


# --- tokenizer -------------------------------------------------------------------------------------------------------


def _tokenizer(change: Callable[[dict[str, Any]], Any]) -> Callable[[Good], Arguments]:
    def make(good: Good) -> Arguments:
        model = good.model()
        path = model / "tokenizer.json"
        record = json.loads(path.read_text(encoding="utf-8"))
        change(record)
        path.write_text(json.dumps(record), encoding="utf-8")
        return good.evaluate(model)

    return make


def tokenizers() -> Iterator[Case]:
    """Tokenizers that are damaged, or another model's."""
    for number, content in enumerate((b"", b"{", b"[]", b"{}", b"null", b"\xff\xfe", b"[" * 100_000, b'{"model": {}}')):
        yield Case(f"tokenizer text {number}", _file("tokenizer.json", content))
    yield Case(
        "token ids beyond the vocabulary",
        _tokenizer(lambda r: r["model"]["vocab"].update({k: v + 300 for k, v in r["model"]["vocab"].items()})),
    )

    def ids(value: Any) -> Callable[[Good], Arguments]:
        return _tokenizer(lambda r: r["model"]["vocab"].update({"a": value}))

    yield Case("a token id of 10**9", ids(10**9), says="token id 1000000000")
    yield Case("a token id of 2**31", ids(2**31))
    yield Case("a token id of 2**70", ids(2**70))
    yield Case("a negative token id", ids(-1))
    yield Case("a token id that is text", ids("x"))
    yield Case("no merges", _tokenizer(lambda r: r["model"].update({"merges": []})), (0, 2))
    yield Case("merges of unknown tokens", _tokenizer(lambda r: r["model"].update({"merges": [["€", "¥"]]})))
    yield Case("merges that are numbers", _tokenizer(lambda r: r["model"].update({"merges": [1, 2]})))
    yield Case("an unknown model", _tokenizer(lambda r: r["model"].update({"type": "Evil"})))
    yield Case("an unknown decoder", _tokenizer(lambda r: r.update({"decoder": {"type": "Evil"}})))
    yield Case("a hopeless pattern", _tokenizer(lambda r: r.update({
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
    })))  # fmt: skip
    yield Case("a special token beyond the vocabulary", _tokenizer(lambda r: r["added_tokens"].append({
        "id": 10**6, "content": "the cat", "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": False, "special": True,
    })), says="token id")  # fmt: skip
    for name, value in (
        ("tokenizer_class", "Evil"), ("tokenizer_class", 7), ("tokenizer_class", "../x"), ("bos_token", 7),
        ("bos_token", {"a": 1}), ("bos_token", "<nowhere>"), ("eos_token", "<script>"), ("model_max_length", "x"),
        ("chat_template", 7), ("chat_template", [{"name": "x"}]), ("added_tokens_decoder", {"x": 1}),
        ("added_tokens_decoder", {"5": {"content": 7}}), ("tokenizer_class", "TransfoXLTokenizer"),
        ("tokenizer_class", "RagTokenizer"), ("tokenizer_class", "T5Tokenizer"), ("tokenizer_file", "/etc/passwd"),
        ("extra_special_tokens", 3), ("backend", "evil"), ("tokenizer_object", "x"),
    ):  # fmt: skip

        def make(good: Good, key: str = name, content: Any = value) -> Arguments:
            model = good.model()
            path = model / "tokenizer_config.json"
            record = {**json.loads(path.read_text(encoding="utf-8")), key: content}
            path.write_text(json.dumps(record), encoding="utf-8")
            return good.evaluate(model)

        yield Case(f"tokenizer_config {name} {str(value)[:30]}", make, (0, 2))


# --- text ------------------------------------------------------------------------------------------------------------


def _data(name: str, content: bytes) -> Callable[[Good], Arguments]:
    def make(good: Good) -> Arguments:
        path = good.folder / name
        path.write_bytes(content)
        return good.evaluate(good.parent, path)

    return make


def data() -> Iterator[Case]:
    """Text that is none: bad bytes, bombs, endless streams, empty documents, tables of something else."""
    story = b"the cat saw a ball. " * 40
    draw = random.Random(7)
    for number in range(8):
        bad = bytes([draw.randrange(0x80, 0xC0)])
        at = draw.randrange(len(story))
        content = story[:at] + bad + story[at:]
        yield Case(f"text bad byte {number}", _data("a.txt", content), says="not UTF-8")
    for name, text in (
        ("surrogate", b"\xed\xa0\x80"),
        ("overlong", b"\xc0\xaf"),
        ("beyond Unicode", b"\xf4\x90\x80\x80"),
    ):
        yield Case(f"text with a {name}", _data("a.txt", story + text), says="not UTF-8")
    for number, content in enumerate((b"\x00", story + b"\x00", b"\x00" * 4096, story.decode().encode("utf-16"))):
        yield Case(f"text with NUL {number}", _data("a.txt", content))
    for number, content in enumerate((b"", b"\n", b" \n\t\r\n" * 50, b"<|endofstory|>\n" * 50, b"\xef\xbb\xbf", b"a")):
        yield Case(f"text of nothing {number}", _data("a.txt", content))
    for name, content in (
        ("a.txt.gz", b"not an archive"), ("a.txt.xz", b"not an archive"),
        ("a.txt.gz", gzip.compress(story, mtime=0)[:-9]),
        ("a.txt.xz", lzma.compress(story)[:-9]), ("a.txt.gz", gzip.compress(story, mtime=0)[:12]), ("a.txt.gz", b""),
        ("a.txt.gz", flipped(gzip.compress(story, mtime=0), 25, 3)), ("a.txt.xz", flipped(lzma.compress(story), 40, 3)),
        ("a.parquet", b"PAR1"), ("a.parquet", b"PAR1" * 100), ("a.parquet", b""), ("a.parquet", story),
        ("a.csv", story), ("a.pkl", b"\x80\x04N."), ("a", story), ("a.txt.bz2", story),
    ):  # fmt: skip
        yield Case(f"{name} of {content[:12].hex()} {len(content)}", _data(name, content))
    yield Case("a gzip bomb", _data("bomb.txt.gz", gzip.compress(bytes(10) + b"a\n" * (40 << 20), 9)))
    yield Case("an xz bomb", _data("bomb.txt.xz", lzma.compress(b"the cat saw a ball.\n" * (8 << 20), preset=1)))
    yield Case("one endless line in a gzip", _data("line.txt.gz", gzip.compress(b"a" * (100 << 20), 1)))
    for number, line in enumerate(
        (
            "{", "[]", "7", "null", '"x"', "{}", '{"text": 7}', '{"text": null}', '{"text": ["a"]}', '{"text": ""}',
            '{"text": "a\\u0000b"}', '{"text": "\\ud800"}', '{"texts": "a"}', '{"messages": []}', '{"messages": 7}',
            '{"messages": [7]}', '{"messages": [{}]}', '{"messages": [{"role": 7}]}', '{"text": NaN}',
            '{"messages": [{"role": "user", "content": "hi"}]}', '{"text": "a"', "[" * 50_000,
            '{"text": ' + "9" * 5000 + "}", '{"messages": [{"role": "assistant", "content": {"a": 1}}]}',
        )
    ):  # fmt: skip
        yield Case(f"jsonl {number}", _data("a.jsonl", line.encode() + b"\n"))

    def long_line(good: Good) -> Arguments:
        path = good.folder / "long.txt"
        with open(path, "wb") as handle:
            for _ in range(100):
                handle.write(b"abcd" * (1 << 18))
        return good.evaluate(good.parent, path)

    yield Case("one line of 100 MB", long_line, says="line 1")

    def special(kind: str, where: str) -> Callable[[Good], Arguments]:
        def make(good: Good) -> Arguments:
            path = good.folder / {"data": "a.txt", "saved": "state.json"}.get(where, f"a.{where}")
            if kind == "fifo":
                os.mkfifo(path)
            elif kind == "socket":
                here = Path.cwd()
                os.chdir(good.folder)  # a socket's path may have 107 bytes only
                with socket.socket(socket.AF_UNIX) as made:
                    made.bind(path.name)
                os.chdir(here)
            elif kind == "loop":
                path.symlink_to(path.name)
            elif kind == "folder":
                path.mkdir()
            else:
                path.symlink_to(kind)
            return {
                "data": lambda: good.evaluate(good.parent, path),
                "eval": lambda: good.quantize("--eval-data", path),
                "json": lambda: good.train(path),
                "sensitivity": lambda: good.plan(good.parent, "--sensitivity", path),
                "yaml": lambda: good.quantize("--config", path),
                "gguf": lambda: ["verify", path, "--against", good.run],
                "bench.gguf": lambda: ["bench", path],
                "run.gguf": lambda: ["run", path, "--prompt", "a"],
                "eval.gguf": lambda: good.evaluate(path, None, "--against", good.run),
                "saved": lambda: good.evaluate(good.parent, good.folder),
            }[where]()

        return make

    for where in ("data", "json", "sensitivity", "yaml", "gguf", "bench.gguf", "run.gguf", "eval.gguf"):
        for kind in ("fifo", "socket", "/dev/zero", "loop", "folder"):
            may = (3,) if (kind, where) == ("folder", "gguf") else (2,)  # an export that is none
            yield Case(f"{kind} as {where}", special(kind, where), may)
    yield Case("/dev/stdin as text", lambda good: good.evaluate(good.parent, "/dev/stdin"))
    yield Case("/dev/urandom as text", lambda good: good.evaluate(good.parent, "/dev/urandom"))

    def in_model(name: str, kind: str) -> Callable[[Good], Arguments]:
        def make(good: Good) -> Arguments:
            model = good.model()
            (model / name).unlink(missing_ok=True)
            if kind == "fifo":
                os.mkfifo(model / name)
            else:
                (model / name).symlink_to(kind)
            return good.evaluate(model)

        return make

    for name in (
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
        "chat_template.jinja", "model.safetensors.index.json", "adapter_config.json",
    ):  # fmt: skip
        for kind in ("fifo", "/dev/zero"):
            yield Case(f"{name} is {kind}", in_model(name, kind))

    for number, name in enumerate(("a\nb.txt", "\x1b[31mred.txt", "<script>.txt", "a" * 255, "a" * 5000, "-rf.txt")):
        yield Case(f"a strange name {number}", lambda good, n=name: good.evaluate(good.parent, good.folder / n))


# --- sensitivity.json and plan.json ----------------------------------------------------------------------------------


def _json(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Good], Path]:
    def make(good: Good) -> Path:
        record = json.loads((good.run / name).read_text(encoding="utf-8"))
        changed = change(record)
        path = good.folder / name
        path.write_text(json.dumps(record if changed is None else changed), encoding="utf-8")
        return path

    return make


def _each(record: dict[str, Any], key: str, value: Any) -> None:
    for entry in record.values():
        entry[key] = value


def artefacts() -> Iterator[Case]:
    """sensitivity.json and plan.json of another model, with NaN, with tensors missing or too many, and damaged."""
    q = "model.layers.0.self_attn.q_proj"

    def sensitive(change: Callable[[dict[str, Any]], Any]) -> Callable[[Good], Arguments]:
        made = _json("sensitivity.json", change)
        return lambda good: good.plan(good.parent, "--sensitivity", made(good))

    def planned(change: Callable[[dict[str, Any]], Any]) -> Callable[[Good], Arguments]:
        made = _json("plan.json", change)
        return lambda good: good.train(made(good))

    nan, inf = float("nan"), float("inf")
    for name, change in {
        "of no tensors": lambda r: r.update(tensors={}),
        "a tensor missing": lambda r: r["tensors"].pop(q) and None,
        "a tensor too many": lambda r: r["tensors"].update({"model.layers.9.x": r["tensors"][q]}),
        "names of another model": lambda r: r.update(
            tensors={k.replace("up", "upp"): v for k, v in r["tensors"].items()}
        ),
        "shapes of another model": lambda r: r["tensors"][q].update(weights=17),
        "another model's name": lambda r: r["model"].update(hidden_size=4711, name="other"),
        "NaN samples": lambda r: r["tensors"][q].update(samples=[nan] * r["sequences"]),
        "infinite samples": lambda r: r["tensors"][q].update(samples=[inf] * r["sequences"]),
        "negative samples": lambda r: r["tensors"][q].update(samples=[-1.0] * r["sequences"]),
        "zero samples": lambda r: r["tensors"][q].update(samples=[0.0] * r["sequences"]),
        "huge samples": lambda r: r["tensors"][q].update(samples=[1e308] * r["sequences"]),
        "tiny samples": lambda r: r["tensors"][q].update(samples=[5e-324] * r["sequences"]),
        "samples as text": lambda r: r["tensors"][q].update(samples=["x"] * r["sequences"]),
        "samples as a number": lambda r: r["tensors"][q].update(samples=3),
        "too few samples": lambda r: r["tensors"][q].update(samples=[1.0]),
        "no sequences": lambda r: r.update(sequences=0),
        "sequences as text": lambda r: r.update(sequences="many"),
        "sequences of 10**30": lambda r: r.update(sequences=10**30),
        "tensors as a list": lambda r: r.update(tensors=[1]),
        "a tensor as a number": lambda r: r["tensors"].update({q: 3}),
        "no samples": lambda r: r["tensors"][q].pop("samples") and None,
        "candidates as a number": lambda r: r.update(candidates=3),
        "model as a number": lambda r: r.update(model=3),
        "others as a number": lambda r: r["tensors"][q].update(others=3),
        "another schema": lambda r: r.update(schema=99),
        "no schema": lambda r: r.pop("schema") and None,
        "a list": lambda r: [r],
        "a path for a name": lambda r: r["tensors"].update({"../../../etc/passwd": r["tensors"][q]}),
        "HTML for a name": lambda r: r["tensors"].update({"<script>alert(1)</script>": r["tensors"][q]}),
        "an escape for a name": lambda r: r["tensors"].update({"\x1b[2J": r["tensors"][q]}),
    }.items():
        may = (0, 2) if name in ("huge samples", "tiny samples", "candidates as a number") else (2,)
        yield Case(f"sensitivity {name}", sensitive(change), may)
    for name, change in {
        "of nothing": lambda r: r.update(layers={}, kept={}),
        "a layer too many": lambda r: r["layers"].update({"model.layers.9.x": r["layers"][q]}),
        "names of another model": lambda r: r.update(
            layers={k.replace("up", "upp"): v for k, v in r["layers"].items()}
        ),
        "shapes of another model": lambda r: _each(r["layers"], "shape", [32, 32]),
        "a shape of text": lambda r: _each(r["layers"], "shape", "ab"),
        "a shape of three": lambda r: _each(r["layers"], "shape", [1, 2, 3]),
        "a negative shape": lambda r: _each(r["layers"], "shape", [-64, -64]),
        "a shape of 10**30": lambda r: _each(r["layers"], "shape", [10**30, 10**30]),
        "a NaN factor": lambda r: _each(r["layers"], "temperature_factor", nan),
        "an infinite factor": lambda r: _each(r["layers"], "temperature_factor", inf),
        "a negative factor": lambda r: _each(r["layers"], "temperature_factor", -1),
        "a factor of text": lambda r: _each(r["layers"], "temperature_factor", "x"),
        "an unknown grid": lambda r: _each(r["layers"], "levels", "evil"),
        "a grid of one level": lambda r: _each(r["layers"], "levels", [0]),
        "a grid of NaN": lambda r: _each(r["layers"], "levels", [nan, 1]),
        "an unknown estimator": lambda r: _each(r["layers"], "estimator", "os.system"),
        "an estimator as a number": lambda r: _each(r["layers"], "estimator", 3),
        "a group size of 0": lambda r: _each(r["layers"], "group_size", 0),
        "a group size of 7": lambda r: _each(r["layers"], "group_size", 7),
        "a group size of text": lambda r: _each(r["layers"], "group_size", "x"),
        "stored as nothing": lambda r: _each(r["layers"], "stored", {}),
        "stored as a number": lambda r: _each(r["layers"], "stored", 3),
        "an unknown target": lambda r: r.update(targets=["evil"]),
        "a target as a path": lambda r: r.update(targets=["../../x"]),
        "targets as a number": lambda r: r.update(targets=3),
        "no targets": lambda r: r.update(targets=[]),
        "an unknown recipe": lambda r: r.update(recipe={"name": "os.system"}),
        "a recipe as a number": lambda r: r.update(recipe=3),
        "a recipe without name": lambda r: r.update(recipe={}),
        "a NaN schedule": lambda r: r["schedule"].update(
            {k: nan for k, v in r["schedule"].items() if type(v) is float}
        ),
        "an unknown schedule key": lambda r: r["schedule"].update(evil=1),
        "a schedule of text": lambda r: r["schedule"].update(dict.fromkeys(r["schedule"], "x")),
        "a schedule as a list": lambda r: r.update(schedule=[1]),
        "layers as a list": lambda r: r.update(layers=[1]),
        "a layer as a number": lambda r: r["layers"].update({q: 3}),
        "kept as a number": lambda r: r.update(kept=3),
        "warnings as a number": lambda r: r.update(warnings=3),
        "another schema": lambda r: r.update(schema=99),
        "a list": lambda r: [r],
        "a path for a name": lambda r: r["layers"].update({"../../../etc/passwd": r["layers"][q]}),
        "HTML for a name": lambda r: r["layers"].update({"<script>alert(1)</script>": r["layers"][q]}),
        "correction as a number": lambda r: r.update(correction=3),
        "spending as a number": lambda r: r.update(spending=3),
    }.items():
        may = (0, 2) if name == "an unknown recipe" else (2,)
        yield Case(f"plan {name}", planned(change), may)
    for name in ("plan", "sensitivity"):
        for number, content in enumerate(
            (b"", b"{", b"\xff", b"null", b"[" * 100_000, b'{"schema": ' + b"9" * 6000 + b"}")
        ):

            def make(good: Good, what: str = name, text: bytes = content) -> Arguments:
                path = good.folder / f"{what}.json"
                path.write_bytes(text)
                return good.train(path) if what == "plan" else good.plan(good.parent, "--sensitivity", path)

            yield Case(f"{name} text {number}", make)


# --- options and run.yaml --------------------------------------------------------------------------------------------


def options() -> Iterator[Case]:
    """Numbers that are none, and configuration files that are none."""
    for words in (
        ("--seed", "-1"), ("--seed", str(2**32)), ("--seed", str(10**30)), ("--steps", "0"), ("--steps", str(10**30)),
        ("--bits", "nan"), ("--bits", "inf"), ("--lr", "nan"), ("--lr", "inf"), ("--lr", "-1"), ("--tokens", "nan"),
        ("--tokens", "inf"), ("--tokens", "1e400"), ("--warmup", "nan"), ("--clip", "nan"), ("--clip", "inf"),
        ("--weight-decay", "nan"), ("--held-out-share", "nan"), ("--batch-size", str(10**15)), ("--threads", "-1"),
        ("--threads", str(10**9)), ("--seq-len", str(10**15)), ("--separator", "a\nb"), ("--distill-weight", "nan"),
        ("--distill-noise", "1.1"),
        ("--max-kl", "nan"), ("--second-stage", "nan"), ("--second-factor", "nan"), ("--lr-final", "nan"),
        ("--lr-decay", "nan"), ("--accumulation", str(10**15)), ("--calibrate", "-1"), ("--teacher", "/nothing"),
        ("--report-to", "../x"), ("--recipe", "../x"), ("--recipe", ""), ("--target", "../x"), ("--option", "rho=NaN"),
        ("--option", "rho=[1]"), ("--option", "=1"), ("--skip", "["), ("--group-size", "²"), ("--eval-tokens", "0"),
        ("--calibrate", "2", "--estimator", "os.system"), ("--save-every", "0"), ("--log-every", "-1"),
        ("--option", "tau0=1e400"), ("--plan", "/nothing"), ("--plan", "/dev/zero"), ("--plan-sha256", "x"),
    ):  # fmt: skip
        yield Case(f"option {' '.join(words)}", lambda good, w=words: good.quantize(*w))
    for number, content in enumerate(
        (b"", b"{", b"- a", b"seed: x", b"seed: [1]", b"!!python/object/apply:os.system ['true']", b"\xff", b"\x00",
         b"a: &a [*a]", b"data: 3", b"options: 3", b"lr: [1]", b"[" * 20_000, b"seed: " + b"9" * 6000, b"model: {a: 1}",
         b"seed: 1\nseed: 2\nunknown: 3", b"x: &x [a,a,a]\ny: &y [*x,*x,*x]\nz: [*y,*y,*y]")
    ):  # fmt: skip

        def make(good: Good, text: bytes = content) -> Arguments:
            path = good.folder / "c.yaml"
            path.write_bytes(text)
            return good.quantize("--config", path)

        typed = number in (9, 11, 14)  # what is typed stands over what the file says
        yield Case(f"yaml {number}", make, (0, 2) if typed else (2,))


# --- runs ------------------------------------------------------------------------------------------------------------


def runs() -> Iterator[Case]:
    """A run's folder with damaged, foreign or hostile files in it."""

    def damaged(name: str, content: bytes | None, verb: str) -> Callable[[Good], Arguments]:
        def make(good: Good) -> Arguments:
            run = good.copied_run()
            (run / name).unlink() if content is None else (run / name).write_bytes(content)
            out: Arguments = ["--out", good.folder / "x.gguf"]
            return {
                "export": ["export", run, "--to", "gguf:q4_0", *out],
                "verify": ["verify", run / "exports" / "hf", "--against", run, "--no-engine"],
                "report": ["report", run],
                "compare": ["compare", run, run],
            }[verb]  # type: ignore[return-value]

        return make

    for verb, names in (
        ("report", ("report.json", "sensitivity.json", "plan.json", "log.jsonl", "diagnostics.json", "scores.json",
                    "run.yaml")),
        ("compare", ("report.json", "scores.json", "run.yaml")),
        ("export", ("plan.json", "codes.safetensors", "model/config.json", "model/model.safetensors")),
        ("verify", ("exports/hf/config.json", "exports/hf/model.safetensors", "codes.safetensors", "plan.json")),
    ):  # fmt: skip
        for name in names:
            for number, content in enumerate((b"", b"{", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000, None)):
                yield Case(f"{verb} {name} {number}", damaged(name, content, verb), (0, 2, 3))

    def report(change: Callable[[dict[str, Any]], Any], verb: str = "report") -> Callable[[Good], Arguments]:
        def make(good: Good) -> Arguments:
            run = good.copied_run()
            record = json.loads((run / "report.json").read_text(encoding="utf-8"))
            change(record)
            (run / "report.json").write_text(json.dumps(record), encoding="utf-8")
            return ["report", run] if verb == "report" else ["compare", run, good.run]

        return make

    html = "<script>alert(1)</script>"
    for verb in ("report", "compare"):
        for name, change in {
            "HTML": lambda r: r.update(recipe=html, license=html, command=html, target=html),
            "HTML in the model": lambda r: r["model"].update(name=html, commit=html),
            "nll as text": lambda r: r.update(nll={"parent": "x"}),
            "nll of NaN": lambda r: r.update(nll={k: float("nan") for k in r["nll"]}),
            "exports as a number": lambda r: r.update(exports=3),
            "an export elsewhere": lambda r: r["exports"][0].update(path="../../../../etc/passwd"),
            "weights as text": lambda r: r.update(weights="x"),
            "seconds missing": lambda r: r.pop("seconds"),
            "bits of 10**400": lambda r: r["bits_per_weight"].update(whole_model=1e308),
            "an escape": lambda r: r.update(recipe="\x1b[2J"),
        }.items():
            yield Case(f"{verb} with {name}", report(change, verb), (0, 2))

    def gguf(change: Callable[[bytes], bytes]) -> Callable[[Good], Arguments]:
        def make(good: Good) -> Arguments:
            path = good.folder / "x.gguf"
            source = next((good.run / "exports").rglob("*.gguf"))
            path.write_bytes(change(source.read_bytes()))
            return ["verify", path, "--against", good.run, "--no-engine"]

        return make

    for kept in (0, 3, 4, 8, 23, 24, 100, 1000, 5000, -1, -100):
        yield Case(f"gguf cut at {kept}", gguf(lambda c, k=kept: c[:k]), (2, 3))
    draw = random.Random(8)
    for number in range(24):
        place, bit = draw.randrange(3000) if number < 16 else draw.randrange(60_000), draw.randrange(8)
        yield Case(f"gguf bit {number}", gguf(lambda c, p=place, b=bit: flipped(c, p, b)), (2, 3))
    for name, packed in (("tensors", "<IIQQ"), ("keys", "<IIQQ")):
        huge = struct.pack(packed, 0x46554747, 3, 2**60 if name == "tensors" else 1, 2**60 if name == "keys" else 1)
        yield Case(f"gguf of 2**60 {name}", gguf(lambda c, h=huge: h + c[24:]), (2, 3))

    def linked(name: str) -> Callable[[Good], Arguments]:
        def make(good: Good) -> Arguments:
            run, outside = good.copied_run(), good.folder / "outside"
            outside.mkdir()
            (outside / "precious").write_text("years of work", encoding="utf-8")
            target = run / name
            if target.is_dir():
                shutil.rmtree(target)
                target.symlink_to(outside)
            else:
                target.unlink(missing_ok=True)
                target.symlink_to(outside / "precious")
            for stage in ("report.json", "codes.safetensors", "scores.json"):
                if stage != name:
                    (run / stage).unlink(missing_ok=True)
            import yaml

            kept = yaml.safe_load((good.run / "run.yaml").read_text(encoding="utf-8"))
            (run / "run.yaml").write_text(yaml.safe_dump({**kept, "out": str(run)}), encoding="utf-8")
            return ["quantize", "--config", run / "run.yaml", "--resume"]

        return make

    for name in ("checkpoints", "model", "exports", "cache", "log.jsonl", "scores.json", "plan.json", "report.html",
                 "diagnostics.json", "exports/hf", "sensitivity.json", "timing.json"):  # fmt: skip
        yield Case(f"{name} is a link out of the run", linked(name), says="symbolic link")


CASES = [*weights(), *configs(), *code(), *tokenizers(), *data(), *artefacts(), *options(), *runs()]
