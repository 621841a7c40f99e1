"""Ours in int4: against llama.cpp in Q4_0 (`llamacpp-*`), and alone on a larger model (`qwen3`)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import ours, peer_llamacpp
from benchmarks.child import in_turn, run_child, timed
from benchmarks.gguf_file import ARCHITECTURE
from benchmarks.group import memory_group
from benchmarks.made import Pack, gguf_of, pack_of, room_for
from benchmarks.results import Document, Report, Row, compare, values
from benchmarks.setting import RUNTIME_BYTES, Setting

from retinue.config import format_size
from retinue.memory.machine import available_bytes

SMALL_BYTES = 2_000_000_000
QWEN3_BYTES = 4 << 30
PEER = "llama.cpp"


@dataclass(frozen=True, slots=True)
class Goals:
    """The least ratios that we promise, on the machine of docs/LOG.md."""

    decode: float
    prefill: float
    share_of_bound: float


SMALL, WHOLE, QWEN3 = Goals(8.0, 2.5, 0.85), Goals(0.9, 1.5, 0.0), Goals(0.0, 0.0, 0.80)


@dataclass(frozen=True, slots=True)
class _Sides:
    """The same weights in both formats."""

    pack: Pack
    gguf: Path


def llamacpp_small(setting: Setting) -> Report:
    """Ours in int4 against llama.cpp in Q4_0, each in a group of 2 GB, page cache included."""
    if why := _why_not(setting):
        return Report(notes=[why])
    sides = _sides(setting)
    if sides.gguf.stat().st_size < SMALL_BYTES:
        size = format_size(sides.gguf.stat().st_size)
        return Report(notes=[f"left out: {size} of weights fit into {format_size(SMALL_BYTES)}"])
    counts = setting.counts(512, 16)
    notes: set[str] = set()
    mine = ours.bench_command(sides.pack.folder, memory=SMALL_BYTES, **counts)
    theirs = peer_llamacpp.command(sides.gguf, repack=False, **counts)
    engines = {
        "ours": lambda: _limited(partial(ours.bench, mine), SMALL_BYTES, notes),
        PEER: lambda: _limited(lambda group: run_child(theirs, group).document, SMALL_BYTES, notes),
    }
    turns = in_turn(setting.runs, engines)
    rows = _alone("llamacpp-small", turns.runs["ours"], SMALL, SMALL_BYTES)
    if found := turns.runs.get(PEER):
        rows = [*_against("llamacpp-small", turns.runs["ours"], found, SMALL), *rows]
    return Report(rows, [*sorted(notes), *turns.notes], turns.runs)


def llamacpp_whole(setting: Setting) -> Report:
    """Ours in int4 against llama.cpp in Q4_0 with repacking, everything in memory."""
    if why := _why_not(setting):
        return Report(notes=[why])
    sides = _sides(setting)
    # Rearranged weights lie beside those of the file.
    needed = 2 * sides.gguf.stat().st_size + RUNTIME_BYTES
    if needed > available_bytes():
        return Report(notes=[f"left out: the peer needs {format_size(needed)} of memory"])
    counts = setting.counts(512, 64)
    engines = {
        "ours": partial(ours.bench, ours.bench_command(sides.pack.folder, **counts)),
        PEER: partial(timed, peer_llamacpp.command(sides.gguf, repack=True, **counts)),
    }
    turns = in_turn(setting.runs, engines)
    rows: list[Row] = []
    if found := turns.runs.get(PEER):
        rows = _against("llamacpp-whole", turns.runs["ours"], found, WHOLE)
        rows.append(_loaded_and_prefilled(turns.runs["ours"], found))
    return Report(rows, turns.notes, turns.runs)


def qwen3(setting: Setting) -> Report:
    """A pack of a qwen3_moe checkpoint at 4 GiB: decode against the bound, its peak and packing."""
    checkpoint = setting.checkpoint
    if checkpoint.family != "qwen3_moe":
        return Report(
            notes=[
                "left out: give a checkpoint of this family, such as"
                " `python -m benchmarks.shapes qwen3-15b-a3b OUT` writes (31 GB)"
            ]
        )
    if not room_for(checkpoint, 1):
        return Report(notes=["left out: no room for the pack beside the checkpoint"])
    pack = pack_of(checkpoint)
    counts, notes = setting.counts(64, 32), set[str]()
    mine = ours.bench_command(pack.folder, memory=QWEN3_BYTES, **counts)
    engine = {"ours": lambda: _limited(partial(ours.bench, mine), QWEN3_BYTES, notes)}
    turns = in_turn(setting.runs, engine)
    rows = _alone("qwen3", turns.runs["ours"], QWEN3, QWEN3_BYTES)
    return Report(rows, [*sorted(notes), _packing(pack)], turns.runs)


def _why_not(setting: Setting) -> str:
    """Why llama.cpp cannot be compared with here; empty where it can."""
    checkpoint = setting.checkpoint
    if lacking := peer_llamacpp.missing():
        return f"LEFT OUT: {lacking}"
    if checkpoint.family != ARCHITECTURE:
        return f"left out: only {ARCHITECTURE} is converted to GGUF, not {checkpoint.family}"
    if not room_for(checkpoint, 2):
        return "left out: no room for a pack and a GGUF file beside the checkpoint"
    return ""


def _sides(setting: Setting) -> _Sides:
    return _Sides(pack_of(setting.checkpoint), gguf_of(setting.checkpoint))


def _limited(run: Callable[..., Document], limit_bytes: int, notes: set[str]) -> Document:
    with memory_group(limit_bytes) as group:
        notes.update(group.notes)
        return run(group)


def _against(name: str, mine: list[Document], found: list[Document], goals: Goals) -> list[Row]:
    rows = []
    for key, what, goal in (
        ("decode_tokens_per_s", "decode", goals.decode),
        ("prefill_tokens_per_s", "prefill", goals.prefill),
    ):
        row = compare((name, what, "tokens/s"), values(mine, key), PEER, values(found, key))
        rows.append(row.promised(goal))
    return rows


def _alone(name: str, mine: list[Document], goals: Goals, limit_bytes: int) -> list[Row]:
    """Decode against the bound, and the peak against the limit: of the process, of the group."""
    speed, bounds = values(mine, "decode_tokens_per_s"), values(mine, "bound_tokens_per_s")
    share = compare((name, "decode", "tokens/s"), speed, "bound", bounds)
    rows = [share.promised(goals.share_of_bound)]
    peaks = values(mine, "peak_rss_bytes")
    limits = [float(limit_bytes)] * len(mine)
    title = (name, "peak memory", "bytes")
    row = compare(title, peaks, "limit", limits, less_is_better=True, ok=max(peaks) <= limit_bytes)
    return [*rows, row]


def _loaded_and_prefilled(mine: list[Document], found: list[Document]) -> Row:
    """From the process's start of loading to the first token, nothing in memory before."""
    sides = [[run["load_s"] + run["prefill_s"] for run in runs] for runs in (mine, found)]
    title = ("llamacpp-whole", "load and prefill", "s")
    return compare(title, sides[0], PEER, sides[1], less_is_better=True)


def _packing(pack: Pack) -> str:
    size = f"the pack has {format_size(pack.bytes)}"
    if pack.made is None:
        return f"{size} and was there already: remove `{pack.folder.name}` to see it made"
    peak = pack.made.document.get("peak_rss_bytes", 0)
    return f"{size}, made in {pack.made.wall_s:.0f} s with a peak of {format_size(peak)}"
