"""A tiny random model of the same family as a real one, for probes and tests.

The real configuration says which kinds of layers there are and how they are wired; the twin keeps
that and shrinks every size. No family is named here: a rule goes by what a field is called, and
the fields of a configuration are called alike across families.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from retinue.errors import Unsupported
from retinue.model.architecture import model_class

VOCABULARY = 128
MAX_LAYERS = 12
HIDDEN_SIZE = 64
HEAD_DIM = 16
INITIALIZER_RANGE = 0.12  # wide: routers that decide, and logits without ties

_Rule = tuple[str, int | Callable[[int], int]]


def _at_most(limit: int) -> Callable[[int], int]:
    return lambda value: min(value, limit)


# The first pattern that matches a whole field name wins; sizes that no pattern names stay.
_RULES: tuple[_Rule, ...] = (
    (r".*vocab_size.*", _at_most(VOCABULARY)),
    (r"depth|encoder_layers|num_layers|n_layers", _at_most(2)),
    (r"qk_rope_head_dim|rotary_dim", 8),
    (r".*head_dim|mamba_d_head|d_head", HEAD_DIM),
    (r"mamba_(n|num)_heads", 8),
    (r"(.*_)?num_(key_value|kv)_heads|linear_num_key_heads", _at_most(2)),
    (r"(.*_)?(num_(attention_)?heads|n_heads)(_per_layer)?|linear_num_(value_)?heads|.*num_heads|.*attention_heads",
     _at_most(4)),
    (r"(mamba_)?n_groups|o_groups|num_groups", _at_most(2)),
    (r"n_group|num_expert_group", _at_most(2)),
    (r"topk_group|first_k_dense_replace|num_dense_layers|moe_layer_start_index", _at_most(1)),
    (r"num_experts_per_tok(en)?|top_k_experts|moe_top_?k|moe_k", _at_most(2)),
    (r"(n_|num_|moe_num_|num_local_|n_routed_|num_routed_)+experts", _at_most(8)),
    (r"sliding_window(_size)?|.*chunk_size|block_size|index_block_size|attention_chunk_size",
     _at_most(8)),
    (r"index_topk|d_rel|rel_extent|index_kpool", _at_most(8)),
    (r".*period|.*_every_n.*|.*_interval|.*_pattern|.*_multiple.*|.*patch.*|.*kernel.*|.*_step",
     lambda value: value),
    (r".*hidden_size.*|d_model|embed_dim|.*(in|out)_dim|.*input_size", HIDDEN_SIZE),
    (r".*intermediate_size.*|ffn_dim|.*mlp_dim", 48),
    (r".*(lora_rank|lowrank|_rank)|.*state_size|.*d_state|.*embed_dim|.*_dim|.*dt_rank",
     _at_most(32)),
)  # fmt: skip
# A field that had the value of another keeps it.
_EQUAL = (
    ("num_key_value_heads", "num_attention_heads"),
    ("head_dim", "qk_rope_head_dim"),
    ("v_head_dim", "qk_nope_head_dim"),
)
_STEPS = r".*period|.*_every_n.*|.*_interval|.*_pattern|layer_group_size"


def twin(config: PreTrainedConfig) -> PreTrainedModel:
    """A real model with random float32 weights, of `config`'s family and a thousandth of its size.

    Raises Unsupported when the shrunken sizes do not fit each other in this family.
    """
    try:
        small = shrink(config)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = model_class(small).build(torch.float32)
            _stir(model)
    except Exception as error:  # whatever a family's own code raises for sizes it does not like
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise Unsupported(f"no tiny `{config.model_type}` can be built: {reason}") from error
    model.train(False)
    return model


def shrink(config: PreTrainedConfig, **changes: Any) -> PreTrainedConfig:
    """`config` with its sizes shrunk; `changes` are set last, in the text configuration."""
    fields = _shrunk(config.to_dict())
    name = next((n for n in config.sub_configs if n == "text_config"), None)
    (fields[name] if name else fields).update(changes)
    return type(config)(**fields)


def _shrunk(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of one configuration, those of the configurations within it too."""
    layers = _layers(fields)
    small: dict[str, Any] = {}
    for name, value in fields.items():
        if name != "per_layer_config":
            small[name] = _field(name, value, fields, layers)
    _agree(small, fields)
    if isinstance(own := fields.get("per_layer_config"), Mapping):
        kept = {key: values for key, values in own.items() if int(key) < (layers or 0)}
        small["per_layer_config"] = {k: _differing(fields, v, small) for k, v in kept.items()}
    return small


def _differing(
    fields: Mapping[str, Any], own: Mapping[str, Any], small: Mapping[str, Any]
) -> dict[str, Any]:
    """What one layer has of its own, and what that changes in it."""
    common = {name: value for name, value in fields.items() if name != "per_layer_config"}
    merged = _shrunk(common | dict(own))
    return {
        name: value for name, value in merged.items() if name in own or value != small.get(name)
    }


def _field(name: str, value: Any, fields: Mapping[str, Any], layers: int | None) -> Any:
    whole = fields.get("num_hidden_layers")
    if isinstance(value, bool) or value is None:
        return value
    if name == "num_hidden_layers":
        return layers
    if name == "initializer_range":
        return INITIALIZER_RANGE
    if name.endswith("_config") and isinstance(value, Mapping):
        return _shrunk(value)
    if name.endswith("_token_id"):
        return _token(value)
    if name.startswith("rope_") and isinstance(value, Mapping):
        return _rope(value)
    if isinstance(value, (list, tuple)) and layers and len(value) in (whole, layers):
        value = list(value)[:layers]
    if isinstance(value, (list, tuple)) and value and name.endswith("_layers"):
        return [item for item in value if not isinstance(item, int) or item < (layers or item + 1)]
    if isinstance(value, list):
        return [_size(name, item) for item in value]
    return _size(name, value)


def _size(name: str, value: Any) -> Any:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        return value
    for pattern, rule in _RULES:
        if re.fullmatch(pattern, name):
            return rule if isinstance(rule, int) else rule(value)
    return value


def _token(value: Any) -> Any:
    if isinstance(value, list):
        return [_token(item) for item in value]
    return value % VOCABULARY if isinstance(value, int) else value


def _layers(fields: Mapping[str, Any]) -> int | None:
    """The fewest first layers that hold every kind of layer."""
    whole = fields.get("num_hidden_layers")
    if not isinstance(whole, int):
        return None
    lists = [v for v in fields.values() if isinstance(v, (list, tuple)) and len(v) == whole]
    rows = list(zip(*(map(str, values) for values in lists), strict=True)) if lists else []
    firsts = [rows.index(row) for row in set(rows)]
    steps = [v for k, v in fields.items() if re.fullmatch(_STEPS, k) and isinstance(v, int)]
    return min(whole, MAX_LAYERS, max([3, *(first + 1 for first in firsts), *steps]))


def _rope(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings, of which some families have one set a kind of layer."""
    small = {k: _rope(v) if isinstance(v, Mapping) else v for k, v in fields.items()}
    if sections := fields.get("mrope_section"):
        half = int(HEAD_DIM * (fields.get("partial_rotary_factor") or 1)) // 2
        shares = [section * half // sum(sections) for section in sections]
        # What division leaves goes to a section that need not equal another.
        odd = next((i for i, size in enumerate(sections) if sections.count(size) == 1), 0)
        shares[odd] += half - sum(shares)
        small["mrope_section"] = shares
    return small


def _agree(small: dict[str, Any], fields: Mapping[str, Any]) -> None:
    """Sizes that must fit each other."""
    for name, other in _EQUAL:
        if fields.get(name) is not None and fields.get(name) == fields.get(other):
            small[name] = small[other]
    heads, expand = small.get("mamba_n_heads"), small.get("mamba_expand")
    if heads and expand and "mamba_d_head" in small:
        small["mamba_d_head"] = small["hidden_size"] * expand // heads
    nope, rope = fields.get("qk_nope_head_dim") or 0, fields.get("qk_rope_head_dim") or 0
    for name in [n for n in fields if n.endswith("head_dim") and nope and rope]:
        if fields[name] == nope + rope:
            small[name] = small["qk_nope_head_dim"] + small["qk_rope_head_dim"]
    settings = small.get("rope_parameters")
    share = rope / (nope + rope) if nope and rope else None
    if isinstance(settings, dict) and settings.get("partial_rotary_factor", 0) == share:
        whole = small["qk_nope_head_dim"] + small["qk_rope_head_dim"]
        settings["partial_rotary_factor"] = small["qk_rope_head_dim"] / whole


def _stir(model: PreTrainedModel) -> None:
    """Make every weight matter: what families set to zeros or ones at first becomes noise."""
    for tensor in model.state_dict().values():
        many = tensor.is_floating_point() and tensor.numel() > 1
        if many and bool((tensor == tensor.flatten()[0]).all()):
            tensor.data.add_(torch.randn_like(tensor) * INITIALIZER_RANGE)
