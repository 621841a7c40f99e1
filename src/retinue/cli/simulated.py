"""What `retinue simulate` knows of model and machine, and how it shows what came out."""

import json
import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

from retinue.cli.terminal import table
from retinue.config import Config, format_size, parse_size
from retinue.engine.bands import compute_format
from retinue.errors import Refused, UsageError
from retinue.memory.home import find_here
from retinue.memory.machine import cores, known_speeds, machine_name, remembered_speeds
from retinue.memory.rates import remembered_rates
from retinue.memory.read_speed import ReadSpeed, measure_reads
from retinue.model.predictors import find_predictor
from retinue.model.profiles import default_profile, find_profile
from retinue.policy.predict.learned import Learned
from retinue.policy.preset import Given, Preset
from retinue.policy.profile import Profile
from retinue.policy.recommended import Recommendation
from retinue.sim.candidates import Known as KnownOf
from retinue.sim.cells import Cell, Filled
from retinue.sim.costs import (
    Times,
    read_speed_of,
    times_of_bench,
    times_of_profile,
    times_of_rates,
    with_given,
)
from retinue.sim.link import Roads
from retinue.sim.passes import Load
from retinue.sim.recommend import Advice, Evidence
from retinue.sim.stage import Setting
from retinue.trace import Trace, TraceHead
from retinue.types import Facts

Room = tuple[str, int]  # what it is called, and how many experts fit
_TIMES = ("expert_s", "layer_s", "elsewhere_s", "pass_s")
LATENCY_S = 1e-4
BENCH = "`retinue bench MODEL --json > FILE`, then `--bench FILE`"


class Known:
    """What is known of the traced model: its folder, if that is here, and what was learnt of it."""

    def __init__(self, head: TraceHead, model: str | None, config: Config) -> None:
        self._head, self._file = head, config.profile
        self.folder = find_here(model or head.model)
        if model is not None and self.folder is None:
            raise UsageError(
                f"no such model here: `{model}`", hint="give a folder, or leave it out"
            )

    def of(self, preset: Preset, slots: int) -> KnownOf:
        """For one preset with so much room. Raises Refused where it lacks a profile."""
        head = self._head
        profile = self.profile() if preset.profiled else None
        if preset.profiled and profile is None:
            raise Refused("needs a profile of the model: `--model MODEL` or `--profile FILE`")
        learned = self._learned
        arrays = {} if learned is None else learned.arrays(preset.kinds)
        shape = (head.layers, head.experts, head.top_k, head.routed)
        return KnownOf(Given(head.model, *shape, slots, profile, arrays), learned)

    @cached_property
    def _learned(self) -> Learned | None:
        """Read once: every preset asks for it in every cell."""
        if self.folder is None or self._head.facts is None:
            return None
        return find_predictor(self.folder, self._head.facts)

    def profile(self) -> Profile | None:
        """The model's profile, if there is one. Raises UsageError for one that is damaged."""
        if self._head.facts is None or (self.folder is None and self._file is None):
            return None
        folder = self.folder or Path()
        try:
            return find_profile(folder, self._head.facts, self._file)
        except Refused:
            return None

    def profile_file(self) -> Path | None:
        """Where a profile of the model is kept."""
        if self._file is not None:
            return Path(self._file).expanduser()
        return default_profile(self.folder) if self.folder is not None else None

    def entry(self, cell: Cell, advice: Advice, *, here: bool) -> Recommendation:
        """What is worth remembering of `advice`; `here`: the disk is this machine's, as it is.

        Then its speed is what `auto` will compare with: a replay's is that of experts, and less.
        """
        facts = self._head.facts
        total = facts.total_experts if facts else len(self._head.routed) * self._head.experts
        setting, best = cell.setting, advice.best
        disk = setting.roads.disk_bytes_per_s
        if here and self.folder is not None:
            disk = known_speeds(self.folder).disk_bytes_per_s
        share = setting.slots / total
        return Recommendation(
            share, disk, best.preset, best.ring, round(advice.margin, 4), machine_name()
        )


class Machine:
    """The machine that is simulated, in numbers: disks, times of computing, sizes."""

    def __init__(self, trace: Trace, known: Known, options: Namespace, config: Config) -> None:
        times = {name: getattr(options, f"{name[:-2]}_time") for name in _TIMES}
        seconds = [value for value in (options.latency, *times.values()) if value is not None]
        if wrong := [value for value in seconds if not 0 <= value < math.inf]:
            raise UsageError(f"a time is out of range: `{wrong[0]}`", hint="seconds, 0 or more")
        self.facts = facts_of(trace, options)
        given = 0 if options.expert_size is not None else trace.head.read_bytes
        self.read_bytes = given or self.facts.read_bytes
        self._bus = _positive("bus", options.bus) if options.bus is not None else None
        bench = document(Path(options.bench)) if options.bench is not None else None
        self._in_turn = bench is not None and bench.get("read_limit") is not None
        place = known.folder or trace.file.resolve().parent
        given_whole = options.disk is not None and options.latency is not None
        speed = None if given_whole else self._read_speed(known.folder, bench)
        self._disks = _disks(options.disk, place, speed)
        self._latency_s = _latency(options.latency, speed)
        self._times = with_given(self._known_times(known, bench, options, config), **times)

    def cells(self, rooms: Sequence[Room], load: Load) -> list[Cell]:
        """Each room on each disk."""
        roads = [Roads(disk, self._latency_s, self._bus, self._in_turn) for disk in self._disks]
        return [
            Cell(label, Setting(slots, road, self._times, load))
            for label, slots in rooms
            for road in roads
        ]

    def evidence(self, cell: Cell) -> Evidence:
        """None: these are numbers of one run, or fewer."""
        return Evidence()

    def _read_speed(self, folder: Path | None, bench: Mapping[str, Any] | None) -> ReadSpeed | None:
        """How fast experts are read: as `bench` says it, or measured where the model is here."""
        if bench is not None and (found := read_speed_of(bench)) is not None:
            return found
        return None if folder is None else measure_reads(folder, self.read_bytes)

    def _known_times(
        self, known: Known, bench: Mapping[str, Any] | None, options: Namespace, config: Config
    ) -> Times:
        if bench is not None:
            return times_of_bench(self.facts, bench)
        threads, kind = config.threads or cores(), compute_format(self.facts)
        rate, profile = remembered_rates(threads).get(kind), known.profile()
        if options.expert_time is not None and options.layer_time is not None:
            return Times(0.0, 0.0)
        if profile is not None and profile.costs is not None:
            return times_of_profile(self.facts, profile.costs, rate)
        if rate is None:
            raise Refused(
                f"nobody measured how fast this machine computes in `{kind}`",
                hint=f"{BENCH}; or `retinue plan MODEL`; or `--expert-time` and `--layer-time`",
            )
        return times_of_rates(self.facts, rate)


def document(file: Path) -> Mapping[str, Any]:
    """The JSON document in `file`: its last line. Raises UsageError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8").strip().splitlines()[-1])
    except (OSError, ValueError, IndexError) as error:
        raise UsageError(f"cannot read `{file}`: {error}", hint=BENCH) from error
    if not isinstance(content, dict):
        raise UsageError(f"`{file}` holds no document", hint=BENCH)
    return content


def _positive(name: str, text: str) -> int:
    """The size that `text` says. Raises UsageError for none at all."""
    if (size := parse_size(text)) < 1:
        raise UsageError(f"{name} is out of range: `{text}`", hint="1 byte or more")
    return size


def facts_of(trace: Trace, options: Namespace) -> Facts:
    """What the trace says of the model; of an old one, with the size that is given."""
    head = trace.head
    if head.facts is not None and options.expert_size is None:
        return head.facts
    if options.expert_size is None:
        raise UsageError(
            f"the trace `{trace.file}` does not say how large experts are",
            hint="record it again with `retinue trace`, or give `--expert-size SIZE`",
        )
    size, total = _positive("expert_size", options.expert_size), len(head.routed) * head.experts
    known = {
        "name": head.model,
        "family": "",
        "dtype": "bfloat16",
        "layers": head.layers,
        "moe_layers": len(head.routed),
        "experts_per_layer": head.experts,
        "total_experts": total,
        "top_k": head.top_k,
        "expert_bytes": size,
        "slot_bytes": size,
        "max_context": 1 << 20,
        "routed": head.routed,
    }
    numbers = {item.name: 0 for item in fields(Facts) if item.default != ""}
    return Facts(**numbers | known)  # type: ignore[arg-type]


def _latency(given: float | None, speed: ReadSpeed | None) -> float:
    if given is not None:
        return given
    return LATENCY_S if speed is None else speed.latency_s


def _disks(text: str | None, place: Path, speed: ReadSpeed | None) -> list[float]:
    if text is not None:
        found = [float(parse_size(each.strip())) for each in text.split(",")]
        if min(found) < 1:
            raise UsageError(f"disk is out of range: `{text}`", hint="such as 300MB")
        return found
    if speed is not None:
        return [speed.bytes_per_s]
    if (speeds := remembered_speeds(place)) is None:
        raise Refused(
            "nobody measured how fast this disk reads", hint="give `--disk 300MB`, or `--model`"
        )
    return [speeds.disk_bytes_per_s]


def cell_text(filled: Filled) -> str:
    """One cell as a table, the fastest first."""
    setting = filled.cell.setting
    rows = sorted(filled.rows.items(), key=lambda item: item[1]["seconds"])
    header = (
        *("preset", "tokens/s", "hits", "pending", "misses", "stall", "read a token"),
        *("over belady", "degraded"),
    )
    lines = [
        (
            name if row["exact"] else f"{name} (approximate)",
            f"{row['decode_tokens_per_s']:.2f}",
            f"{row['hit_rate']:.1%}",
            f"{row['pending_rate']:.1%}",
            f"{row['miss_rate']:.1%}",
            f"{row['stall_s']:.2f} s",
            format_size(row["bytes_read_per_token"]),
            _times_over(row.get("reads_over_belady")),
            f"{row['degraded_share']:.1%}" if row["degraded_share"] else "",
        )
        for name, row in rows
    ]
    disk = format_size(setting.roads.disk_bytes_per_s)
    head = f"{filled.cell.label}: room for {setting.slots} experts, a disk of {disk}/s"
    return f"{head}\n{table(header, lines)}"


def left_out_text(reasons: Mapping[str, str]) -> str:
    """Who was not replayed, and why."""
    return table(("not replayed", "why"), list(reasons.items()))


def advice_text(filled: Filled, advice: Advice) -> str:
    """The best in one cell, in a sentence."""
    best, setting = advice.best, filled.cell.setting
    ring = "" if best.ring is None else f" with a ring of {best.ring:.0%} of the slots"
    disk = format_size(setting.roads.disk_bytes_per_s)
    gain = "nobody is surely faster"
    if advice.margin:
        gain = f"{advice.margin:.1%} faster than `auto`"
    lines = [
        f"{filled.cell.label}, a disk of {disk}/s: `{best.preset}`{ring},"
        f" {best.decode_tokens_per_s:.2f} tokens/s; {gain}"
    ]
    return "\n".join([*lines, *(f"  {reason}: not named" for reason in advice.why_not)])


def _times_over(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"
