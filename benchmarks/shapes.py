"""Writes a checkpoint of a real model's shape with random weights, one shard a layer.

    python -m benchmarks.shapes olmoe-mini OUT

Speed does not depend on what weights say, so random ones measure it. They route almost evenly,
which is the worst case for whoever keeps some experts and not others, and the same for every
engine; what a predictor is worth they cannot show. The same shape always gives the same bytes.
Memory: one layer, since every shard is written before the next is drawn.
"""

import json
import zlib
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import OlmoeConfig, PreTrainedConfig, Qwen3MoeConfig

Tensors = dict[str, torch.Tensor]

DTYPE = torch.bfloat16
WEIGHT_STD = 0.02
EMBEDDING_STD = 1.0  # as wide as the norms' ones, so that the first router sees distinct tokens


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of one OLMoE model."""

    hidden: int
    intermediate: int  # of one expert
    layers: int
    heads: int
    experts: int
    top_k: int
    vocabulary: int = 50304

    @property
    def key_value_heads(self) -> int:
        return self.heads

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def query_norm(self) -> int:
        """Width of the norm over queries: all heads at once."""
        return self.hidden

    @property
    def key_norm(self) -> int:
        return self.hidden

    def config(self) -> PreTrainedConfig:
        """What becomes the checkpoint's config.json."""
        return OlmoeConfig(
            **self._shared(),
            intermediate_size=self.intermediate,
            num_key_value_heads=self.key_value_heads,
            architectures=["OlmoeForCausalLM"],
        )

    def _shared(self) -> dict[str, Any]:
        return {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }


@dataclass(frozen=True, slots=True)
class Qwen3(Shape):
    """The sizes of one Qwen3 model with experts: few heads of keys, each of a width of its own."""

    @property
    def key_value_heads(self) -> int:
        return self.heads // 8

    @property
    def head_dim(self) -> int:
        return 128

    @property
    def query_norm(self) -> int:
        """Each head alone."""
        return self.head_dim

    @property
    def key_norm(self) -> int:
        return self.head_dim

    def config(self) -> PreTrainedConfig:
        return Qwen3MoeConfig(
            **self._shared(),
            moe_intermediate_size=self.intermediate,
            num_key_value_heads=self.key_value_heads,
            head_dim=self.head_dim,
            norm_topk_prob=True,
            architectures=["Qwen3MoeForCausalLM"],
        )


SHAPES: dict[str, Shape] = {
    "olmoe-mini": Shape(1024, 512, layers=8, heads=8, experts=32, top_k=4),
    "olmoe-1b-7b": Shape(2048, 1024, layers=16, heads=16, experts=64, top_k=8),
    "qwen3-15b-a3b": Qwen3(2048, 768, layers=24, heads=32, experts=128, top_k=8, vocabulary=151936),
}


def write(name: str, folder: Path) -> int:
    """Write the checkpoint of shape `name` into `folder`; returns the bytes of its shards."""
    shape = SHAPES[name]
    folder.mkdir(parents=True, exist_ok=True)
    shape.config().save_pretrained(folder)
    count = shape.layers + 1
    where: dict[str, str] = {}
    total_bytes = 0
    for number, tensors in enumerate(_shards(shape), 1):
        file = f"model-{number:05d}-of-{count:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return total_bytes


def _shards(shape: Shape) -> Iterator[Tensors]:
    """One dictionary a layer, and last what belongs to no layer."""
    for layer in range(shape.layers):
        yield _layer(shape, f"model.layers.{layer}.")
    wide = (shape.vocabulary, shape.hidden)
    yield {
        "model.embed_tokens.weight": _drawn("model.embed_tokens.weight", wide, EMBEDDING_STD),
        "model.norm.weight": _ones(shape.hidden),
        "lm_head.weight": _drawn("lm_head.weight", wide),
    }


def _layer(shape: Shape, prefix: str) -> Tensors:
    queries = shape.heads * shape.head_dim
    keys = shape.key_value_heads * shape.head_dim
    sizes = {
        "self_attn.q_proj.weight": (queries, shape.hidden),
        "self_attn.k_proj.weight": (keys, shape.hidden),
        "self_attn.v_proj.weight": (keys, shape.hidden),
        "self_attn.o_proj.weight": (shape.hidden, queries),
    }
    sizes["mlp.gate.weight"] = (shape.experts, shape.hidden)
    for expert in range(shape.experts):
        for part in ("gate", "up"):
            sizes[f"mlp.experts.{expert}.{part}_proj.weight"] = (shape.intermediate, shape.hidden)
        sizes[f"mlp.experts.{expert}.down_proj.weight"] = (shape.hidden, shape.intermediate)
    tensors = {prefix + name: _drawn(prefix + name, size) for name, size in sizes.items()}
    norms = {
        "input_layernorm": shape.hidden,
        "post_attention_layernorm": shape.hidden,
        "self_attn.q_norm": shape.query_norm,
        "self_attn.k_norm": shape.key_norm,
    }
    return tensors | {f"{prefix}{norm}.weight": _ones(size) for norm, size in norms.items()}


def _drawn(key: str, size: tuple[int, ...], std: float = WEIGHT_STD) -> torch.Tensor:
    """Normal values that depend on the tensor's name alone, not on the order of drawing."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return torch.empty(size, dtype=DTYPE).normal_(0.0, std, generator=generator)


def _ones(count: int) -> torch.Tensor:
    return torch.ones(count, dtype=DTYPE)


def main() -> None:
    """Write one shape and print its size as JSON."""
    parser = ArgumentParser(
        prog="python -m benchmarks.shapes",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("shape", metavar="SHAPE", choices=SHAPES, help=", ".join(SHAPES))
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    options = parser.parse_args()
    print(json.dumps({"shape": options.shape, "bytes": write(options.shape, options.out)}))


if __name__ == "__main__":
    main()
