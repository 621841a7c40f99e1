"""One preset at one budget on one disk, live: the same prompts and the same tokens for everybody.

A model is opened for each measurement, so that everyone starts with the same empty memory.
Decoding is fed the texts' own continuations, whatever the model would have said.
"""

import statistics
from dataclasses import asdict, dataclass
from functools import partial

from retinue.compare.grid import Budget, Disk, Grid, never_live
from retinue.config import parse_size
from retinue.engine.llm import LLM
from retinue.engine.request import Request, new_request
from retinue.engine.tasks import TaskIds
from retinue.errors import Refused
from retinue.lab.base import Row
from retinue.lab.bench import Bench
from retinue.memory.machine import forget_peak, resident_bytes
from retinue.memory.read_speed import measure_reads
from retinue.metrics import Costs, PhaseCounters
from retinue.policy.presets import preset
from retinue.types import SamplingParams

NAME = "live"


@dataclass(frozen=True, slots=True)
class Turn:
    """What is measured at once. `preset` as it was asked for."""

    preset: str
    budget: Budget
    disk: Disk
    run: int

    @property
    def key(self) -> str:
        """Its name in the ledger."""
        where = f"{self.preset}, {self.budget.memory}, {self.budget.experts}"
        return f"{where}, {self.disk.limit}, run {self.run + 1}"


def turns(grid: Grid) -> list[Turn]:
    """All of them, in order: whole runs, and within each the presets side by side."""
    return [
        Turn(name, budget, disk, run)
        for run in range(grid.runs)
        for budget in grid.budgets
        for disk in grid.disks
        for name in grid.order(run)
    ]


def measure(bench: Bench, grid: Grid) -> list[Row]:
    """One row for each turn that could be run. What refused once is not asked in every run."""
    rows, refused = list[Row](), set[tuple[str, Budget]]()
    for turn in turns(grid):
        if (turn.preset, turn.budget) in refused:
            continue
        found = bench.once(NAME, turn.key, partial(_measured, bench, grid, turn))
        rows += found
        if not found:
            refused.add((turn.preset, turn.budget))
    return rows


def _measured(bench: Bench, grid: Grid, turn: Turn) -> list[Row]:
    row = preset(turn.preset)
    if reason := never_live(row):
        raise Refused(reason)
    forget_peak()
    settings = asdict(turn.budget) | {"preset": turn.preset, "read_limit": turn.disk.limit}
    settings["experts"] = turn.budget.experts or "100%"  # so none are lent: no replay knows that
    checked = bench.config.self_check and turn.run == 0 and turn.disk == grid.disks[0]
    limit = None if turn.disk.limit is None else float(parse_size(turn.disk.limit))
    speed = measure_reads(bench.folder, bench.facts.read_bytes, limit=limit)
    with bench.opened(**settings, self_check=checked) as llm:
        llm.fill()
        requests = [_run(bench, llm, text, grid.new_tokens) for text in bench.texts]
        found = _counted(llm, requests)
    named = {"preset": row.name, "exact": row.exact, **asdict(turn.budget), **speed.as_dict()}
    return [named | {"read_limit": turn.disk.limit, "run": turn.run} | found]


def _run(bench: Bench, llm: LLM, text: TaskIds, new_tokens: int) -> Request:
    """Feed the prompt, then the continuation: one token after the prompt, then `new_tokens`."""
    bench.check()
    prompt, rest = text.ids[: -text.scored], text.ids[-text.scored :][: new_tokens + 1]
    params = SamplingParams(max_new_tokens=len(rest), ignore_eos=True)
    request = new_request(prompt, params, None, forced=rest, task=text.task)
    for _ in llm.run(request):
        pass
    bench.check()
    return request


def _counted(llm: LLM, requests: list[Request]) -> Row:
    whole = Costs()
    for request in requests:
        for phase in ("prefill", "decode"):
            whole.of(phase).add(request.costs.of(phase))
    prefill, decode = whole.prefill, whole.decode
    assembly = llm.assembly
    tier, mover = assembly.tier, assembly.mover
    return {
        "prefill_tokens_per_s": _rate(prefill.tokens, prefill.seconds),
        "decode_tokens_per_s": _rate(decode.tokens, decode.seconds),
        "ttft_s": statistics.median(request.first_token_s for request in requests),
        "prefill_s": prefill.seconds,
        "decode_s": decode.seconds,
        "prefill_tokens": prefill.tokens,
        "decode_tokens": decode.tokens,
        "prefill_stall_s": prefill.stall_s,
        "stall_s": decode.stall_s,
        "expert_s": decode.expert_s,
        "dense_s": decode.dense_s,
        "overhead_s": decode.overhead_s,
        "prefill_expert_s": prefill.expert_s,
        "prefill_dense_s": prefill.dense_s,
        "prefill_overhead_s": prefill.overhead_s,
        **decode.counts,
        **{f"prefill_{name}": count for name, count in prefill.counts.items()},
        "late_s": decode.computing.slope,
        "late_spread": decode.computing.spread,
        "start_s": decode.starting.slope,
        "start_spread": decode.starting.spread,
        "expand_s": assembly.expand_s,
        "read_while_busy_bytes_per_s": _rate(mover.bytes_read, mover.busy_s),
        "texts": len(requests),
        "prefill_bytes_read": prefill.bytes_read,
        "bytes_read": decode.bytes_read,
        "bytes_read_per_token": _rate(decode.bytes_read, decode.tokens),
        **_lookups(decode),
        "degraded_share": decode.degraded_share,
        "slots": tier.slots,
        "resident_experts": assembly.cache.resident,
        "total_experts": assembly.cache.total,
        "peak_rss_bytes": resident_bytes(peak=True),
        "budget_bytes": assembly.split.budget,
        "load_s": assembly.load_s,
    }


def _lookups(decode: PhaseCounters) -> Row:
    total = decode.hits + decode.pending + decode.misses
    counts = {"hits": decode.hits, "pending": decode.pending, "misses": decode.misses}
    return counts | {
        "hit_rate": decode.hit_rate,
        "pending_rate": _rate(decode.pending, total),
        "miss_rate": _rate(decode.misses, total),
    }


def _rate(count: float, over: float) -> float:
    return count / over if over else 0.0
