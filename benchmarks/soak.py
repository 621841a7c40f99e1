"""What a server does to its machine under many clients of every kind: `soak`."""

import re
import sys

from benchmarks.child import run_child
from benchmarks.results import Document, Report, Row, compare
from benchmarks.setting import Setting

SECONDS, CLIENTS = 120, 64
GROWTH = 1.10  # of resident bytes, from half of the time to its end: pages of pools come late
IDLE_S = 5.0
BROKEN = re.compile(r"LOST|error at its end|: 5")


def soak(setting: Setting) -> Report:
    """64 clients of the sample for two minutes, with wrong bodies and disconnects: what breaks."""
    command = [sys.executable, "-m", "benchmarks.soak_child"]
    command += ["--seconds", str(SECONDS), "--clients", str(CLIENTS)]
    found = run_child(command).document
    verdicts = judged(found)
    return Report(rows(found, verdicts), notes(found, verdicts), {"ours": [found]})


def judged(found: Document) -> dict[str, bool]:
    """What was promised, and whether it held."""
    before, _, half, full, after = found["weights"]
    lost = [what for what in found["outcomes"] if BROKEN.search(what)]
    cost = {row["task"]: row for row in found["tasks"]}
    return {
        "every request was answered, refused, or left by its client": not lost,
        "answers came": sum(row["answered"] for row in cost.values()) >= CLIENTS,
        "only tasks that are known are counted": not any("unheard" in str(task) for task in cost),
        "no answer failed": not any(row["failed"] for row in cost.values()),
        "it was idle within seconds": found["idle_after_s"] < IDLE_S,
        "and its blocks free": (found["running"], found["waiting"], found["kv_used"]) == (0, 0, 0),
        "no thread is left": after["threads"] <= before["threads"] + 1,  # the tokenizer's
        "no file is left": after["files"] <= before["files"],
        "memory stands still": full["resident_bytes"] <= GROWTH * half["resident_bytes"],
        "the books balance": found["health"] == 200,
        "it ended as it should": found["exit_code"] == 0,
    }


def rows(found: Document, verdicts: dict[str, bool]) -> list[Row]:
    """Peak memory against the budget, and how many promises held."""
    peak, budget = found["weights"][-1]["peak_bytes"], found["budget_bytes"]
    title = ("soak", "peak memory", "bytes")
    memory = compare(title, [peak], "the budget", [budget], less_is_better=True, ok=peak <= budget)
    held, count = sum(verdicts.values()), len(verdicts)
    title = ("soak", "promises kept", "")
    return [memory, compare(title, [held], "promises", [count], ok=held == count)]


def notes(found: Document, verdicts: dict[str, bool]) -> list[str]:
    """What became of the requests, the server's weight on the way, and what did not hold."""
    lines = [f"{count:6} x {what}" for what, count in found["outcomes"].items()]
    lines += [
        f"threads {weight['threads']}, files {weight['files']}, resident"
        f" {weight['resident_bytes'] >> 20} MiB (peak {weight['peak_bytes'] >> 20}),"
        f" processor {weight['processor_s']:.0f} s"
        for weight in found["weights"]
    ]
    lines += [f"NOT SO: {what}" for what, held in verdicts.items() if not held]
    lines += [f"log: {line}" for line in found["log"]]
    return lines
