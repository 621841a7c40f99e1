"""Tiny models of transformers over our store, and beside it over their own cache."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from models import VOCABULARY
from retinue.model.attention import install
from retinue.model.kv import Segment, Store
from retinue.model.kv import Sequence as Memory
from retinue.types import BLOCK_TOKENS

BLOCKS = 16  # of every store here

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
_STATE_SPACE: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
_HYBRID = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {"num_experts": 8},
    "mixtral": {"num_local_experts": 8},
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 24, "head_dim": 8},
    # Running states beside attention layers.
    "qwen3_next": {
        "num_experts": 8,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "head_dim": 16,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "layer_types": _HYBRID,
    },
    "granitemoehybrid": {
        "num_local_experts": 8,
        "shared_intermediate_size": 24,
        "layer_types": _HYBRID,
        "attention_multiplier": 0.3,
        **_STATE_SPACE,
    },
    "lfm2_moe": {
        "num_experts": 8,
        "moe_intermediate_size": 24,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    },
    # Both in one layer; it has no experts, which the store does not see.
    "falcon_h1": {"head_dim": 8, "mamba_d_ssm": 64, "mamba_n_groups": 1, **_STATE_SPACE},
}
HYBRIDS = ("qwen3_next", "granitemoehybrid", "lfm2_moe", "falcon_h1")


def build(family: str, **fields: Any) -> PreTrainedModel:
    """A float32 model with plain experts. Same arguments, same weights."""
    config = CONFIG_MAPPING[family](**(_COMMON | FAMILIES[family] | fields))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, experts_implementation="eager"
    )
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    return model.eval()


def stored(model: PreTrainedModel, blocks: int = BLOCKS) -> Store:
    """A store that the model attends over from now on."""
    store = Store(model.config, blocks * BLOCK_TOKENS)
    assert store.shareable
    install(model, store)
    return store


@torch.inference_mode()
def forward(
    model: PreTrainedModel, store: Store, parts: Sequence[tuple[Memory, list[int]]]
) -> list[torch.Tensor]:
    """One pass over the store: of each part the logits after every token, [tokens, vocabulary]."""
    segments = [Segment(memory, tokens) for memory, tokens in parts]
    positions = [
        list(range(memory.length, memory.length + len(tokens))) for memory, tokens in parts
    ]
    shape = (1, -1) if store.packable or len(parts) == 1 else (-1, 1)
    store.begin(segments)
    try:
        logits = model(
            input_ids=torch.tensor([t for _, tokens in parts for t in tokens]).view(shape),
            position_ids=torch.tensor([p for each in positions for p in each]).view(shape),
            past_key_values=store,
            use_cache=True,
        ).logits
        store.commit()
    finally:
        store.end()
    flat = logits.reshape(-1, logits.shape[-1])
    return list(flat.split([len(tokens) for _, tokens in parts]))


class Plain:
    """One sequence over transformers' own cache; the model must not be installed."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self.cache = model, DynamicCache(config=model.config)

    @torch.inference_mode()
    def __call__(self, tokens: list[int]) -> torch.Tensor:
        """The logits after every token: [tokens, vocabulary]."""
        ids = torch.tensor([tokens])
        return self._model(input_ids=ids, past_key_values=self.cache).logits[0]
