"""Poisson arrivals of five tasks at a loaded model, by each order in turn, in one process.

    python -m benchmarks.arrivals_child --requests 200

The model is the sample, the prompts are its texts; answers have drawn lengths, end tokens are
ignored. First as many requests at once as there are say what the machine can serve; deadlines and
rates follow from that. Then the same arrivals run live under each order, and again through the
simulated clock, with the costs that were measured. The last line is one JSON document.
"""

import json
import random
import time
from argparse import ArgumentParser
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

# First: it makes the settings that the process needs before torch is imported.
from retinue import LLM, Deadline, Overloaded, SamplingParams
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
from retinue.engine.request import Request, State, new_request
from retinue.engine.scheduler import Scheduler
from retinue.engine.tasks import read_texts
from retinue.policy.order.estimate import Estimate
from retinue.policy.order.named import order_named

BATCH, CHUNK, CONTEXT = 8, 256, 512
ANSWERS = (4, 8, 16, 32, 64)  # mean tokens of the five tasks' answers: they differ, as in the paper
# Deadlines: the first token within so much of the time that one request holds its seat, the others
# within so many decode passes of all seats.
FIRST_SHARE, GAP_PASSES = 1.0, 10.0
Prompts = dict[str, list[list[int]]]


def main() -> None:
    """Measure, print."""
    parser = ArgumentParser(prog="python -m benchmarks.arrivals_child")
    parser.add_argument("--requests", type=int, default=200, metavar="N", help="of each run")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.8, 1.2, 1.5], metavar="X")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    options = parser.parse_args()
    room = BATCH * CONTEXT
    with LLM("sample", context=CONTEXT, kv_tokens=room, batch=BATCH, chunk=CHUNK) as llm:
        document = measure(llm, options.requests, options.loads, options.seed)
    print(json.dumps(document), flush=True)


def measure(llm: LLM, count: int, loads: Sequence[float], seed: int) -> dict[str, Any]:
    """All orders at all loads, live and simulated."""
    prompts = texts(llm)
    kinds = [
        Kind(task, sum(map(len, found)) / len(found), tokens)
        for (task, found), tokens in zip(prompts.items(), ANSWERS, strict=True)
    ]
    estimate = Estimate()
    at_once = [replace(arrival, at=0.0) for arrival in poisson(kinds, 1.0, count, seed)]
    run(llm, "shortest", estimate, at_once[:BATCH], prompts)  # the first passes are slow ones
    full = run(llm, "shortest", estimate, at_once, prompts)
    rate = count / full.seconds
    gap_s = GAP_PASSES * estimate.costs.decode.at(BATCH)
    deadline = Deadline(FIRST_SHARE * BATCH / rate, gap_s)
    kinds = [replace(kind, deadline=deadline) for kind in kinds]
    costs = Costs(estimate.costs.prefill.parts, estimate.costs.decode.parts)
    runs = []
    for load in loads:
        arrivals = poisson(kinds, load * rate, count, seed)
        for order in ORDERS:
            live = run(llm, order, estimate, arrivals, prompts)
            clocked = simulate(llm, order, costs, arrivals)
            found = {"live": live.as_dict(), "simulated": clocked.as_dict()}
            runs.append({"load": load, "order": order} | found)
    return {
        "requests": count,
        "requests_per_s": rate,
        "first_token_s": deadline.first_token_s,
        "between_tokens_s": gap_s,
        "costs": {"prefill": costs.prefill, "decode": costs.decode},
        "runs": runs,
    }


def texts(llm: LLM) -> Prompts:
    """The ids of the shipped prompts of five tasks, by task."""
    found: Prompts = {}
    for text in read_texts(Path(str(files("retinue") / "data" / "sample-tasks.jsonl"))):
        if text.task in found or len(found) < len(ANSWERS):
            ids = llm.encode(text.prompt)
            found.setdefault(text.task, []).append(ids[: CONTEXT - 2 * max(ANSWERS)])
    return found


def run(
    llm: LLM, order: str, estimate: Estimate, arrivals: Sequence[Arrival], prompts: Prompts
) -> Summary:
    """Serve `arrivals` live, each at its second."""
    engine = llm.assembly.engine
    engine.scheduler.order = order_named(order, estimate)
    chance, start = random.Random(0), time.perf_counter()
    requests = []
    for arrival in arrivals:
        ids = chance.choice(prompts[arrival.kind.task])
        params = SamplingParams(max_new_tokens=arrival.answer_tokens, ignore_eos=True)
        request = new_request(ids, params, None, task=arrival.kind.task)
        request.arrived, request.deadline = start + arrival.at, arrival.kind.deadline
        requests.append(request)
    coming = deque(requests)
    while coming or engine.busy:
        now = time.perf_counter()
        if not engine.busy and coming[0].arrived > now:
            time.sleep(coming[0].arrived - now)
        while coming and coming[0].arrived <= time.perf_counter():
            _add(llm, coming.popleft())
        engine.step()
    engine.idle()
    return summary(requests)


def _add(llm: LLM, request: Request) -> None:
    try:
        llm.assembly.engine.add(request)
    except Overloaded as error:
        request.end(State.FAILED, "error", error)


def simulate(llm: LLM, order: str, costs: Costs, arrivals: Sequence[Arrival]) -> Summary:
    """Serve `arrivals` on a simulated clock."""
    clock, real = Clock(), llm.assembly.engine.scheduler
    scheduler = Scheduler(
        BlockPool(real.pool.blocks),
        real.limits,
        real.cohort,
        order_named(order, Estimate()),
        clock,
    )
    return summary(Simulation(scheduler, clock, costs).run(arrivals))


if __name__ == "__main__":
    main()
