"""What a checkpoint weighs, read from its headers alone.

On purpose not through retinue: what a benchmark divides by should not come from what it measures.
"""

import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_EXPERT = re.compile(r"(?:^|\.)layers\.(\d+)\..*\bexperts\.")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


class NoCheckpointError(Exception):
    """A folder that holds no checkpoint with experts; the text says what is missing."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One checkpoint folder in numbers."""

    folder: Path
    family: str
    total_bytes: int
    expert_bytes: int  # of all routed experts together
    experts: int
    top_k: int

    @property
    def name(self) -> str:
        """The folder's own name: results should not tell where it lay."""
        return self.folder.name

    @property
    def dense_bytes(self) -> int:
        """Of everything that is not a routed expert."""
        return self.total_bytes - self.expert_bytes

    @property
    def files(self) -> list[Path]:
        """Its shards."""
        return sorted(self.folder.glob("*.safetensors"))


def inspect(folder: Path) -> Checkpoint:
    """Weigh the checkpoint in `folder`. Raises NoCheckpointError where there is none."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NoCheckpointError(f"no checkpoint in `{folder}`: {error}") from error
    total = routed = 0
    layers = set()
    for file in folder.glob("*.safetensors"):
        for key, entry in _header(file).items():
            first, last = entry["data_offsets"]
            total += last - first
            if found := _EXPERT.search(key):
                routed += last - first
                layers.add(found[1])
    text = config.get("text_config", config)
    per_layer = next((text[key] for key in _EXPERT_COUNTS if key in text), 0)
    if not routed or not per_layer:
        raise NoCheckpointError(f"no routed experts in `{folder}`")
    return Checkpoint(
        folder=folder,
        family=text.get("model_type", config["model_type"]),
        total_bytes=total,
        expert_bytes=routed,
        experts=len(layers) * per_layer,
        top_k=text.get("num_experts_per_tok", 1),
    )


def _header(file: Path) -> dict[str, dict[str, Any]]:
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header: dict[str, dict[str, Any]] = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    return header
