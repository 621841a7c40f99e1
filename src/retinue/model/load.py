"""Builds the network without its experts: skeleton on meta, everything else through transformers.

The loader functions of transformers that are used here are internal to it; they stay in this
file and in `expert_map.py`, and pyproject.toml pins the minor range that was tested.
"""

import json
import sys
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.initialization import no_init_weights
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from retinue.config import AS_IS
from retinue.errors import CheckpointError, Unsupported
from retinue.memory.checkpoint import Checkpoint, TensorEntry
from retinue.memory.files import ALIGNMENT, Reader
from retinue.memory.grouped import LANES, Grouped, encode
from retinue.memory.layout import STORED_DTYPES, TORCH_DTYPES
from retinue.memory.manifest import explain_pack, precision_of
from retinue.memory.quantised import PackedEntry, explain
from retinue.metrics import Clock
from retinue.model.architecture import model_class
from retinue.model.expert_map import ExpertMap, map_experts
from retinue.model.grouped_linear import GroupedLinear
from retinue.model.linear import use_row_linears
from retinue.model.quantise import (
    DenseLinear,
    already_quantised,
    embedding_rows,
    encoded_experts,
    linears_to_encode,
    stored_linears,
)
from retinue.model.routing import top_k
from retinue.model.stored_embedding import StoredEmbedding, stored_embedding
from retinue.types import FloatArray

PART_BYTES = 8 << 20  # of a tensor that is read without being kept

# Besides weights there are tables: which experts a token goes to, say.
_ALL_DTYPES = STORED_DTYPES | {
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class Network:
    """A model whose experts are on meta and whose other weights are where `load_dense` put them.

    `linears` are the dense layers that are kept in int8 or int4.
    """

    model: PreTrainedModel
    checkpoint: Checkpoint
    experts: ExpertMap
    dense: Clock  # time in linear layers, and in attention where the engine installs its own
    linears: tuple[DenseLinear, ...] = ()

    @property
    def text_config(self) -> PreTrainedConfig:
        """The configuration of the language model itself."""
        return self.model.config.get_text_config()

    @property
    def stored_embedding(self) -> TensorEntry | None:
        """The embedding's tensor, if its rows may stay in their file."""
        return stored_embedding(self.model, self.checkpoint, self.experts)

    @property
    def top_k(self) -> int:
        """The most experts of one layer that a token is routed to."""
        return top_k(self.model, self.text_config, self.experts.modules)

    @torch.inference_mode()
    def mean_embedding(self, token_ids: Sequence[int]) -> FloatArray:
        """The mean of the tokens' input embeddings: [hidden]."""
        embed = self.model.get_input_embeddings()
        vectors = embed(torch.tensor([list(token_ids)]))[0]
        return np.asarray(vectors.float().mean(dim=0).numpy(), dtype=np.float32)


def build(checkpoint: Checkpoint, precision: str = AS_IS) -> Network:
    """The skeleton of `checkpoint`'s model: parameters on meta, buffers real, nothing read.

    Raises Unsupported where it cannot be had in `precision`.
    """
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise Unsupported(f"transformers cannot read `{checkpoint.folder}`: {reason}") from error
    packed = precision_of(checkpoint.config)
    if packed is not None and precision not in (AS_IS, packed):
        raise already_quantised(packed)
    checkpoint = explain(checkpoint) if packed is None else explain_pack(checkpoint)
    # The skeleton is the plain model's; what is stored otherwise is decoded when it is used.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    chosen = model_class(config)
    dtype = _dtype(config, checkpoint)
    with _parameters_on_meta(), no_init_weights():
        model = chosen.build(dtype)
    clock = use_row_linears(model)
    model.tie_weights()
    model.train(False)
    experts, linears = map_experts(model, checkpoint), list[DenseLinear]()
    if packed is not None:
        linears = stored_linears(checkpoint, experts)
    elif precision != AS_IS:
        linears = linears_to_encode(model, checkpoint, experts, precision)
        experts = encoded_experts(experts, precision)
    return Network(model, checkpoint, experts, clock, tuple(linears))


def load_dense(network: Network, reader: Reader, *, embedding_stays: bool = False) -> None:
    """Load every weight that is not a routed expert; with `embedding_stays` not the embedding's.

    Raises CheckpointError when one is missing, damaged or has another shape.
    """
    model = network.model
    apart = {linear.key for linear in network.linears}
    if embedding_stays and (entry := network.stored_embedding) is not None:
        check_stored(entry, reader)
        model.set_input_embeddings(StoredEmbedding(entry, reader, model.dtype))
        apart.add(entry.name)
    wanted = {
        key: network.checkpoint.tensors[key] for key in network.experts.dense if key not in apart
    }
    state = {key: _LazyTensor(entry, reader, model.dtype) for key, entry in wanted.items()}
    config = LoadStateDictConfig(
        dtype=model.dtype,
        dtype_plan=model._get_dtype_plan(model.dtype),
        weight_mapping=get_model_conversion_mapping(model),  # type: ignore[arg-type]
    )
    with _quiet():
        info, _ = convert_and_load_state_dict_in_model(model, state, config)
    model.tie_weights()
    for linear in network.linears:  # one after the other, so that little is in memory twice
        _load_linear(network, linear, reader)
    _check_loaded(model, network.experts, info)


def _load_linear(network: Network, linear: DenseLinear, reader: Reader) -> None:
    """Put a layer with encoded weights in the place of a plain one whose bias is loaded."""
    model, form, read = network.model, linear.form, partial(read_tensor, reader=reader)
    owner, _, name = linear.name.rpartition(".")
    plain = model.get_submodule(linear.name)
    assert isinstance(plain, nn.Linear)
    entry = None if linear.key is None else network.checkpoint.tensors[linear.key]
    if isinstance(entry, PackedEntry):
        if entry.shape != tuple(plain.weight.shape):
            raise _other_shape(entry.name, entry.shape, tuple(plain.weight.shape))
        codes, scales = read(entry.weights), read(entry.scales)
    else:
        codes = torch.empty(form.weights_shape, dtype=torch.uint8)
        scales = torch.empty(form.scales_shape, dtype=torch.bfloat16)
        shared = embedding_rows(model) if entry is None else None
        for tiles, rows in row_bands(form, entry, shared, read):
            band = Grouped(form.bits, len(rows), form.columns)
            encode(band, rows, codes[tiles], scales[tiles])
    bias = None if plain.bias is None else plain.bias.data
    dtype = plain.weight.dtype
    layer = GroupedLinear(form, codes, scales, bias, network.dense, dtype)
    setattr(model.get_submodule(owner), name, layer)


def row_bands(
    form: Grouped,
    entry: TensorEntry | None,
    embedding: torch.Tensor | None,
    read: Callable[[TensorEntry], torch.Tensor],
) -> Iterator[tuple[slice, torch.Tensor]]:
    """The rows of a matrix, a few tiles at a time: of `entry`, or without one of `embedding`."""
    for start, stop in form.bands():
        tiles = slice(start // LANES, -(-stop // LANES))
        if entry is None:
            assert embedding is not None
            yield tiles, embedding[start:stop]
            continue
        row_bytes = form.columns * entry.item_bytes
        first, last = entry.start + start * row_bytes, entry.start + stop * row_bytes
        shape = (stop - start, form.columns)
        yield tiles, read(replace(entry, start=first, stop=last, shape=shape))


def _other_shape(name: str, found: Iterable[int], wanted: Iterable[int]) -> CheckpointError:
    return CheckpointError(
        f"tensor `{name}` has the shape {list(found)}, not {list(wanted)}",
        hint="config.json and the weights do not belong together",
    )


def _check_loaded(model: PreTrainedModel, experts: ExpertMap, info: Any) -> None:
    if info.mismatched_keys:
        name, found, wanted = next(iter(info.mismatched_keys))
        raise _other_shape(name, found, wanted)
    if info.conversion_errors:
        name, reason = next(iter(info.conversion_errors.items()))
        raise CheckpointError(f"tensor `{name}` cannot be converted: {reason}")
    for name, parameter in model.named_parameters():
        if parameter.is_meta and experts.is_dense(name):
            raise CheckpointError(
                f"the weight `{name}` is missing",
                hint="a shard is missing or the checkpoint is another model's",
            )


class _LazyTensor:
    """What transformers' loader sees of a tensor: its bytes are read when it is indexed."""

    def __init__(self, entry: TensorEntry, reader: Reader, dtype: torch.dtype) -> None:
        self._entry, self._reader, self._dtype = entry, reader, dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        if isinstance(self._entry, PackedEntry):
            return self._entry.decode(partial(read_tensor, reader=self._reader), self._dtype)[index]
        return read_tensor(self._entry, self._reader)[index]

    def get_shape(self) -> list[int]:
        return list(self._entry.shape)

    def get_dtype(self) -> str:
        return self._entry.dtype


def read_tensor(entry: TensorEntry, reader: Reader) -> torch.Tensor:
    """Read one tensor straight into its own memory.

    Raises ReadError when the disk fails, CheckpointError when the file is too short or its checksum
    is wrong, Unsupported for types that are no weights.
    """
    if entry.dtype not in _ALL_DTYPES:
        raise Unsupported(f"tensor `{entry.name}` has the type `{entry.dtype}`")
    lead = entry.start % ALIGNMENT
    direct = lead % entry.item_bytes == 0
    begin = entry.start - lead if direct else entry.start
    skip = entry.start - begin
    room = -(-(entry.stop - begin) // ALIGNMENT) * ALIGNMENT
    # Over-allocate by a page, and start at its first aligned byte, where direct reads may go.
    raw = torch.empty(room + ALIGNMENT, dtype=torch.uint8)
    base = -raw.data_ptr() % ALIGNMENT
    into = memoryview(raw.numpy())[base : base + room]  # type: ignore[arg-type]
    needed = entry.stop - begin
    got = reader.read(entry.file, begin, into if direct else into[:needed], direct=direct)
    if got < needed:
        raise CheckpointError(f"`{entry.file.name}` is truncated: it ends within `{entry.name}`")
    data = raw[base + skip : base + skip + (entry.stop - entry.start)]
    if entry.checksum is not None and zlib.crc32(data.numpy()) != entry.checksum:  # type: ignore[arg-type]
        raise _wrong_checksum(entry)
    return data.view(_ALL_DTYPES[entry.dtype]).view(entry.shape)


def bytes_of(entry: TensorEntry, reader: Reader) -> Iterator[memoryview]:
    """The bytes of a tensor, some MiB at a time, unchecked. Raises as `read_tensor` does."""
    for start in range(entry.start, entry.stop, PART_BYTES):
        stop = min(start + PART_BYTES, entry.stop)
        part = TensorEntry(entry.name, entry.file, "U8", (stop - start,), start, stop)
        yield memoryview(read_tensor(part, reader).numpy())  # type: ignore[arg-type]


def check_stored(entry: TensorEntry, reader: Reader) -> None:
    """Read a tensor once for its checksum, if it has one, and keep nothing of it.

    Raises CheckpointError where the checksum is wrong or the file too short.
    """
    if entry.checksum is None:
        return
    checksum = 0
    for part in bytes_of(entry, reader):
        checksum = zlib.crc32(part, checksum)
    if checksum != entry.checksum:
        raise _wrong_checksum(entry)


def _wrong_checksum(entry: TensorEntry) -> CheckpointError:
    return CheckpointError(
        f"`{entry.file.name}` is damaged: the checksum of `{entry.name}` is wrong",
        hint=f"look at the disk, delete `{entry.file.parent}` and pack the model again",
    )


def load_tokenizer(folder: Path) -> Any | None:
    """The checkpoint's tokenizer, or None where it has none."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(f"cannot load the tokenizer of `{folder}`: {error}") from error
    # What does not fit we refuse, with numbers; transformers would warn of it besides.
    tokenizer.model_max_length = sys.maxsize
    return tokenizer


def end_tokens(network: Network) -> frozenset[int]:
    """The token ids that end an answer, from the generation and the model configuration.

    A skeleton's own `generation_config` comes from `config.json`; the file beside it, in which
    chat models name further end tokens, comes first.
    """
    file, ids = network.checkpoint.folder / "generation_config.json", None
    if file.is_file():
        try:
            ids = dict(json.loads(file.read_text(encoding="utf-8"))).get("eos_token_id")
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"cannot read `{file}`: {error}") from error
    if ids is None:
        ids = getattr(network.text_config, "eos_token_id", None)
    return frozenset([ids] if isinstance(ids, int) else ids or [])


def _dtype(config: PreTrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    """The type that transformers would compute in: the configuration's, else the weights'."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    kinds = {e.dtype for e in checkpoint.tensors.values() if e.dtype in TORCH_DTYPES}
    return TORCH_DTYPES[min(kinds)] if len(kinds) == 1 else torch.float32


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Turn each parameter to meta as its module registers it; buffers stay real."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta:
            return parameter
        return nn.Parameter(parameter.to("meta"), requires_grad=False)

    handle = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own progress bars and load reports: ours are on stderr already."""
    had_bars = transformers_logging.is_progress_bar_enabled()
    level = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if had_bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
