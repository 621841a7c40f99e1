"""Runs one engine in a process of its own, so that imports and peak memory are its own too."""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.group import Group
from benchmarks.results import Document

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 7200


class ChildFailedError(Exception):
    """A child that ended without a result; `killed`: by the kernel, for its memory."""

    def __init__(self, command: Sequence[str], code: int, errors: str) -> None:
        self.killed = code in (-9, 137)
        lines = [line for line in errors.splitlines() if line.strip()] or ["no output"]
        reason = "killed, most likely for its memory" if self.killed else f"exit {code}"
        super().__init__(f"{_shown(command)}: {reason}: " + " / ".join(lines[-3:])[:400])


@dataclass(frozen=True, slots=True)
class Done:
    """What a child printed as its last line, and how long all of it took."""

    document: Document
    wall_s: float


def run_child(command: Sequence[str], group: Group | None = None) -> Done:
    """Run `command`, within `group` if there is one. Raises ChildFailedError without a result."""
    words = group.wrap(command) if group else list(command)
    started = time.perf_counter()
    try:
        done = subprocess.run(
            words,
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ChildFailedError(command, 124, f"no result after {LIMIT_S} s") from error
    wall_s = time.perf_counter() - started
    if done.returncode != 0:
        raise ChildFailedError(command, done.returncode, done.stderr)
    try:
        document = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise ChildFailedError(command, 0, "its last line is not JSON") from error
    if group and (peak := group.peak_bytes()) is not None:
        document["group_peak_bytes"] = peak
    return Done(document, wall_s)


def timed(command: Sequence[str]) -> Document:
    """The result of `command` with the whole process's time as `wall_s`."""
    done = run_child(command)
    return done.document | {"wall_s": round(done.wall_s, 4)}


def environment() -> dict[str, str]:
    """Ours without settings that would make two runs differ, and without a network."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RETINUE_")}
    return kept | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(slots=True)
class Turns:
    """The runs of several engines, and why some have none."""

    runs: dict[str, list[Document]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def in_turn(
    rounds: int, engines: Mapping[str, Callable[[], Document]], *, must: str = "ours"
) -> Turns:
    """Run every engine once, then every one again: what drifts then drifts for all.

    An engine that fails is left out from then on, with a note, unless it is `must`.
    """
    turns = Turns({name: [] for name in engines})
    for number in range(1, rounds + 1):
        for name in list(turns.runs):
            say(f"  round {number} of {rounds}: {name}")
            try:
                turns.runs[name].append(engines[name]())
            except ChildFailedError as error:
                if name == must:
                    raise
                del turns.runs[name]
                turns.notes.append(f"{name} is left out: {error}")
    return turns


def say(text: str) -> None:
    """One line for whoever waits, on stderr."""
    print(text, file=sys.stderr, flush=True)


def _shown(command: Sequence[str]) -> str:
    """The command without folders."""
    return shlex.join(Path(word).name if word.startswith("/") else word for word in command)
