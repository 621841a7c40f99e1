"""What a checkpoint needs, from its headers and configuration alone; remembered on disk.

Building the skeleton takes seconds, because torch and transformers are imported for it. What was
learnt is kept under the user's cache folder, keyed by the files' names, sizes and times.
"""

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from retinue import __version__
from retinue.errors import CheckpointError
from retinue.memory.hub_cache import name_of
from retinue.memory.machine import cache_folder
from retinue.types import Facts

if TYPE_CHECKING:
    from retinue.model.load import Network


def survey(folder: Path) -> Facts:
    """The facts of the checkpoint in `folder`; from the cache if its files are unchanged."""
    store = cache_folder() / f"facts-{_fingerprint(folder)}.json"
    with suppress(OSError, ValueError, TypeError):
        return Facts(**json.loads(store.read_text()))
    from retinue.memory.checkpoint import open_checkpoint
    from retinue.model.load import build

    facts = facts_of(build(open_checkpoint(folder)))
    with suppress(OSError):
        store.parent.mkdir(parents=True, exist_ok=True)
        store.write_text(json.dumps(asdict(facts)))
    return facts


def facts_of(network: "Network") -> Facts:
    """The facts of a skeleton that is built already."""
    config, model = network.text_config, network.model
    layouts = [layout for row in network.experts.layouts for layout in row]
    item = model.dtype.itemsize
    routed = tuple(found.name + "." for found in network.experts.modules)
    dense = sum(
        parameter.numel() * parameter.dtype.itemsize
        for name, parameter in model.named_parameters()
        if not name.startswith(routed)
    )
    tied = bool(getattr(config, "tie_word_embeddings", False))
    embedding_bytes = config.vocab_size * config.hidden_size * item
    dense_per_token = dense if tied else dense - embedding_bytes
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_width = 2 * config.num_key_value_heads * head_dim
    modules = network.experts.modules
    expert_bytes = max(layout.weight_bytes for layout in layouts)
    per_token = dense_per_token + network.top_k * len(modules) * expert_bytes
    return Facts(
        name=name_of(network.checkpoint.folder),
        family=model.config.model_type,
        dtype=str(model.dtype).removeprefix("torch."),
        layers=config.num_hidden_layers,
        moe_layers=len(modules),
        experts_per_layer=max(found.experts for found in modules),
        total_experts=len(layouts),
        top_k=network.top_k,
        expert_bytes=expert_bytes,
        slot_bytes=max(layout.slot_bytes for layout in layouts),
        dense_bytes=dense,
        dense_bytes_per_token=dense_per_token,
        kv_bytes_per_token=kv_width * config.num_hidden_layers * item,
        max_context=int(config.max_position_embeddings),
        vocab_size=config.vocab_size,
        workspace_bytes=(48 << 20) + config.vocab_size * 4 * 6,
        workspace_bytes_per_context=2 * config.num_attention_heads * head_dim * item,
        workspace_bytes_per_token=_workspace_per_token(network, head_dim),
        workspace_bytes_per_pair=3 + item,
        flops_per_token=2 * per_token // item,
    )


def _workspace_per_token(network: "Network", head_dim: int) -> int:
    """Bytes of activations a token of a prefill chunk: attention or experts, whichever is more."""
    config, item = network.text_config, network.model.dtype.itemsize
    hidden = config.hidden_size
    query = config.num_attention_heads * head_dim
    key_value = 2 * config.num_key_value_heads * head_dim
    inner = max(
        tensor.shape[1] for found in network.experts.modules for tensor in found.module.parameters()
    )
    stream = 3 * hidden * item
    norms = 3 * 4 * max(hidden, query)
    attention = norms + (4 * query + 2 * key_value) * item
    # In the worst case one expert is chosen by every token.
    experts = network.top_k * hidden * item + (2 * hidden + 2 * inner) * item
    return int(stream + max(attention, experts))


def _fingerprint(folder: Path) -> str:
    """Changes whenever a file of the checkpoint, or retinue, does."""
    if not folder.is_dir():
        raise CheckpointError(
            f"no such folder: `{folder}`",
            hint="give a local checkpoint folder, or `sample` for the model that ships along",
        )
    digest = hashlib.sha256(f"{__version__} {folder.resolve()}".encode())
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".safetensors"):
            status = file.stat()
            digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:24]
