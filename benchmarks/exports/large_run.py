"""A frozen random Llama of any size on disk, in shards, made without ever holding it in memory.

    python benchmarks/exports/large_run.py OUT [--hidden 2048 --intermediate 5632 --layers 22 --vocabulary 32000]

What exports read: OUT/model (bf16, several files) and OUT/codes.safetensors, ternary with one scale per row.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

import toy_architectures
from transformers import LlamaConfig

from hestia.export.huggingface import Entry, write_safetensors
from hestia.quant import QuantizedTensor, snap

SHARD_BYTES = 500_000_000


def codes(seed: int, rows: int, columns: int) -> Tensor:
    """Random ternary codes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (rows, columns), generator=generator, dtype=torch.int8)


def scales(seed: int, rows: int, columns: int) -> Tensor:
    """Random row scales about the size that keeps activations level."""
    generator = torch.Generator().manual_seed(seed + 1)
    return snap((0.5 + torch.rand(rows, 1, generator=generator)) * (1.5 / columns) ** 0.5)


def weight(seed: int, rows: int, columns: int) -> Tensor:
    """codes x scales in bf16."""
    return QuantizedTensor(codes(seed, rows, columns), scales(seed, rows, columns), "row").dense(torch.bfloat16)


def kept(seed: int, *shape: int) -> Tensor:
    """A random embedding or head, or a norm of ones."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * 0.02).to(torch.bfloat16)


def make(out: Path, *, hidden: int, intermediate: int, layers: int, vocabulary: int) -> int:
    """Write the run; returns the number of parameters."""
    heads, kv_heads = hidden // 64, max(1, hidden // 256)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    matrices = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv_heads * 64, hidden),
        "self_attn.v_proj": (kv_heads * 64, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    dense: list[Entry] = []
    packed: list[Entry] = []
    groups: dict[str, str] = {}

    def keep(name: str, *shape: int) -> None:
        dense.append(Entry(name, torch.bfloat16, shape, partial(kept, len(dense), *shape)))

    keep("model.embed_tokens.weight", vocabulary, hidden)
    for layer in range(layers):
        for place, (name, (rows, columns)) in enumerate(matrices.items()):
            path, seed = f"model.layers.{layer}.{name}", 1000 * layer + 2 * place
            groups[path] = "row"
            shape = (rows, columns)
            dense.append(Entry(f"{path}.weight", torch.bfloat16, shape, partial(weight, seed, rows, columns)))
            packed.append(Entry(f"{path}.codes", torch.int8, shape, partial(codes, seed, rows, columns)))
            packed.append(Entry(f"{path}.scales", torch.float32, (rows, 1), partial(scales, seed, rows, columns)))
        for name in ("input_layernorm", "post_attention_layernorm"):
            keep(f"model.layers.{layer}.{name}.weight", hidden)
    keep("model.norm.weight", hidden)
    keep("lm_head.weight", vocabulary, hidden)

    model = out / "model"
    model.mkdir(parents=True)
    shards: list[list[Entry]] = [[]]
    for entry in dense:
        if shards[-1] and sum(e.nbytes for e in shards[-1]) + entry.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(entry)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        write_safetensors(model / name, shard, {"format": "pt"})
        weight_map |= {entry.name: name for entry in shard}
    if len(shards) > 1:
        total = sum(entry.nbytes for entry in dense)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
    write_safetensors(out / "codes.safetensors", packed, {"schema": "1", "group_size": json.dumps(groups)})
    (model / "config.json").write_text(json.dumps(config.to_dict()))
    (model / "tokenizer.json").write_text(json.dumps(toy_architectures.byte_level()))
    (model / "tokenizer_config.json").write_text("{}")
    return sum(entry.nbytes for entry in dense) // 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for name, default in (("hidden", 2048), ("intermediate", 5632), ("layers", 22), ("vocabulary", 32000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = vars(parser.parse_args())
    print(f"{make(given.pop('out'), **given):,} parameters")


if __name__ == "__main__":
    main()
