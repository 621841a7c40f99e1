"""Writes a pack: the model's own tensors, its linear layers and experts in another precision.

Files are written one after the other, and what is written depends on the checkpoint and the
precision alone: an interrupted pack goes on to the same bytes.
"""

import hashlib
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from retinue.errors import DoesNotFit
from retinue.memory.budget import RESERVE_BYTES, RUNTIME_BYTES
from retinue.memory.checkpoint import Checkpoint, TensorEntry
from retinue.memory.files import Reader
from retinue.memory.grouped import Grouped, encode
from retinue.memory.manifest import CODES, SCALES, Manifest
from retinue.memory.pack import PackFolder, Slab, TensorFile
from retinue.model.load import Network, bytes_of, read_tensor, row_bands
from retinue.model.pack_experts import (
    SCRATCH_BYTES,
    Advance,
    Distance,
    ExpertsFile,
    Stages,
    not_finite,
)
from retinue.model.quantise import DenseLinear

SHARD_BYTES = 1 << 30  # of dense tensors; experts have a file for each module
_SAMPLES, _SAMPLE_BYTES = 8, 4096


@dataclass(frozen=True, slots=True)
class _Dense:
    """A tensor of the dense part: copied, or encoded as a layer is.

    A head that shares the embedding has its `entry` too, and bytes of its own in the pack.
    """

    key: str
    entry: TensorEntry
    linear: DenseLinear | None

    @property
    def slabs(self) -> list[Slab]:
        """What it is in the pack."""
        if self.linear is None:
            return [Slab(self.key, self.entry.dtype, self.entry.shape)]
        form = self.linear.form
        return [
            Slab(self.key + CODES, "U8", form.weights_shape),
            Slab(self.key + SCALES, "BF16", form.scales_shape),
        ]


class Packer:
    """Writes the model of `network`, which was built in a precision, into `folder`.

    `memory` bounds the process; at most `threads` experts are worked on at once.
    """

    def __init__(self, network: Network, folder: PackFolder, memory: int, threads: int) -> None:
        self._network, self._folder = network, folder
        layouts = [layout for row in network.experts.layouts for layout in row]
        plain = [layout.plain for layout in layouts if layout.plain is not None]
        stage, slot = (max(each.slot_bytes for each in found) for found in (plain, layouts))
        fixed, each = RUNTIME_BYTES + RESERVE_BYTES, stage + slot + SCRATCH_BYTES
        if memory < fixed + each:
            raise DoesNotFit(
                f"to pack `{network.checkpoint.folder.name}` takes {fixed + each} bytes of memory",
                smallest_bytes=fixed + each,
                hint=f"use `--memory {fixed + each}` or more",
            )
        self._stages = Stages(min(threads, (memory - fixed) // each), stage, slot)
        self._shards = list(_shards(_dense_of(network)))
        dense = [item for shard in self._shards for item in shard]
        self.read_bytes = sum(layout.weight_bytes for layout in plain)
        self.read_bytes += sum(item.entry.stop - item.entry.start for item in dense)
        self.pack_bytes = sum(layout.slot_bytes for layout in layouts)
        self.pack_bytes += sum(slab.size for item in dense for slab in item.slabs)

    def run(self, manifest: Manifest, advance: Advance) -> dict[str, str]:
        """Write what is not there yet, describe it, and say which tensor is in which file.

        Raises WriteError, ReadError, and NotFinite for weights that are no numbers.
        """
        reader, places = Reader(), dict[str, str]()
        errors: dict[str, list[float]] = {}
        dense_errors: dict[str, float] = {}
        try:
            for number, shard in enumerate(self._shards):
                name = f"dense-{number:05}.safetensors"
                record = self._dense(name, shard, reader, advance)
                manifest.checksums |= record["checksums"]
                dense_errors |= record["errors"]
                places |= {slab.name: name for item in shard for slab in item.slabs}
            manifest.dense = {
                item.key: (item.linear.form.rows, item.linear.form.columns)
                for shard in self._shards
                for item in shard
                if item.linear is not None
            }
            with ThreadPoolExecutor(self._stages.count) as pool:
                for number, found in enumerate(self._network.experts.modules):
                    name = f"experts-{number:05}.safetensors"
                    layouts = self._network.experts.layouts[found.layer]
                    work = ExpertsFile(found, layouts, reader, self._stages)
                    record = self._experts(name, work, pool, advance)
                    manifest.experts[found.name] = work.description(record["checksums"])
                    errors[found.name] = record["errors"]
                    places[work.slab.name] = name
        finally:
            reader.close()
        manifest.summary = self._summary(errors, dense_errors)
        return places

    def _experts(
        self, name: str, work: ExpertsFile, pool: ThreadPoolExecutor, advance: Advance
    ) -> dict[str, Any]:
        record = self._folder.record(name)
        if record is not None:
            advance(work.read_bytes)
            return record
        with self._folder.file(name, [work.slab]) as (file, record):
            record |= work.write(file, pool, advance)
        return record

    def _dense(
        self, name: str, shard: "list[_Dense]", reader: Reader, advance: Advance
    ) -> dict[str, Any]:
        record = self._folder.record(name)
        if record is not None:
            advance(sum(item.entry.stop - item.entry.start for item in shard))
            return record
        slabs = [slab for item in shard for slab in item.slabs]
        with self._folder.file(name, slabs) as (file, record):
            record |= {"checksums": {}, "errors": {}}
            for item in shard:
                if item.linear is None:
                    record["checksums"][item.key] = _copy(item, file, reader)
                else:
                    checksums, error = _encode(item, item.linear.form, file, reader)
                    record["checksums"] |= checksums
                    record["errors"][item.key] = error
                advance(item.entry.stop - item.entry.start)
        return record

    def _summary(self, errors: dict[str, list[float]], dense: dict[str, float]) -> dict[str, Any]:
        """Sizes, and relative L2 errors of experts and dense layers."""
        weights = _weights(self._network)
        each = [
            (error, found.layer, index)
            for found in self._network.experts.modules
            for index, error in enumerate(errors[found.name])
        ]
        worst, layer, expert = max(each)
        name = max(dense, key=dense.__getitem__) if dense else None
        return {
            "weights": weights,
            "bytes_before": self.read_bytes,
            "bytes_after": self.pack_bytes,
            "bits_per_weight": self.pack_bytes * 8 / weights,
            "error_mean": sum(error for error, _, _ in each) / len(each),
            "error_worst": worst,
            "error_worst_layer": layer,
            "error_worst_expert": expert,
            "dense_error_mean": sum(dense.values()) / max(1, len(dense)),
            "dense_error_worst": max(dense.values(), default=0.0),
            "dense_error_worst_name": name,
        }


def source_of(checkpoint: Checkpoint) -> str:
    """A digest that tells a checkpoint from others: its tensors' places, and samples of bytes."""
    digest = hashlib.sha256((checkpoint.folder / "config.json").read_bytes())
    for name, entry in sorted(checkpoint.tensors.items()):
        place = f"{name} {entry.dtype} {entry.shape} {entry.file.name} {entry.start}\n"
        digest.update(place.encode())
    for file in checkpoint.files:
        size = file.stat().st_size
        with file.open("rb") as handle:
            for sample in range(_SAMPLES):
                handle.seek(size * sample // _SAMPLES)
                digest.update(handle.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _dense_of(network: Network) -> Iterator[_Dense]:
    linears = {linear.key: linear for linear in network.linears}
    tensors = network.checkpoint.tensors
    for key in network.experts.dense:
        yield _Dense(key, tensors[key], linears.get(key))
    for linear in network.linears:
        if linear.key is None:
            yield _Dense(f"{linear.name}.weight", tensors[_embedding_key(network)], linear)


def _embedding_key(network: Network) -> str:
    weight = network.model.get_input_embeddings().weight
    names = [name for name, found in network.model.named_parameters() if found is weight]
    return next(key for key, target in network.experts.dense.items() if target in names)


def _shards(dense: Iterator[_Dense]) -> Iterator[list[_Dense]]:
    """Tensors in files that are not large."""
    shard: list[_Dense] = []
    size = 0
    for item in dense:
        added = sum(slab.size for slab in item.slabs)
        if shard and size + added > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(item)
        size += added
    if shard:
        yield shard


def _copy(item: _Dense, file: TensorFile, reader: Reader) -> int:
    """Copy a tensor as it is; returns its checksum."""
    place, checksum = 0, 0
    for data in bytes_of(item.entry, reader):
        file.write(item.key, place, data)
        place, checksum = place + len(data), zlib.crc32(data, checksum)
    return checksum


def _encode(
    item: _Dense, form: Grouped, file: TensorFile, reader: Reader
) -> tuple[dict[str, int], float]:
    """Encode a matrix some rows at a time; the checksums of both tensors, and its error."""
    sums, places, distance = {CODES: 0, SCALES: 0}, {CODES: 0, SCALES: 0}, Distance()
    for _, rows in row_bands(form, item.entry, None, partial(read_tensor, reader=reader)):
        band = Grouped(form.bits, len(rows), form.columns)
        codes = torch.empty(band.weights_shape, dtype=torch.uint8)
        scales = torch.empty(band.scales_shape, dtype=torch.bfloat16)
        encode(band, rows, codes, scales)
        distance.add(band.decode(codes, scales, torch.float32), rows)
        for end, tensor in ((CODES, codes), (SCALES, scales)):
            data = memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
            file.write(item.key + end, places[end], data)
            sums[end], places[end] = zlib.crc32(data, sums[end]), places[end] + len(data)
    if not distance.is_finite:
        raise not_finite(f"the weight `{item.key}`", item.entry.file)
    return {item.key + end: checksum for end, checksum in sums.items()}, distance.relative


def _weights(network: Network) -> int:
    """How many numbers the model has, but for those that text does not pass through."""
    routed = sum(
        parameter.numel()
        for found in network.experts.modules
        for parameter in found.module.parameters(recurse=False)
    )
    dense = sum(
        parameter.numel()
        for name, parameter in network.model.named_parameters()
        if network.experts.is_dense(name)
    )
    return routed + dense
