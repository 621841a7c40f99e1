"""The command line as tests call it: in this process with `call`, or as a process of its own."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from retinue.cli.main import main

MEMORY = ("--memory", "2GiB")
# The contract: scripts outside the project rely on these.
RUN_KEYS = {"text", "token_ids", "prompt_tokens", "new_tokens", "finish_reason", "stats"}
STATS_KEYS = {
    *("load_s", "ttft_s", "prefill_s", "decode_s", "prefill_tokens_per_s"),
    *("decode_tokens_per_s", "decode_median_tokens_per_s", "peak_rss_bytes", "budget_bytes"),
    *("resident_experts", "total_experts", "hits", "pending", "misses", "hit_rate"),
    *("bytes_read", "bytes_read_per_token", "read_bytes_per_s", "stall_s", "degraded_share"),
}
BOUND_KEYS = {"disk_bytes_per_s", "memory_bytes_per_s", "bound_tokens_per_s", "share_of_bound"}
ESCAPE = "\x1b"


@dataclass(frozen=True, slots=True)
class Done:
    """How a command line ended, and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The JSON in the last line of stdout."""
        return dict(json.loads(self.out.splitlines()[-1]))


Call = Callable[..., Done]


def caller(capsys: pytest.CaptureFixture[str]) -> Call:
    """A function that runs `retinue ARGUMENTS` in this process."""

    def call(*arguments: object) -> Done:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Done(code, *capsys.readouterr())

    return call


class Terminal(io.StringIO):
    """A stream that somebody looks at or types into."""

    def isatty(self) -> bool:
        return True


def start(*arguments: object, **settings: Any) -> subprocess.Popen[bytes]:
    """`python -m retinue ARGUMENTS`, with pipes unless `settings` say otherwise."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, "-m", "retinue", *map(str, arguments)]
    return subprocess.Popen(command, **(pipes | {"env": environment()} | settings))


def environment(**variables: str) -> dict[str, str]:
    """Ours, but with output buffered as it is for everybody."""
    return {**os.environ, "NO_COLOR": "1", "PYTHONUNBUFFERED": "", **variables}


def finish(*arguments: object, stdin: bytes = b"", **settings: Any) -> Done:
    """`python -m retinue ARGUMENTS` to its end."""
    with start(*arguments, **settings) as process:
        out, err = process.communicate(stdin, timeout=120)
    return Done(process.returncode, out.decode(), err.decode())


def imported(*arguments: object) -> tuple[Done, set[str]]:
    """`python -m retinue ARGUMENTS` to its end, and the packages that it imported."""
    done = finish(*arguments, env=environment(PYTHONPROFILEIMPORTTIME="1"))
    names = [line.split("|")[-1].strip() for line in done.err.splitlines() if "|" in line]
    return done, {name.partition(".")[0] for name in names}


def refused(done: Done, code: int, what: str) -> None:
    """It ended with `code`, and said what was wrong and what to do, on stderr alone."""
    assert done.code == code, done
    assert done.out == ""
    first, *rest = done.err.splitlines()
    assert first.startswith("error: ")
    assert what in first
    assert any(line.startswith("hint: ") for line in rest), done.err
    assert ESCAPE not in done.err
