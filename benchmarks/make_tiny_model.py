"""Make a tiny language model from text files: tokenizer, pretraining, evaluation, model card.

    python benchmarks/make_tiny_model.py --train books.txt.gz textbooks.txt.gz --test books_test.txt --out my-model

The bundled ``src/hestia/tiny/books-6m`` is such a model, and its recipe gave the defaults. Documents are cut at lines
that are exactly ``<|end...|>``; .gz and .xz files are read as they are.

    tokenizer   byte-level BPE of --vocab tokens, trained on the training files
    model       Llama; MLP 3 x hidden, heads of 64 (or --heads), two query heads to a key-value head, tied head;
                residual projections start at 1/sqrt(2 layers) of the usual size, so that the residual stream starts
                at one scale
    training    documents joined by ``<|endoftext|>``, blocks of --block tokens, each once an epoch in an order that
                only the seed decides; AdamW (0.9, 0.95), weight decay 0.1 on matrices, clip 1, linear warm-up, constant
                rate, linear decay over the last 30 %; fp32 weights under bf16 autocast
    evaluation  mean negative log-likelihood over all blocks (or --test-blocks, spread evenly) of every test file; the
                weights are those that are written, rounded to bf16, and the arithmetic is fp32

Not resumable: --out must not exist yet, and it appears only when everything in it is there.
"""

from __future__ import annotations

import argparse
import gzip
import lzma
import math
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
DECAY_SHARE = 0.3


def documents(path: Path) -> Iterator[str]:
    """The documents of a .txt, .txt.gz or .txt.xz file, cut at lines that are exactly ``<|end...|>``."""
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    lines: list[str] = []
    with opener(path, "rt", encoding="utf-8") as handle:
        for line in handle:
            if line.startswith("<|end") and line.rstrip("\n").endswith("|>"):
                yield "".join(lines).strip()
                lines = []
            else:
                lines.append(line)
    yield "".join(lines).strip()


def named(path: Path) -> str:
    """Folder and file, because two corpora may both have a ``test.txt``; the file alone where no folder was named."""
    return "/".join(path.parts[-2:])


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE tokenizer: every text has tokens, and decoding gives it back exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def blocks(tokenizer: Tokenizer, paths: Iterable[Path], block: int) -> Tensor:
    """Token ids [n, block], int32: documents joined by ``<|endoftext|>`` behind each, a last part block dropped."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids: list[Tensor] = []
    for path in paths:
        for text in documents(path):
            if text:
                ids.append(torch.tensor([*tokenizer.encode(text).ids, end], dtype=torch.int32))
    joined = torch.cat(ids) if ids else torch.zeros(0, dtype=torch.int32)
    if len(joined) < block:
        raise SystemExit(f"{', '.join(map(str, paths))}: {len(joined)} tokens of text, one block needs {block}")
    return joined[: len(joined) // block * block].view(-1, block)


def make_model(args: argparse.Namespace, vocabulary: int) -> LlamaForCausalLM:
    """A freshly initialised Llama of the requested size."""
    heads = args.heads
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=args.hidden // heads,
        max_position_embeddings=2 * args.block,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(1.0 / math.sqrt(2 * args.layers))
    return model


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, constant, linear decay to 0 over the last 30 % of the steps; ``step`` counts from 0."""
    return peak * min(1.0, (step + 1) / warmup, (steps - step) / max(1.0, DECAY_SHARE * steps))


def train(model: LlamaForCausalLM, data: Tensor, args: argparse.Namespace) -> None:
    """Pretrain ``model`` in place on blocks [n, block]."""
    device = next(model.parameters()).device
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
    )
    model.train()
    if device.type == "cpu":
        model.set_attn_implementation("eager")  # a fifth faster than the fused kernel at these sizes
    order = torch.empty(0, dtype=torch.int64)
    epoch, started, shown = 0, time.perf_counter(), 0.0
    for step in range(args.steps):
        while len(order) < args.batch_size:
            generator = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
            order = torch.cat([order, torch.randperm(len(data), generator=generator)])
            epoch += 1
        batch, order = data[order[: args.batch_size]].to(device, torch.int64), order[args.batch_size :]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr, args.warmup)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = model(input_ids=batch, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        elapsed = time.perf_counter() - started
        if elapsed - shown > 5.0 or step + 1 == args.steps:
            shown = elapsed
            left = elapsed / (step + 1) * (args.steps - step - 1)
            rate = (step + 1) * batch.numel() / elapsed
            value = float(loss.detach())
            if not math.isfinite(value):
                raise SystemExit(f"step {step + 1}: the loss is {value}; use a smaller --lr")
            print(
                f"step {step + 1}/{args.steps}  loss {value:.3f}  {rate:,.0f} tokens/s  {left:,.0f} s left",
                file=sys.stderr,
            )


@torch.no_grad()
def mean_nll(model: LlamaForCausalLM, data: Tensor, limit: int | None) -> tuple[float, int]:
    """Nats per token over ``limit`` evenly spread blocks (None: all), block - 1 predictions in each; their number."""
    model.eval()
    device = next(model.parameters()).device
    count = min(limit or len(data), len(data))
    chosen = data[torch.linspace(0, len(data) - 1, count).round().long()]
    total = 0.0
    for batch in chosen.split(16):
        ids = batch.to(device, torch.int64)
        logits = model(input_ids=ids, use_cache=False).logits
        total += float(cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"))
    return total / (count * (data.shape[1] - 1)), count


def card(
    args: argparse.Namespace, model: LlamaForCausalLM, available: int, scores: list[tuple[str, float, int]]
) -> str:
    """The README.md of the model: what it is, what it saw, how well it predicts."""
    c = model.config
    parameters = sum(p.numel() for p in model.parameters())
    seen = args.steps * args.batch_size * args.block
    files = ", ".join(f"`{named(path)}`" for path in args.train)
    rows = "\n".join(f"| {name} | {nll:.3f} | {math.exp(nll):.1f} | {count} |" for name, nll, count in scores)
    return f"""# {args.out.name}

A Llama of {parameters:,} parameters: {c.hidden_size} wide, {c.intermediate_size} in the MLP,
{c.num_hidden_layers} layers, {c.num_attention_heads} heads / {c.num_key_value_heads} KV of {c.head_dim},
{c.vocab_size:,} byte-level BPE tokens, tied head, bf16. Made by `benchmarks/make_tiny_model.py`.

## Training

{seen:,} tokens ({seen / available:.2f} epochs of {available:,} tokens) of {files}.
{args.steps:,} steps of {args.batch_size} blocks of {args.block}, AdamW (0.9, 0.95), weight decay 0.1 on matrices,
peak rate {args.lr:g}, {args.warmup} steps of warm-up, linear decay over the last {DECAY_SHARE:.0%}, clip 1,
bf16 autocast, residual projections initialised at 1/sqrt({2 * args.layers}), seed {args.seed}.

## Evaluation

Blocks of {args.block} tokens, documents joined by `{END_OF_TEXT}`, {args.block - 1} predictions a block, bf16 weights,
fp32 arithmetic.

| text | nats per token | perplexity | blocks |
|---|---|---|---|
{rows}
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments, checked before any work is done."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--train", type=Path, nargs="+", required=True, metavar="FILE", help="text to learn from")
    parser.add_argument("--test", type=Path, nargs="+", required=True, metavar="FILE", help="text to be measured on")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--steps", type=int, default=2950)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden", type=int, default=256, help="width; 256 divides it in models for every GGUF type")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, help="query heads, even; default one for 64 of the width, at least 2")
    parser.add_argument("--vocab", type=int, default=4096, help="tokens, 257 or more")
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=150, help="steps; at most a tenth of all")
    parser.add_argument("--test-blocks", type=int, help="measure on this many blocks of each test file instead of all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    for path in (*args.train, *args.test):
        if not path.is_file():
            parser.error(f"{path}: no such file")
    if args.out.exists():
        parser.error(f"{args.out}: exists already; name a new folder")
    for name in ("steps", "layers", "batch_size", "warmup"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    args.heads = args.heads or max(2, args.hidden // 64)
    if args.heads < 2 or args.heads % 2:
        parser.error(f"--heads must be even and at least 2, two query heads share a key-value head, got {args.heads}")
    if args.hidden < 32 or args.hidden % max(32, 2 * args.heads):
        parser.error(f"--hidden must be a multiple of 32 and of twice its {args.heads} heads, got {args.hidden}")
    if args.vocab < 257 or args.block < 2:
        parser.error(f"--vocab must be at least 257 (256 bytes and {END_OF_TEXT}) and --block at least 2")
    args.warmup = min(args.warmup, max(1, args.steps // 10))
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Make the model that the command line describes."""
    args = parse(argv)
    torch.manual_seed(args.seed)
    print("training the tokenizer", file=sys.stderr)
    tokenizer = train_tokenizer((text for path in args.train for text in documents(path)), args.vocab)
    data = blocks(tokenizer, args.train, args.block)
    tests = {named(path): blocks(tokenizer, [path], args.block) for path in args.test}
    print(
        f"{data.numel():,} tokens to learn from; {args.steps * args.batch_size * args.block:,} will be seen",
        file=sys.stderr,
    )
    model = make_model(args, tokenizer.get_vocab_size()).to(args.device)
    train(model, data, args)
    model.bfloat16().float()  # what the file will hold, in exact arithmetic
    scores = [(name, *mean_nll(model, test, args.test_blocks)) for name, test in tests.items()]
    model.bfloat16()

    partial = args.out.with_name(f".{args.out.name}.{os.getpid()}.tmp")
    try:
        model.save_pretrained(partial)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=END_OF_TEXT,
            eos_token=END_OF_TEXT,
            pad_token=END_OF_TEXT,
            model_max_length=2 * args.block,
        ).save_pretrained(partial)
        (partial / "README.md").write_text(card(args, model, data.numel(), scores), encoding="utf-8")
        partial.rename(args.out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for name, nll, count in scores:
        print(f"{name}: {nll:.3f} nats per token on {count} blocks")
    print(args.out)


if __name__ == "__main__":
    main()
