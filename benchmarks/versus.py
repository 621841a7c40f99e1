"""Ours and a peer in turn, with the same work and the same limit: `in-memory` and `offload`."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks import ours, peer_accelerate, peer_transformers
from benchmarks.child import ChildFailedError, in_turn, run_child, timed
from benchmarks.group import memory_group
from benchmarks.results import Document, Report, Row, best, compare, values
from benchmarks.setting import Setting, fits_comfortably

from retinue.config import format_size

Engine = Callable[[], Document]


def in_memory(setting: Setting) -> Report:
    """Ours at its default memory against the fastest way of transformers, everything loaded."""
    checkpoint = setting.checkpoint
    if not fits_comfortably(checkpoint):
        size = format_size(checkpoint.total_bytes)
        return Report(notes=[f"left out: {size} of weights do not fit comfortably into memory"])
    counts = setting.counts(64, 32)
    engines: dict[str, Engine] = {
        "ours": partial(ours.bench, ours.bench_command(checkpoint.folder, **counts))
    }
    notes = []
    for name in peer_transformers.IMPLEMENTATIONS:
        if name == "batched_mm" and not fits_comfortably(checkpoint, _gathered(setting)):
            notes.append("batched_mm is left out: its copies of experts would exceed memory")
            continue
        command = peer_transformers.command(checkpoint.folder, name, **counts)
        engines[f"transformers {name}"] = partial(timed, command)
    turns = in_turn(setting.runs, engines)
    peers = {name: runs for name, runs in turns.runs.items() if name != "ours"}
    rows = _rows("in-memory", turns.runs["ours"], peers) if peers else []
    return Report(rows, [*notes, *turns.notes], turns.runs)


def _gathered(setting: Setting) -> int:
    """Bytes that batched_mm copies in one layer: the chosen experts of every token."""
    checkpoint = setting.checkpoint
    pairs: int = setting.counts(64, 32)["prompt_tokens"] * checkpoint.top_k
    return pairs * checkpoint.expert_bytes // checkpoint.experts


def _rows(benchmark: str, mine: list[Document], peers: dict[str, list[Document]]) -> list[Row]:
    """Each number against whichever peer is best at it."""
    for documents in (mine, *peers.values()):
        for document in documents:
            document["loaded_prefilled_s"] = document["load_s"] + document["prefill_s"]
    rows = []
    for key, what, unit, less in (
        ("decode_tokens_per_s", "decode", "tokens/s", False),
        ("prefill_tokens_per_s", "prefill", "tokens/s", False),
        ("loaded_prefilled_s", "load and prefill", "s", True),
        ("peak_rss_bytes", "peak memory", "bytes", True),
    ):
        name, other = best(peers, key, less_is_better=less)
        title = (benchmark, what, unit)
        rows.append(compare(title, values(mine, key), name, other, less_is_better=less))
    return rows


def offload(setting: Setting) -> Report:
    """Ours against transformers with accelerate, in groups of the same limit."""
    limit = setting.memory_bytes
    peer = _Offloading(setting)
    if peer.cpu_bytes <= 0:
        reserve = format_size(peer_accelerate.RESERVES_BYTES[0])
        return Report(notes=[f"left out: the peer needs more than {reserve} of memory"])
    if peer.cpu_bytes > setting.checkpoint.total_bytes:
        peer.notes.add("the whole model fits into the limit: the peer offloads nothing")
    counts = setting.counts(64, 8)
    command = ours.bench_command(setting.checkpoint.folder, memory=limit, **counts)

    def mine() -> Document:
        with memory_group(limit) as group:
            peer.notes.update(group.notes)
            return ours.bench(command, group)

    name = "accelerate"
    turns = in_turn(setting.runs, {"ours": mine, name: peer.run})
    found = turns.runs.get(name)
    rows = _rows("offload", turns.runs["ours"], {name: found}) if found else []
    if found and (over := max(values(found, "peak_rss_bytes"))) > limit:
        peer.notes.add(f"the peer's peak was over the limit: {format_size(over)}")
    return Report(rows, [*sorted(peer.notes), *turns.notes], turns.runs)


@dataclass(slots=True)
class _Offloading:
    """The peer with as much memory for weights as its limit allows: less where it was killed."""

    setting: Setting
    reserves: list[int] = field(default_factory=lambda: list(peer_accelerate.RESERVES_BYTES))
    notes: set[str] = field(default_factory=set)

    @property
    def cpu_bytes(self) -> int:
        return self.setting.memory_bytes - self.reserves[0]

    def run(self) -> Document:
        while True:
            try:
                return self._once()
            except ChildFailedError as error:
                smaller = len(self.reserves) > 1 and self.reserves[1] < self.setting.memory_bytes
                if not (error.killed and smaller):
                    raise
                self.notes.add(f"killed with {format_size(self.cpu_bytes)} for weights")
                self.reserves.pop(0)

    def _once(self) -> Document:
        # Made here, not in the child: a child that is killed leaves its files behind.
        with (
            tempfile.TemporaryDirectory(prefix="retinue-benchmark-") as folder,
            memory_group(self.setting.memory_bytes) as group,
        ):
            self.notes.update(group.notes)
            command = peer_accelerate.command(
                self.setting.checkpoint.folder,
                self.cpu_bytes,
                Path(folder),
                **self.setting.counts(64, 8),
            )
            done = run_child(command, group)
        return done.document | {"cpu_bytes": self.cpu_bytes, "wall_s": round(done.wall_s, 4)}
