"""What a checkpoint needs, from its headers and configuration alone; remembered on disk.

Building the skeleton takes seconds, because torch and transformers are imported for it. What was
learnt is kept under the user's cache folder, keyed by the files' names, sizes and times.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from retinue import __version__
from retinue.config import AS_IS
from retinue.errors import CheckpointError
from retinue.memory.hub_cache import name_of
from retinue.memory.machine import cache_folder
from retinue.types import Facts

if TYPE_CHECKING:
    from retinue.memory.layout import ExpertLayout
    from retinue.model.abilities import Abilities
    from retinue.model.load import Network

_Record = TypeVar("_Record")

WIDTHS = ("head_dim", "qk_head_dim", "v_head_dim")
UNKNOWN_CONTEXT = 1 << 17
KERNEL_PAIRS = 2048  # pairs of token and expert that the native library works on at a time
ENCODING_BYTES = 24 << 20  # scratch of a thread that encodes without the native kernels


def survey(folder: Path, precision: str = AS_IS) -> Facts:
    """The facts of the checkpoint in `folder`, its weights in memory in `precision`.

    From the cache if its files are unchanged. Raises what `build` raises.
    """

    def ask() -> Facts:
        from retinue.memory.checkpoint import open_checkpoint
        from retinue.model.load import build

        return facts_of(build(open_checkpoint(folder), precision))

    return _remembered(f"facts-embedding-{precision}", folder, Facts, ask)


def survey_abilities(network: "Network") -> "Abilities":
    """What the family of `network` can do, tried on a tiny twin once for its checkpoint."""
    from retinue.memory import native
    from retinue.model.abilities import Abilities, probe

    folder = network.checkpoint.folder
    kind = "family" if native.library() is None else "family-native"
    return _remembered(kind, folder, Abilities, lambda: probe(network.model.config))


def _remembered(
    kind: str, folder: Path, record: type[_Record], ask: Callable[[], _Record]
) -> _Record:
    """The record of this kind that is on disk for `folder`, or else what `ask` finds out."""
    salt = f"{__version__} {version('transformers')}"
    store = cache_folder() / f"{kind}-{fingerprint(folder, salt)}.json"
    with suppress(OSError, ValueError, TypeError):
        return record(**json.loads(store.read_text()))
    found: Any = ask()
    with suppress(OSError):
        store.parent.mkdir(parents=True, exist_ok=True)
        store.write_text(json.dumps(asdict(found)))
    return found  # type: ignore[no-any-return]


def facts_of(network: "Network") -> Facts:
    """The facts of a skeleton that is built already."""
    from retinue.model.state_size import state_size

    config, model = network.text_config, network.model
    layouts = [layout for row in network.experts.layouts for layout in row]
    item = model.dtype.itemsize
    encoded = {f"{linear.name}.weight": linear.form.stored_bytes for linear in network.linears}
    dense = sum(encoded.values()) + sum(
        parameter.numel() * parameter.dtype.itemsize
        for name, parameter in model.named_parameters()
        if network.experts.is_dense(name) and name not in encoded
    )
    # A head that is encoded has weights of its own.
    apart = any(linear.key is None for linear in network.linears)
    tied = bool(getattr(config, "tie_word_embeddings", False)) and not apart
    dense_per_token = dense if tied else dense - config.vocab_size * config.hidden_size * item
    heads, head_dim = _attention(config)
    state = state_size(model)
    modules = network.experts.modules
    expert_bytes = max(layout.weight_bytes for layout in layouts)
    stored, decoded = stored_precision(network)
    # As if nothing were encoded: what there is to compute stays the same.
    computed = dense_per_token + network.top_k * len(modules) * (decoded or expert_bytes)
    computed += sum(
        linear.form.rows * linear.form.columns * item - linear.form.stored_bytes
        for linear in network.linears
    )
    return Facts(
        name=name_of(network.checkpoint.folder),
        family=model.config.model_type,
        dtype=str(model.dtype).removeprefix("torch."),
        layers=config.num_hidden_layers,
        moe_layers=len(modules),
        routed=tuple(sorted(found.layer for found in modules)),
        experts_per_layer=max(found.experts for found in modules),
        total_experts=len(layouts),
        top_k=network.top_k,
        expert_bytes=expert_bytes,
        slot_bytes=max(layout.slot_bytes for layout in layouts),
        dense_bytes=dense,
        dense_bytes_per_token=dense_per_token,
        kv_bytes_per_token=state.per_token,
        max_context=_max_context(config),
        vocab_size=config.vocab_size,
        workspace_bytes=(48 << 20)
        + config.vocab_size * 4 * 6
        + decoded
        + _encoding(layouts)
        + _kernel_scratch(network),
        workspace_bytes_per_context=2 * heads * head_dim * item,
        workspace_bytes_per_token=_workspace_per_token(network, heads, head_dim),
        workspace_bytes_per_pair=3 + item,
        flops_per_token=2 * computed // item,
        state_bytes=state.fixed,
        stored=stored,
        decoded_bytes=decoded,
        plain_bytes=max(layout.plain.weight_bytes if layout.plain else 0 for layout in layouts),
        embedding_bytes=_embedding_bytes(network),
    )


def _embedding_bytes(network: "Network") -> int:
    """Of the embedding in memory, if its rows may stay in their file."""
    rows = network.stored_embedding
    return 0 if rows is None else prod(rows.shape) * network.model.dtype.itemsize


def _encoding(layouts: "list[ExpertLayout]") -> int:
    """What it takes to encode experts while they are read."""
    from retinue.memory.intake import stages_of

    stage = max(layout.plain.slot_bytes if layout.plain else 0 for layout in layouts)
    return stages_of(stage) * (stage + ENCODING_BYTES) if stage else 0


def stored_precision(network: "Network") -> tuple[str, int]:
    """The format of the experts, and the bytes of one when it is decoded; nothing if plain."""
    layouts = [layout for row in network.experts.layouts for layout in row]
    windows = {
        window for layout in layouts for found in layout.windows.values() for window in found
    }
    names = {window.format.name for window in windows if window.format is not None}
    if not names:
        return "", 0
    sizes = [
        sum(p.numel() for p in found.module.parameters(recurse=False)) // found.experts
        for found in network.experts.modules
    ]
    return ", ".join(sorted(names)), max(sizes) * network.model.dtype.itemsize


def _attention(config: Any) -> tuple[int, int]:
    """The most attention heads of a layer, and the widest of them."""
    layers = config.per_layer_config
    heads = max(getattr(layer, "num_attention_heads", 1) for layer in layers)
    widths = [getattr(layer, name, None) or 0 for layer in layers for name in WIDTHS]
    return heads, max(*widths, config.hidden_size // heads)


def _max_context(config: Any) -> int:
    """The longest sequence that the model was made for; long enough where it does not say."""
    return int(getattr(config, "max_position_embeddings", None) or UNKNOWN_CONTEXT)


def _inner(network: "Network") -> int:
    """The widest that a token becomes within an expert."""
    return max(
        tensor.shape[1]
        for found in network.experts.modules
        for tensor in found.module.parameters(recurse=False)
    )


def _kernel_scratch(network: "Network") -> int:
    """What the native kernels keep of the tokens that they work on, see native/retinue.h."""
    return KERNEL_PAIRS * (int(network.text_config.hidden_size) + _inner(network)) * 2


def _workspace_per_token(network: "Network", heads: int, head_dim: int) -> int:
    """Bytes of activations a token of a prefill chunk: attention or experts, whichever is more."""
    config, item = network.text_config, network.model.dtype.itemsize
    hidden = config.hidden_size
    query = heads * head_dim
    key_value = 2 * (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    inner = _inner(network)
    stream = 3 * hidden * item
    norms = 3 * 4 * max(hidden, query)
    attention = norms + (4 * query + 2 * key_value) * item
    # In the worst case one expert is chosen by every token. Native kernels give rows in fp32.
    experts = network.top_k * hidden * 4 + (2 * hidden + 2 * inner) * item
    return int(stream + max(attention, experts))


def fingerprint(folder: Path, salt: str = "") -> str:
    """Changes whenever a file of the checkpoint, its place or `salt` does.

    Raises CheckpointError where there is no such folder.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"no such folder: `{folder}`",
            hint="give a local checkpoint folder, or `sample` for the model that ships along",
        )
    digest = hashlib.sha256(f"{salt} {folder.resolve()}".encode())
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".safetensors"):
            status = file.stat()
            digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:24]
