"""What one sequence takes in memory, measured on a copy of the skeleton that holds no numbers.

Keys and values, compressed latents, convolution and recurrent states: every family has its own,
and a forward pass on the meta device makes them all, in their true sizes, in no memory.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx.experimental import _config
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

# The short one is within the windows of sliding layers, so that each token counts.
PROBE_TOKENS = (32, 128)


@dataclass(frozen=True, slots=True)
class StateSize:
    """Bytes of a sequence: `per_token` for each of its tokens, and `fixed` whatever its length."""

    per_token: int
    fixed: int


def state_size(model: PreTrainedModel) -> StateSize:
    """Measure what `model` keeps of a sequence; the model itself is left alone, and not copied.

    Not for a model that an ExpertHost holds already.
    """
    tensors = (*model.parameters(), *model.buffers())
    empty: Any = copy.deepcopy(model, {id(tensor): _without_data(tensor) for tensor in tensors})
    empty.set_experts_implementation(_NOTHING)
    settings: Any = _config
    with settings.patch(meta_nonzero_assume_all_nonzero=True), torch.inference_mode():
        fixed = _bytes_after(empty, 1)
        grown = {tokens: _bytes_after(empty, tokens) - fixed for tokens in PROBE_TOKENS}
    per_token = max(-(-count // (tokens - 1)) for tokens, count in grown.items())
    return StateSize(per_token, max(0, fixed - per_token))


def _without_data(tensor: torch.Tensor) -> torch.Tensor:
    empty = tensor.detach().to("meta")
    return nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty


def new_cache(model: PreTrainedModel) -> Cache | None:
    """transformers' own cache for `model`; None where the model insists on making one itself."""
    kind: Any = type(model)
    takes_ours = kind._supports_default_dynamic_cache()
    return DynamicCache(config=model.config) if takes_ours else None


def _bytes_after(model: Any, tokens: int) -> int:
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    out = model(input_ids=ids, past_key_values=new_cache(model), use_cache=True)
    return sum(_bytes(vars(layer)) for layer in out.past_key_values.layers)


def _bytes(value: object) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0


def _no_experts(
    module: nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    return torch.zeros_like(hidden)


_NOTHING = "retinue-nothing"
ALL_EXPERTS_FUNCTIONS.register(_NOTHING, _no_experts)
