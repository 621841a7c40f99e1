"""Deadlines kept under Poisson arrivals, by eMoE's order and by others: `arrivals`."""

import sys
from functools import partial

from benchmarks.child import in_turn, timed
from benchmarks.results import Document, Report, Row, compare
from benchmarks.setting import Setting

PROMISED = 1.5  # past saturation
REQUESTS = 200
MEASURES = (("attainment", "share"), ("goodput", "requests/s"))


def arrivals(setting: Setting) -> Report:
    """Five tasks of the sample with deadlines, near and past saturation: emoe against fcfs."""
    command = [sys.executable, "-m", "benchmarks.arrivals_child", "--requests", str(REQUESTS)]
    turns = in_turn(setting.runs, {"ours": partial(timed, command)})
    runs = turns.runs["ours"]
    loads = sorted({run["load"] for run in runs[0]["runs"]})
    rows = [
        row(runs, load, way, measure, unit)
        for load in loads
        for way in ("live", "simulated")
        for measure, unit in MEASURES
    ]
    notes = [note(run, number) for number, run in enumerate(runs, 1)]
    return Report(rows, [*notes, *turns.notes], turns.runs)


def row(runs: list[Document], load: float, way: str, measure: str, unit: str) -> Row:
    """emoe's `measure` at `load` times saturation against that of fcfs."""
    ours, other = (
        [found(run, load, order)[way][measure] for run in runs] for order in ("emoe", "fcfs")
    )
    title = ("arrivals", f"{measure} at {load}, {way}", unit)
    return compare(title, ours, "fcfs", other).promised(PROMISED if load > 1 else 0)


def found(run: Document, load: float, order: str) -> Document:
    """What one order did at one load."""
    (only,) = (each for each in run["runs"] if (each["load"], each["order"]) == (load, order))
    return dict(only)


def note(run: Document, number: int) -> str:
    """Everything else that a round showed, each order at each load, live."""
    lines = [
        f"round {number}: {run['requests']} requests each, {run['requests_per_s']:.2f} a second"
        f" at saturation; first token due after {run['first_token_s']:.2f} s, the others after"
        f" {run['between_tokens_s']:.3f} s"
    ]
    for each in run["runs"]:
        live = each["live"]
        first = f"{live['first_token_p50_s']:.2f} / {live['first_token_p99_s']:.2f}"
        whole = f"{live['latency_p50_s']:.2f} / {live['latency_p99_s']:.2f}"
        tasks = " ".join(f"{task['attainment']:.2f}" for task in live["tasks"].values())
        lines.append(
            f"  load {each['load']}, {each['order']:8} in time {live['attainment']:.2f}"
            f" (simulated {each['simulated']['attainment']:.2f}; by task {tasks}),"
            f" {live['goodput']:.2f} a second, refused {live['refused']};"
            f" p50 / p99 of first tokens {first} s, of answers {whole} s;"
            f" longest wait {live['worst_wait_s']:.2f} s"
        )
    return "\n".join(lines)
