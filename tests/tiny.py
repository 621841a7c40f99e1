"""Tiny random models of every family of the installed transformers whose experts are decorated.

The families are found by reading transformers; `FIELDS` only fills in what the default
configurations of some lack: sizes that have no default, or switches without which there are no
experts.
"""

import functools
import re
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from retinue.errors import Unsupported
from retinue.model.architecture import model_class
from retinue.model.twin import VOCABULARY as VOCABULARY

_DECORATED = re.compile(r"^@use_experts_implementation", re.MULTILINE)
_HYBRID = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
_SPARSE = ["dense", "sparse", "sparse"]
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [22, 22, 20]}
_GEMMA = {
    "enable_moe_block": True,
    "num_experts": 128,
    "top_k_experts": 8,
    "moe_intermediate_size": 704,
}

FIELDS: dict[str, dict[str, Any]] = {
    "deepseek_ocr2": {"mlp_layer_types": _SPARSE, "num_hidden_layers": 3, "num_experts_per_tok": 6},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {
        "n_routed_experts": 128,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "layer_types": _SLIDING,
    },
    "ernie4_5_vl_moe": {"rope_parameters": _MROPE},
    "gemma4": _GEMMA,
    "gemma4_text": _GEMMA,
    "glm4v_moe": {"rope_parameters": _MROPE | {"partial_rotary_factor": 0.5}},
    "granitemoehybrid": {"layer_types": _HYBRID, "num_hidden_layers": 4},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 16, "moe_topk": 2},
    "lfm2_moe": {
        "layer_types": ["conv", "conv", "full_attention", "conv", "full_attention"],
        "num_hidden_layers": 5,
    },
    "qwen4_exp": {
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "indexer_head_dim": 256,
        "indexer_kv_heads": 1,
        "indexer_n_heads": 4,
        "output_gate_type": "sigmoid",
    },
    "mixtral": {"sliding_window": 4096},
}
FIELDS["qwen4_exp_text"] = FIELDS["qwen4_exp"]


@functools.cache
def decorated_families() -> list[str]:
    """The folders of transformers whose modelling file decorates an experts class."""
    root = Path(transformers.__file__).parent / "models"
    return sorted(
        file.parent.name
        for file in root.glob("*/modeling_*.py")
        if re.search(
            r"^@use_experts_implementation", file.read_text(encoding="utf-8"), re.MULTILINE
        )
    )


@functools.cache
def families() -> dict[str, list[str]]:
    """Family -> the names of its configurations that have a class which continues a text."""
    found: dict[str, list[str]] = {name: [] for name in decorated_families()}
    for name, kind in CONFIG_MAPPING_NAMES.items():
        family = getattr(transformers, kind).__module__.split(".")[2]
        if family in found and _is_served(name):
            found[family].append(name)
    return found


def _is_served(name: str) -> bool:
    try:
        model_class(config_of(name))
    except Unsupported:
        return False
    return True


def config_of(name: str, **fields: Any) -> PreTrainedConfig:
    """The default configuration of `name`, with what it lacks."""
    kind = getattr(transformers, CONFIG_MAPPING_NAMES[name])
    own = FIELDS.get(name, {}) | fields
    if "text_config" in kind.sub_configs and own:
        return kind(text_config=own)
    return kind(**own)
