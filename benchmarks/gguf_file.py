"""Writes a GGUF file in Q4_0 from a checkpoint of OLMoE's architecture, for llama.cpp.

    python -m benchmarks.gguf_file CHECKPOINT OUT.gguf

Matrices are Q4_0, routers and norms fp32, as llama.cpp's own converter has them. There is no
vocabulary in it: benchmarks feed token ids. Memory: the experts of one part of one layer.
"""

import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

ARCHITECTURE = "olmoe"
Array = npt.NDArray[np.float32]
# GGUF's name in a layer, ours, and whether it is quantised.
LAYER = (
    ("attn_norm", "input_layernorm", False),
    ("ffn_norm", "post_attention_layernorm", False),
    ("attn_q_norm", "self_attn.q_norm", False),
    ("attn_k_norm", "self_attn.k_norm", False),
    ("attn_q", "self_attn.q_proj", True),
    ("attn_k", "self_attn.k_proj", True),
    ("attn_v", "self_attn.v_proj", True),
    ("attn_output", "self_attn.o_proj", True),
    ("ffn_gate_inp", "mlp.gate", False),
)


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor of the file: its shape is known before it is read."""

    name: str
    shape: tuple[int, ...]
    quantised: bool
    read: Callable[[], Array]


class Source:
    """The tensors of a checkpoint in fp32, one at a time."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._where: dict[str, Any] = {}
        for file in sorted(folder.glob("*.safetensors")):
            opened = stack.enter_context(safe_open(file, framework="pt"))
            self._where |= dict.fromkeys(opened.keys(), opened)

    def __contains__(self, key: str) -> bool:
        return key in self._where

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._where[key].get_slice(key).get_shape())

    def read(self, key: str) -> Array:
        found: Array = self._where[key].get_tensor(key).float().numpy()
        return found

    def item(self, name: str, key: str, *, quantised: bool) -> Item:
        return Item(name + ".weight", self.shape(key), quantised, lambda: self.read(key))

    def stacked(self, name: str, keys: list[str]) -> Item:
        """The experts' matrices of one part and layer, as one tensor."""
        shape = (len(keys), *self.shape(keys[0]))
        return Item(name + ".weight", shape, True, lambda: np.stack([self.read(k) for k in keys]))


def items(source: Source, layers: int, experts: int) -> Iterator[Item]:
    """Everything that llama.cpp wants of this architecture."""
    yield source.item("token_embd", "model.embed_tokens.weight", quantised=True)
    yield source.item("output_norm", "model.norm.weight", quantised=False)
    if "lm_head.weight" in source:
        yield source.item("output", "lm_head.weight", quantised=True)
    for layer in range(layers):
        ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
        for name, key, quantised in LAYER:
            yield source.item(theirs + name, f"{ours}{key}.weight", quantised=quantised)
        for part in ("gate", "up", "down"):
            keys = [f"{ours}mlp.experts.{e}.{part}_proj.weight" for e in range(experts)]
            yield source.stacked(f"{theirs}ffn_{part}_exps", keys)


def write(folder: Path, out: Path) -> int:
    """Write the file; returns its bytes. Exits with a line for any other architecture."""
    import gguf

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != ARCHITECTURE:
        sys.exit(f"only {ARCHITECTURE} is converted, not {config['model_type']}")
    quantisation = gguf.GGMLQuantizationType.Q4_0
    writer = gguf.GGUFWriter(str(out), ARCHITECTURE)
    _describe(writer, config)
    with ExitStack() as stack:
        source = Source(folder, stack)
        found = list(items(source, config["num_hidden_layers"], config["num_experts"]))
        for item in found:
            if item.quantised:
                shape = gguf.quant_shape_to_byte_shape(item.shape, quantisation)
                count = int(np.prod(shape))
                kind = np.dtype(np.uint8)
                writer.add_tensor_info(item.name, shape, kind, count, raw_dtype=quantisation)
            else:
                count = 4 * int(np.prod(item.shape))
                writer.add_tensor_info(item.name, item.shape, np.dtype(np.float32), count)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for item in found:
            values = np.ascontiguousarray(item.read())
            if item.quantised:
                values = gguf.quantize(values, quantisation).view(np.uint8)
            writer.write_tensor_data(values)
    writer.close()
    return out.stat().st_size


def _describe(writer: Any, config: dict[str, Any]) -> None:
    """The sizes and constants that llama.cpp builds the network from."""
    rope = config.get("rope_parameters") or config
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_string("tokenizer.ggml.model", "no_vocab")


def main() -> None:
    """Write one file and print its size as JSON."""
    parser = ArgumentParser(
        prog="python -m benchmarks.gguf_file",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path)
    options = parser.parse_args()
    print(json.dumps({"bytes": write(options.checkpoint, options.out)}))


if __name__ == "__main__":
    main()
