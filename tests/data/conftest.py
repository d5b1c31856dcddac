"""Small real tokenizers, built here: byte-level BPE with the marks and templates that the tests need."""

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SAMPLE = [
    "Once upon a time there was a hearth, and the hearth was warm.",
    "The cat sat by the fire; the dog slept. User: hello Assistant: hi there, how are you?",
    "naïve café — “quoted” 日本語 🙂",
]

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


@pytest.fixture(scope="session")
def make_tokenizer() -> MakeTokenizer:
    """A function (bos, eos, adds, template) -> tokenizer; ``adds`` is what it puts around a text by itself."""

    def make(
        *, bos: bool = True, eos: bool = True, adds: str = "", template: str | None = None, extra: int = 0
    ) -> PreTrainedTokenizerFast:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=300 + extra,
            special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(SAMPLE, trainer)
        if adds:
            single = {"bos": "<s> $A", "eos": "$A </s>", "both": "<s> $A </s>"}[adds]
            marks = [(mark, backend.token_to_id(mark)) for mark in ("<s>", "</s>") if mark in single]
            backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=marks)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>" if bos else None, eos_token="</s>" if eos else None
        )
        if template is not None:
            tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: MakeTokenizer) -> PreTrainedTokenizerFast:
    """One that puts BOS in front by itself, as Llama's does."""
    return make_tokenizer(adds="bos")
