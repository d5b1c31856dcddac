"""Model and tokenizer in: safetensors only, no code of the folder, and everything that could be wrong by name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from toy_runs import make_parent
from transformers import AutoTokenizer, LlamaForCausalLM

from hestia import loading
from hestia.errors import ConfigError


def edit_config(folder: Path, **values: Any) -> None:
    """Change some keys of config.json; a None removes its key."""
    path = folder / "config.json"
    record = {**json.loads(path.read_text(encoding="utf-8")), **values}
    path.write_text(json.dumps({k: v for k, v in record.items() if v is not None}), encoding="utf-8")


def test_a_model_comes_in_fp32_and_eval_mode_whatever_it_is_stored_in(tmp_path: Path) -> None:
    folder = make_parent(tmp_path / "model")
    LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    source = loading.resolve(str(folder))
    model = loading.load_model(source)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(p, stored[name].float()) for name, p in model.named_parameters())
    assert loading.parent_dtype(source, loading.load_config(source)) == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_parents_dtype_without_a_word_in_the_config_is_that_of_its_tensors(
    parent_copy: Path, dtype: torch.dtype
) -> None:
    tensors = {name: t.to(dtype) for name, t in load_file(parent_copy / "model.safetensors").items()}
    save_file(tensors, parent_copy / "model.safetensors", metadata={"format": "pt"})
    edit_config(parent_copy, dtype=None, torch_dtype=None)
    source = loading.resolve(str(parent_copy))
    assert loading.parent_dtype(source, loading.load_config(source)) == dtype


def test_the_empty_model_has_every_shape_and_no_weight(toy_parent: Path) -> None:
    source = loading.resolve(str(toy_parent))
    empty = loading.empty_model(source, loading.load_config(source))
    full = loading.load_model(source)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in full.named_parameters()}


def _remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def _write(name: str, content: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return write


INDEX = b'{"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}'


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove("config.json"), "no config.json"),
        (_remove("model.safetensors"), "no .safetensors weights. Convert the checkpoint"),
        (_write("model.safetensors", b""), "damaged or truncated safetensors file"),
        (_write("model.safetensors", b"\xff" * 64), "damaged or truncated safetensors file"),
        (_write("model.safetensors.index.json", b"{"), "damaged index"),
        (_write("model.safetensors.index.json", b"[1]"), "damaged index"),
        (_write("model.safetensors.index.json", INDEX), "model-00002-of-00002.safetensors, which are not there"),
    ],
)
def test_a_damaged_folder_is_refused_before_any_weight_is_read(
    parent_copy: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(parent_copy)
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        loading.resolve(str(parent_copy))


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_pickled_weights_are_named_and_left_alone(parent_copy: Path, suffix: str) -> None:
    (parent_copy / "model.safetensors").rename(parent_copy / f"weights{suffix}")
    with pytest.raises(ConfigError, match=rf"weights\{suffix}, and pickled weights can run code"):
        loading.resolve(str(parent_copy))


def test_pickled_weights_beside_safetensors_are_not_read(parent_copy: Path) -> None:
    (parent_copy / "pytorch_model.bin").write_bytes(b"\x80\x04not a model")
    assert loading.load_model(loading.resolve(str(parent_copy))).num_parameters() > 0


def test_weights_that_do_not_fit_are_named(parent_copy: Path) -> None:
    source = loading.resolve(str(parent_copy))
    tensors = load_file(parent_copy / "model.safetensors")
    cut = {name: t for name, t in tensors.items() if "layers.1.mlp" not in name}
    save_file(cut, parent_copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 3 weights, the first is model\.layers\.1\.mlp\.down_proj\.weight"):
        loading.load_model(source)
    save_file(
        {**tensors, "model.norm.weight": torch.ones(32)}, parent_copy / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(ConfigError, match=r"another shape than in config\.json, first .*model\.norm\.weight"):
        loading.load_model(source)
    tensors["model.layers.0.input_layernorm.weight"][7] = torch.inf
    save_file(tensors, parent_copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.input_layernorm\.weight holds NaN or infinity"):
        loading.load_model(source)


def test_a_tokenizer_that_is_missing_or_damaged(parent_copy: Path) -> None:
    source = loading.resolve(str(parent_copy))
    (parent_copy / "tokenizer.json").write_text('{"version": "1.0"', encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot read the tokenizer"):
        loading.load_tokenizer(source)
    (parent_copy / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"no tokenizer in the folder \(looked for tokenizer\.json"):
        loading.load_tokenizer(source)


def edit_tokenizer(folder: Path, change: Callable[[dict[str, Any]], object], **settings: Any) -> Tokenizer:
    """Change tokenizer.json and tokenizer_config.json, and give what the former says."""
    path, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    change(record)
    path.write_text(json.dumps(record), encoding="utf-8")
    config.write_text(json.dumps({**json.loads(config.read_text(encoding="utf-8")), **settings}), encoding="utf-8")
    return Tokenizer.from_file(str(path))


def _with_digits(record: dict[str, Any]) -> None:
    """Every digit by itself, though the merges would join two."""
    record["model"]["vocab"]["12"] = len(record["model"]["vocab"])
    record["model"]["merges"].append(["1", "2"])
    digits = {"type": "Digits", "individual_digits": True}
    record["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, record["pre_tokenizer"]]}


def _as_llama_2(record: dict[str, Any]) -> None:
    """Spaces as "▁" by a normalizer, and bytes for what is not in the vocabulary."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁thecasonm", "▁t", "▁s"]
    record["model"] |= {
        "vocab": {piece: index for index, piece in enumerate(pieces)},
        "merges": [["▁", "t"], ["▁", "s"]],
        "unk_token": "<unk>",
        "byte_fallback": True,
        "fuse_unk": True,
    }
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    record["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    record["pre_tokenizer"] = None
    shown = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    record["decoder"] = {"type": "Sequence", "decoders": [shown, {"type": "ByteFallback"}, {"type": "Fuse"}]}


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [(_with_digits, "GPT2Tokenizer", "the 12 345"), (_as_llama_2, "LlamaTokenizer", " the cat")],
)
def test_a_class_that_drops_parts_of_tokenizer_json_gives_way_to_the_file(
    parent_copy: Path,
    change: Callable[[dict[str, Any]], object],
    kind: str,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(loading, "announce", said.append)
    written = edit_tokenizer(parent_copy, change, tokenizer_class=kind)
    named = AutoTokenizer.from_pretrained(parent_copy)
    assert named(text)["input_ids"] != written.encode(text).ids
    tokenizer = loading.load_tokenizer(loading.resolve(str(parent_copy)))
    for one in (text, "<s>the cat", *loading.HARD_STRINGS):
        assert tokenizer(one)["input_ids"] == written.encode(one).ids
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.model_max_length) == ("<s>", "</s>", 64)
    assert len(said) == 1 and f"{kind} cuts" in said[0]
    source = loading.resolve(str(parent_copy))
    loading.save(loading.load_model(source), source, tmp_path / "child", tokenizer)
    for one in (text, "<s>the cat", *loading.HARD_STRINGS):
        assert AutoTokenizer.from_pretrained(tmp_path / "child")(one)["input_ids"] == written.encode(one).ids


def test_a_class_that_cuts_as_its_file_does_stays(parent_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "announce", pytest.fail)
    edit_tokenizer(parent_copy, lambda record: None, tokenizer_class="GPT2Tokenizer")
    assert type(loading.load_tokenizer(loading.resolve(str(parent_copy)))).__name__ == "GPT2Tokenizer"


def test_a_tokenizer_that_does_not_cover_the_hard_strings_is_loaded_as_before(parent_copy: Path) -> None:
    words = {"type": "WordLevel", "vocab": {"the": 0, "cat": 1}, "unk_token": "<none>"}
    written = edit_tokenizer(
        parent_copy, lambda record: record.update(model=words, added_tokens=[], post_processor=None)
    )
    with pytest.raises(Exception, match="Missing"):
        written.encode("the dog")
    assert loading.load_tokenizer(loading.resolve(str(parent_copy)))("the")["input_ids"] == [0]


def test_a_tokenizer_config_that_contradicts_tokenizer_json_is_refused(parent_copy: Path) -> None:
    stripping = {"content": "<s>", "lstrip": True, "rstrip": True, "normalized": False, "special": True}
    edit_tokenizer(parent_copy, lambda record: None, added_tokens_decoder={"1": stripping})
    with pytest.raises(ConfigError, match=r"with tokenizer_config\.json '<s>the cat.* is not cut as tokenizer\.json"):
        loading.load_tokenizer(loading.resolve(str(parent_copy)))


@pytest.mark.slow
def test_code_in_the_folder_is_run_only_when_asked_for(parent_copy: Path, tmp_path: Path) -> None:
    """A subprocess, because transformers keeps modules that it imported."""
    mark = tmp_path / "was run"
    (parent_copy / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n"
        f"open({str(mark)!r}, 'w').close()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n",
        encoding="utf-8",
    )
    edit_config(parent_copy, model_type="own", auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    code = (
        "import sys; from hestia import loading, errors\n"
        "source = loading.resolve(sys.argv[1])\n"
        "try: loading.load_config(source)\n"
        "except errors.ConfigError as error: assert '--trust-remote-code' in str(error), error\n"
        "else: raise SystemExit('it was read')\n"
        "import pathlib; assert not pathlib.Path(sys.argv[2]).exists()\n"
        "assert loading.load_config(source, trust_remote_code=True).hidden_size == 64\n"
        "assert pathlib.Path(sys.argv[2]).exists()\n"
    )
    words = [sys.executable, "-c", code, str(parent_copy), str(mark)]
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["./nothing", "/nothing/at/all", "a/b/c", "~/model"])
def test_a_name_that_is_a_path_is_not_asked_of_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(loading.HfApi, "model_info", never)
    with pytest.raises(ConfigError, match="no such model folder"):
        loading.resolve(name)


def test_a_file_is_no_model_folder(toy_parent: Path) -> None:
    with pytest.raises(ConfigError, match="no such model folder"):
        loading.resolve(str(toy_parent / "config.json"))


def test_a_hub_id_is_pinned_to_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    commits = {None: "0123abcd", "v1": "4567cdef", "refs/pr/2": "89abcdef"}
    info = type("Info", (), {})

    def asked(self: Any, name: str, *, revision: str | None, timeout: float) -> Any:
        assert name == "owner/name"
        found = info()
        found.sha = commits[revision]
        return found

    monkeypatch.setattr(loading.HfApi, "model_info", asked)
    source = loading.resolve("owner/name")
    assert (source.location, source.commit, source.is_local) == ("owner/name", "0123abcd", False)
    for revision in ("v1", "refs/pr/2"):
        source = loading.resolve(f"owner/name@{revision}")
        assert (source.name, source.location, source.commit) == (
            f"owner/name@{revision}",
            "owner/name",
            commits[revision],
        )


def test_a_commit_that_is_known_is_not_asked_for(monkeypatch: pytest.MonkeyPatch, toy_parent: Path) -> None:
    monkeypatch.setattr(loading.HfApi, "model_info", lambda *_, **__: pytest.fail("the hub was asked"))
    whole = "0123456789abcdef" * 2 + "01234567"
    source = loading.resolve(f"owner/name@{whole}")
    assert (source.location, source.commit) == ("owner/name", whole)
    assert loading.resolve("owner/name@main", "c0ffee").commit == "c0ffee"
    assert loading.resolve(str(toy_parent), "c0ffee").is_local


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (HFValidationError("bad"), "not a hub id"),
        (OSError("no network\nand more"), "the hub could not be asked (OSError: no network)"),
        (TimeoutError(), "the hub could not be asked (TimeoutError: )"),
        (None, "the hub could not be asked"),
    ],
)
def test_a_hub_that_does_not_answer_is_one_sentence(
    error: Exception | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NotFoundError(HfHubHTTPError):
        def __init__(self) -> None:
            Exception.__init__(self, "404 Not Found")

    def fails(*_: object, **__: object) -> None:
        raise error or NotFoundError()

    monkeypatch.setattr(loading.HfApi, "model_info", fails)
    with pytest.raises(ConfigError) as caught:
        loading.resolve("owner/name")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_frozen_child_carries_its_parents_tokenizer_files_byte_for_byte(parent_copy: Path, tmp_path: Path) -> None:
    (parent_copy / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    (parent_copy / "evil.py").write_text("", encoding="utf-8")
    named = Path("additional_chat_templates", "tool_use.jinja")
    (parent_copy / named).parent.mkdir()
    (parent_copy / named).write_bytes(b"{{ tools }}\r\n")
    (parent_copy / named.parent / "evil.py").write_text("", encoding="utf-8")
    (parent_copy / named.parent / "out.jinja").symlink_to("/etc/hostname")
    source = loading.resolve(str(parent_copy))
    model = loading.load_model(source)
    loading.cast_parameters(model, torch.bfloat16)
    loading.save(model, source, tmp_path / "child", loading.load_tokenizer(source))
    names = {path.name for path in (tmp_path / "child").iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "additional_chat_templates",
    }  # fmt: skip
    assert [path.name for path in (tmp_path / "child" / named.parent).iterdir()] == ["tool_use.jinja"]
    for name in (
        str(named),
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ):
        assert (tmp_path / "child" / name).read_bytes() == (parent_copy / name).read_bytes(), name
    assert {t.dtype for t in load_file(tmp_path / "child" / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("card", "found"),
    [
        ("---\nlanguage: en\nlicense: apache-2.0\n---\n# Model", "apache-2.0"),
        ("---\nlanguage: en\n---\nlicense: mit\n", None),
        ("license: mit\n", None),
        ("", None),
    ],
)
def test_the_licence_is_read_from_the_front_matter_alone(parent_copy: Path, card: str, found: str | None) -> None:
    (parent_copy / "README.md").write_text(card, encoding="utf-8")
    assert loading.license_of(loading.resolve(str(parent_copy))) == found


def test_a_card_that_is_not_utf_8_does_no_harm(parent_copy: Path) -> None:
    (parent_copy / "README.md").write_bytes(b"---\nlicense: mit\n---\n\xff\xfe")
    assert loading.license_of(loading.resolve(str(parent_copy))) == "mit"


def test_what_a_run_records_of_its_parent(toy_parent: Path) -> None:
    source = loading.resolve(str(toy_parent))
    record = loading.fingerprint(source, loading.load_config(source))
    assert record == {
        "name": "parent", "commit": None, "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2,
        "vocab_size": 320,
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(loading.LARGEST))
def test_absurd_sizes_are_refused_and_dense_members_of_a_family_are_not(parent_copy: Path, name: str) -> None:
    edit_config(parent_copy, **{name: loading.LARGEST[name] + 1})
    source = loading.resolve(str(parent_copy))
    with pytest.raises(
        ConfigError, match=f"config.json: {name} must lie between [01] and {loading.LARGEST[name]}, got"
    ):
        loading.load_config(source)
    if "experts" in name:
        edit_config(parent_copy, **{name: 0})
        assert loading.load_config(source)


def test_a_configuration_of_more_weights_than_the_files_hold_is_refused_before_any_is_drawn(
    parent_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_config(parent_copy, intermediate_size=1 << 20)
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("was drawn"))
    with pytest.raises(ConfigError, match=r"describes 402,\d+,\d+ weights, the safetensors files hold \d+,\d+"):
        loading.load_model(loading.resolve(str(parent_copy)))


def test_content_tells_models_apart_by_what_decides_a_number(parent_copy: Path) -> None:
    source = loading.resolve(str(parent_copy))
    before = loading.content(source)
    assert set(before) == {"config.json", "model.safetensors"}
    (parent_copy / "README.md").write_text("hello", encoding="utf-8")
    assert loading.content(source) == before
    path = parent_copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert loading.content(source)["model.safetensors"] != before["model.safetensors"]
    assert loading.content(loading.Source("a/b", "a/b", "c0ffee")) == {"commit": "c0ffee"}
