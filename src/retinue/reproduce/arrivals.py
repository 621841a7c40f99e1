"""Requests that arrive by chance, with deadlines: eMoE's order against first come, first served.

As many requests at once as there are say what the machine can serve; rates and deadlines follow
from that. Then each order serves the same arrivals, live and on a simulated clock whose passes cost
what was measured. Deadlines: the first token within the time that one request holds its seat at
saturation, the others within GAP_PASSES decode passes of all seats.
"""

import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from retinue.config import ORDERS
from retinue.engine.arrivals import (
    Arrival,
    Clock,
    Costs,
    Kind,
    Simulation,
    Summary,
    poisson,
    summary,
)
from retinue.engine.blocks import BlockPool
from retinue.engine.llm import LLM
from retinue.engine.request import Request, State, new_request
from retinue.engine.scheduler import Scheduler
from retinue.errors import Overloaded
from retinue.lab.base import NOTHING_YET, Chart, Column, Row, lines_by, number
from retinue.policy.order.estimate import Estimate
from retinue.policy.order.named import order_named
from retinue.reproduce.experiment import Experiment
from retinue.reproduce.workbench import Workbench
from retinue.types import Deadline, SamplingParams

NAME = "arrivals"
BATCH, CHUNK, PROMPT_TOKENS = 8, 256, 256
ANSWERS = (4, 8, 16, 32, 64)  # mean tokens of the five tasks' answers: they differ, as in the paper
GAP_PASSES = 10.0
LOADS = (0.4, 0.8, 1.0, 1.2, 1.5, 2.0)  # of what can be served
LIVE_LOADS = (0.8, 1.5)
LIVE_ORDERS = ("fcfs", "emoe")
SIMULATED, QUICK_SIMULATED, WARM = 400, 100, 16  # requests
SEED = 1
Prompts = dict[str, list[list[int]]]


@dataclass(slots=True)
class Machine:
    """A loaded model with what was learnt of its speed."""

    llm: LLM
    estimate: Estimate
    kinds: list[Kind]
    prompts: Prompts
    rate: float  # requests a second at saturation

    @property
    def costs(self) -> Costs:
        """Of passes, for the simulated clock."""
        lines = self.estimate.costs
        return Costs(lines.prefill.parts, lines.decode.parts)


def run(bench: Workbench) -> list[Row]:
    """One row for each order, load, and clock."""
    return bench.once(NAME, "all orders", partial(_measure, bench))


def _measure(bench: Workbench) -> list[Row]:
    live = bench.settings.live_requests
    context = min(PROMPT_TOKENS + 2 * max(ANSWERS), bench.facts.max_context)
    room = {"context": context, "kv_tokens": BATCH * context, "batch": BATCH, "chunk": CHUNK}
    with bench.opened(preset="auto", experts="100%", **room) as llm:
        llm.fill()
        machine = _saturated(bench, llm, max(WARM, live))
        count = QUICK_SIMULATED if bench.settings.quick else SIMULATED
        return [*_simulated(machine, count), *_live(bench, machine, live)]


def _simulated(machine: Machine, count: int) -> list[Row]:
    return [
        _row(machine, order, load, simulate(machine, order, arrivals), False)
        for load in LOADS
        for arrivals in [poisson(machine.kinds, load * machine.rate, count, SEED)]
        for order in ORDERS
    ]


def _live(bench: Workbench, machine: Machine, count: int) -> list[Row]:
    return [
        _row(machine, order, load, serve(bench, machine, order, arrivals), True)
        for load in (LIVE_LOADS if count else ())
        for arrivals in [poisson(machine.kinds, load * machine.rate, count, SEED)]
        for order in LIVE_ORDERS
    ]


def _saturated(bench: Workbench, llm: LLM, count: int) -> Machine:
    """The machine after `count` requests at once."""
    prompts = _prompts(bench)
    kinds = [
        Kind(task, sum(map(len, found)) / len(found), tokens)
        for (task, found), tokens in zip(prompts.items(), ANSWERS, strict=False)
    ]
    machine = Machine(llm, Estimate(), kinds, prompts, 0.0)
    at_once = [replace(arrival, at=0.0) for arrival in poisson(kinds, 1.0, count, SEED)]
    serve(bench, machine, "shortest", at_once[:BATCH])  # the first passes are slow ones
    machine.rate = count / serve(bench, machine, "shortest", at_once).seconds
    gap_s = GAP_PASSES * machine.estimate.costs.decode.at(BATCH)
    deadline = Deadline(BATCH / machine.rate, gap_s)
    machine.kinds = [replace(kind, deadline=deadline) for kind in kinds]
    return machine


def _prompts(bench: Workbench) -> Prompts:
    """The prompts of five tasks, by task."""
    found: Prompts = {}
    for text in bench.texts:
        if text.task in found or len(found) < len(ANSWERS):
            found.setdefault(text.task, []).append(text.ids[: -text.scored][:PROMPT_TOKENS])
    return found


def serve(bench: Workbench, machine: Machine, order: str, arrivals: Sequence[Arrival]) -> Summary:
    """Serve `arrivals` live, each at its second. Raises Cancelled when somebody wants to stop."""
    engine = machine.llm.assembly.engine
    engine.scheduler.order = order_named(order, machine.estimate)
    chance, start = random.Random(SEED), time.perf_counter()
    requests = [_request(machine, arrival, chance, start) for arrival in arrivals]
    coming = deque(requests)
    while coming or engine.busy:
        bench.check()
        now = time.perf_counter()
        if not engine.busy and coming[0].arrived > now:
            time.sleep(coming[0].arrived - now)
        while coming and coming[0].arrived <= time.perf_counter():
            _add(machine.llm, coming.popleft())
        engine.step()
    engine.idle()
    return summary(requests)


def _request(machine: Machine, arrival: Arrival, chance: random.Random, start: float) -> Request:
    ids = chance.choice(machine.prompts[arrival.kind.task])
    params = SamplingParams(max_new_tokens=arrival.answer_tokens, ignore_eos=True)
    request = new_request(ids, params, None, task=arrival.kind.task)
    request.arrived, request.deadline = start + arrival.at, arrival.kind.deadline
    return request


def _add(llm: LLM, request: Request) -> None:
    try:
        llm.assembly.engine.add(request)
    except Overloaded as error:
        request.end(State.FAILED, "error", error)


def simulate(machine: Machine, order: str, arrivals: Sequence[Arrival]) -> Summary:
    """Serve `arrivals` on a simulated clock."""
    clock, real = Clock(), machine.llm.assembly.engine.scheduler
    pool = BlockPool(real.pool.blocks)
    named = order_named(order, Estimate())
    scheduler = Scheduler(pool, real.limits, real.cohort, named, clock)
    return summary(Simulation(scheduler, clock, machine.costs).run(arrivals))


def _row(machine: Machine, order: str, load: float, found: Summary, live: bool) -> Row:
    due = machine.kinds[0].deadline or Deadline()
    return {
        "order": order,
        "clock": "live" if live else "simulated",
        "load": load,
        "rate": load * machine.rate,
        "attainment": found.attainment,
        "goodput": found.goodput,
        "refused": found.refused,
        "p50": found.latency_p50_s,
        "p99": found.latency_p99_s,
        "first_p50": found.first_token_p50_s,
        "first_p99": found.first_token_p99_s,
        "worst_wait": found.worst_wait_s,
        "requests": found.requests,
        "first_token_due_s": due.first_token_s,
        "between_tokens_due_s": due.between_tokens_s,
    }


def charts(rows: Sequence[Row]) -> list[Chart]:
    """Deadlines met, and the latency of those that were answered, over the load."""
    named = [row | {"line": f"{row['order']}{', live' * (row['clock'] == 'live')}"} for row in rows]
    if not named:
        return []
    x = "arrivals, times what can be served"
    both = [
        replace(line, label=f"{line.label}, {name}")
        for key, name in (("p50", "half"), ("p99", "99 %"))
        for line in lines_by([row for row in named if row["clock"] != "live"], "line", "load", key)
    ]
    return [
        Chart(
            "All deadlines met",
            x,
            "share of requests",
            lines_by(named, "line", "load", "attainment"),
        ),
        Chart("Answered within, simulated", x, "seconds", both, log_y=True),
    ]


def verdict(rows: Sequence[Row]) -> str:
    """eMoE's order against the other past saturation, on each clock; and its latency before it."""
    parts = []
    for clock in dict.fromkeys(str(row["clock"]) for row in rows):
        mine = {
            (row["order"], number(row, "load") or 0.0): row for row in rows if row["clock"] == clock
        }
        load = max((load for _, load in mine if load <= max(LIVE_LOADS)), default=0.0)
        ours, other = mine.get(("emoe", load)), mine.get(("fcfs", load))
        if ours is not None and other is not None:
            parts.append(
                f"{clock.capitalize()}, at {load} times what can be served:"
                f" {ours['attainment']:.0%} of all requests in time against"
                f" {other['attainment']:.0%} first come, first served;"
                f" {ours['goodput']:.2f} a second against {other['goodput']:.2f}; 99 % answered"
                f" within {ours['p99']:.2f} s against {other['p99']:.2f} s"
            )
    return f"{'. '.join(parts)}." if parts else NOTHING_YET


EXPERIMENT = Experiment(
    name=NAME,
    title="Latency and deadlines against the arrival rate",
    claim=(
        "Latency is 9 % (TinyMixtral) to 17 % (Mixtral-8x22B) better than DeepSpeed-FastGen's as"
        " the rate grows; vLLM is slowest. Tails and deadlines met are not reported."
    ),
    columns=(
        Column("order", "order"),
        Column("clock", "clock"),
        Column("load", "load", ".1f"),
        Column("rate", "a second", ".2f"),
        Column("attainment", "in time", ".1%"),
        Column("goodput", "in time a second", ".2f"),
        Column("refused", "refused", ".0f"),
        Column("p50", "half, s", ".2f"),
        Column("p99", "99 %, s", ".2f"),
        Column("first_p50", "first token, half, s", ".2f"),
        Column("first_p99", "99 %, s", ".2f"),
        Column("worst_wait", "longest wait, s", ".2f"),
        Column("requests", "requests", ".0f"),
    ),
    run=run,
    charts=charts,
    verdict=verdict,
    notes=(
        "Poisson arrivals of five tasks alike, eight at once, every expert resident; answers have"
        " drawn lengths. The baseline is the same engine without the scheduler, not another"
        " system. Latencies are of requests that were answered; refused ones count as late.",
    ),
)
