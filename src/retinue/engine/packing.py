"""Packs a checkpoint, and checks a pack: what `retinue pack` does, without its words."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from retinue.config import Config
from retinue.errors import CheckpointError, RetinueError, UsageError
from retinue.memory.budget import budget_bytes
from retinue.memory.checkpoint import open_checkpoint
from retinue.memory.files import Reader
from retinue.memory.home import PACK_PROFILE
from retinue.memory.hub import TEXT_FILES
from retinue.memory.hub_cache import name_of
from retinue.memory.intake import check_expert, read_plain
from retinue.memory.machine import cores
from retinue.memory.manifest import Manifest, precision_of, read_manifest, settings_of
from retinue.memory.pack import INDEX, PackFolder, check_space, identity_of
from retinue.memory.quantised import PackedEntry
from retinue.memory.tier import Tier
from retinue.model.load import Network, build, read_tensor
from retinue.model.packing import Packer, source_of
from retinue.model.profiles import find_profile
from retinue.model.quantise import already_quantised
from retinue.model.survey import facts_of
from retinue.types import Expert

Advance = Callable[[int, int], object]  # bytes that are done now, and all


def pack(
    folder: Path, out: Path, precision: str, config: Config, advance: Advance
) -> dict[str, Any]:
    """Write the model of `folder` to `out` in `precision`; the pack's summary.

    Goes on where an earlier call was ended, and has nothing to do where one was not. Raises
    Unsupported for checkpoints that are quantised already, UsageError where something else is at
    `out`, DoesNotFit, WriteError, and what reading raises.
    """
    checkpoint = open_checkpoint(folder)
    if (packed := precision_of(checkpoint.config)) is not None:
        raise already_quantised(packed)
    target = PackFolder(out.absolute(), identity_of(precision, source_of(checkpoint)))
    written = not target.is_done()
    if written and target.is_finished():
        target.name()
    elif written:
        torch.set_num_threads(1)  # experts are encoded side by side
        network = build(checkpoint, precision)
        threads = config.threads or cores()
        packer = Packer(network, target, budget_bytes(config.memory), threads)
        target.begin()
        check_space(target, packer.pack_bytes)
        manifest = Manifest(precision, name_of(folder), target.identity["source"])
        places = packer.run(manifest, lambda count: advance(count, packer.read_bytes))
        target.finish(manifest, _config(network, precision), _others(network, places))
    return read_manifest(target.out).summary | {"written": written}


def _config(network: Network, precision: str) -> dict[str, Any]:
    content = dict(network.checkpoint.config)
    if not {"dtype", "torch_dtype"} & content.keys():
        content["dtype"] = str(network.model.dtype).removeprefix("torch.")
    return content | {"quantization_config": settings_of(precision)}


def _others(network: Network, places: dict[str, str]) -> dict[str, Path | str]:
    """What makes a pack self-contained besides its weights: files to copy, and texts."""
    folder = network.checkpoint.folder
    result: dict[str, Path | str] = {
        name: folder / name
        for name in (*sorted(TEXT_FILES), "README.md", "LICENSE")
        if (folder / name).is_file() and name not in ("config.json", INDEX)
    }
    result[INDEX] = json.dumps({"metadata": {}, "weight_map": places})
    try:
        profile = find_profile(folder, facts_of(network), None)
    except RetinueError:
        return result
    result[PACK_PROFILE] = json.dumps(profile.as_dict(), ensure_ascii=False)
    return result


def damaged(folder: Path, advance: Advance) -> tuple[list[CheckpointError], int]:
    """Compare all of a pack with its checksums: what is wrong, and how much was looked at.

    Raises UsageError for what is no pack, CheckpointError where its description is damaged.
    """
    checkpoint = open_checkpoint(folder)
    if precision_of(checkpoint.config) is None:
        raise UsageError(f"`{folder}` is no pack", hint="`retinue pack MODEL OUT` makes one")
    network = build(checkpoint)
    entries = [
        part
        for entry in network.checkpoint.tensors.values()
        for part in ((entry.weights, entry.scales) if isinstance(entry, PackedEntry) else (entry,))
    ]
    rows = network.experts.layouts
    experts = [
        (Expert(layer, index), layout)
        for layer, row in enumerate(rows)
        for index, layout in enumerate(row)
    ]
    whole = sum(entry.stop - entry.start for entry in entries)
    whole += sum(layout.read_bytes for _, layout in experts)
    wrong, reader = [], Reader()
    memory = Tier(1, max(layout.slot_bytes for _, layout in experts)).memory(0)
    try:
        for entry in entries:
            try:
                read_tensor(entry, reader)
            except CheckpointError as error:
                wrong.append(error)
            advance(entry.stop - entry.start, whole)
        for key, layout in experts:
            try:
                read_plain(layout, memory, reader)
                check_expert(key, layout, memory)
            except CheckpointError as error:
                wrong.append(error)
            advance(layout.read_bytes, whole)
    finally:
        reader.close()
    return wrong, len(entries) + len(experts)
