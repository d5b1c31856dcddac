"""llama_cpp.py: exact files compute what the frozen model computes, in the engine that people run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_gguf import KINDS, WIDE, byte_fallback, make_run

from hestia.errors import ConfigError, ExportError, VerifyError
from hestia.export import llama_cpp
from hestia.export.activations import emulating, kl_bound
from hestia.export.frozen import FrozenModel
from hestia.export.gguf import export_gguf
from hestia.export.gguf_layout import layout_of
from hestia.export.huggingface import load, logits
from hestia.export.llama_session import Session
from hestia.export.speed import bytes_per_token, compare_speed
from hestia.targets import F16, F32, Target, target

INSTALLED = llama_cpp.available()
needs_llama_cpp = [
    pytest.mark.llama_cpp,
    pytest.mark.skipif(not INSTALLED, reason="llama-cpp-python is not installed"),
]
IDS = [0, *((i * 37) % 300 for i in range(1, 40))]
HARD = [
    "",
    "the cat sat",
    "  two spaces in front",
    " one",
    "\n\nlines\n \n",
    "\ttabs\t and  gaps  ",
    "emoji 😀👩‍👩‍👧 and ½ ² Ⅷ ٣",
    "12345678 3.14 v2",
    "Привет 你好 عربى हिन्दी",
    "don't I'LL we've it's",
    "a\u0301 e\u0301 \u00a0nbsp \r\n crlf\r",
    "_init__(self): return {}[0];",
    "<0x0A> ▁under",
]


def frozen_logits(frozen: FrozenModel, sequences: list[list[int]]) -> np.ndarray:
    """Logits ``[B, T, V]`` of the dense folder in transformers, fp32 all the way."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(frozen.folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.tensor(sequences)).logits.numpy()


def mean_kl(a: np.ndarray, b: np.ndarray) -> float:
    p, q = (torch.log_softmax(torch.from_numpy(x).double(), dim=-1) for x in (a, b))
    return float((p.exp() * (p - q)).sum(dim=-1).mean())


def test_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "available", lambda: False)
    with pytest.raises(ExportError, match=r"pip install 'hestia-lm\[run\]'"):
        llama_cpp.logits(tmp_path / "a.gguf", [1])


def test_a_token_longer_than_the_buffer_is_read_whole() -> None:
    class Library:
        texts = (b"", b"x" * 32, "▁".encode() * 40)

        def llama_token_to_piece(
            self, vocabulary: object, token: int, buffer: Any, size: int, strip: int, special: bool
        ) -> int:
            text = self.texts[token]
            if len(text) > size:
                return -len(text)
            buffer[: len(text)] = text
            return len(text)

    assert tuple(llama_cpp._piece(Library(), None, token) for token in range(3)) == Library.texts


class TestEngine:
    pytestmark = needs_llama_cpp

    def test_quantized_types_stay_within_the_activation_bound(self, tmp_path: Path) -> None:
        frozen = make_run(tmp_path / "run", **WIDE, tokenizer=byte_fallback, dtype=torch.bfloat16)
        both = [IDS, IDS[::-1]]
        expected = frozen_logits(frozen, both)
        for name in ("gguf:tq2_0", "gguf:q2_0"):
            path = tmp_path / f"{name[5:]}.gguf"
            export_gguf(frozen, target(name), path)
            got = llama_cpp.logits_all(path, both)
            assert got.shape == (2, len(IDS), 384)
            assert got.dtype == np.float32
            emulated = self.emulated(frozen, name, both)
            assert 1e-9 < mean_kl(expected, got) < kl_bound(mean_kl(expected, emulated))
            assert mean_kl(expected, got) > mean_kl(expected, emulated) / 1.5

    @staticmethod
    def emulated(frozen: FrozenModel, name: str, ids: list[list[int]]) -> np.ndarray:
        model = load(frozen.folder)
        with emulating(model, layout_of(frozen, target(name)).storage_of()):
            return logits(model, torch.tensor(ids)).numpy()

    def test_verification_of_a_file_with_rounded_head(self, tmp_path: Path) -> None:
        from hestia.export.verify import verify

        frozen = make_run(tmp_path / "run", **WIDE, dtype=torch.bfloat16)
        export_gguf(frozen, target("gguf:tq2_0"), tmp_path / "a.gguf", head="q8_0")
        result = verify(tmp_path / "a.gguf", frozen.run, token_ids=torch.tensor([IDS, IDS[::-1]]))
        assert result.ok, result.differences
        assert result.kl is not None and result.kl < result.details["kl_bound"]
        assert result.details["tokenizer"]["equal"] == result.details["tokenizer"]["strings"] > 15
        assert abs(result.details["head_nll_change"]) < 0.01

    @pytest.mark.parametrize("tokenizer", ["byte_level", "byte_fallback"])
    def test_token_ids_equal_those_of_hugging_face(self, tmp_path: Path, tokenizer: str) -> None:
        import json

        import test_gguf
        from tokenizers import Tokenizer

        record = getattr(test_gguf, tokenizer)()
        frozen = make_run(tmp_path / "run", tokenizer=lambda: record)
        export_gguf(frozen, target("gguf:q2_0"), tmp_path / "a.gguf")
        hf = Tokenizer.from_str(json.dumps(record))
        texts = [*HARD, test_gguf.TEXT, "<s> the cat" if tokenizer == "byte_fallback" else "<|end|>the cat"]
        found = llama_cpp.tokenize_all(tmp_path / "a.gguf", texts)
        assert found == [hf.encode(text).ids for text in texts]
        said = [hf.decode(ids, skip_special_tokens=False) for ids in found]
        assert llama_cpp.decode_all(tmp_path / "a.gguf", found) == said

    def test_generation_is_greedy(self, tmp_path: Path) -> None:
        frozen = make_run(tmp_path / "run", tokenizer=byte_fallback, bos_token_id=1, eos_token_id=2)
        path = tmp_path / "a.gguf"
        export_gguf(frozen, Target("gguf:f32", (F32,), ""), path)
        prompt = llama_cpp.tokenize(path, "the cat")
        answer = llama_cpp.generate(path, "the cat", 6)
        assert len(answer.ids) == 6
        assert isinstance(answer.text, str)
        ids = prompt + answer.ids
        assert frozen_logits(frozen, [ids])[0].argmax(-1)[len(prompt) - 1 : -1].tolist() == answer.ids

    def test_a_file_that_it_cannot_load_is_an_error_with_its_words(self, tmp_path: Path) -> None:
        path = tmp_path / "a.gguf"
        with pytest.raises(ConfigError, match="no such file"):
            llama_cpp.logits(path, [1])
        path.write_bytes(b"GGUF" + bytes(100))
        with pytest.raises(VerifyError, match=r"a\.gguf: GGUF version 0"):  # llama.cpp does not see it
            llama_cpp.logits(path, [1])
        frozen = make_run(tmp_path / "run")
        export_gguf(frozen, target("gguf:q2_0"), path)
        path.write_bytes(path.read_bytes().replace(b"llama", b"lLama"))
        with pytest.raises(ExportError, match=r"a\.gguf: llama\.cpp failed \(exit status 1\): .*a\.gguf"):
            llama_cpp.logits(path, [1])

    def test_a_session_completes_chats_and_measures(self, tmp_path: Path) -> None:
        frozen = make_run(tmp_path / "run", tokenizer=byte_fallback, bos_token_id=1, eos_token_id=2)
        (frozen.folder / "chat_template.jinja").write_text(
            "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
        )
        path = tmp_path / "a.gguf"
        export_gguf(frozen, target("gguf:f32"), path)
        with Session(path) as session:
            text = "".join(session.complete("the cat", 6))
            assert text == llama_cpp.generate(path, "the cat", 6).text
            assert session.speed.tokens_per_second > 0
            assert "".join(session.chat([{"role": "user", "content": "the cat"}], 6)) == text
            with pytest.raises(ExportError, match=r"llama\.cpp failed: ValueError"):
                list(session.complete("the cat " * 500, 6))
            assert "".join(session.complete("the cat", 6)) == text
            speed = session.bench(16, 4)
            assert (speed.prompt_tokens, speed.tokens) == (16, 4)
        record = compare_speed([path], prompt_tokens=8, tokens=4, rounds=1)
        (row,) = record["files"]
        assert row["times_first"] == 1 and row["decode_tokens_per_second"] > 0
        bound = record["bandwidth_gb_per_s"] * 1e9 / bytes_per_token(path)
        assert row["bound_tokens_per_second"] == pytest.approx(bound, rel=1e-12)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("model_type", "scaled"), [*((kind, "") for kind in KINDS), ("llama", "linear"), ("llama", "llama3")]
    )
    def test_dense_files_of_every_architecture_agree(self, tmp_path: Path, model_type: str, scaled: str) -> None:
        options: dict[str, Any] = dict(KINDS[model_type])
        if scaled:
            options = {}
            more = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
            options["rope_parameters"] = {"rope_type": scaled, "rope_theta": 500.0, "factor": 4.0}
            options["rope_parameters"] |= more if scaled == "llama3" else {}
        frozen = make_run(tmp_path / "run", model_type, **WIDE, **options)
        expected = frozen_logits(frozen, [IDS])[0]
        # gemma: ggml looks GELU up in a table of fp16 numbers. A head that fits in F16 has its input rounded to fp16.
        f16_head = not options.get("tied", True) or options.get("dtype") is torch.bfloat16
        exact = 5e-3 if model_type == "gemma" or f16_head else 1e-4
        for storage, tolerance in ((F32, exact), (F16, 2e-2)):
            path = tmp_path / f"{storage.name}.gguf"
            export_gguf(frozen, Target(f"gguf:{storage.name}", (storage,), ""), path)
            assert np.abs(llama_cpp.logits(path, IDS) - expected).max() < tolerance * expected.std()
