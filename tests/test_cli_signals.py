"""The command line as a process of its own: signals, closed pipes, a terminal, what it imports."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

import retinue
from command import MEMORY, Done, environment, finish, imported, start
from retinue.cli.interrupts import cancel_on

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")

LONG = ("run", "sample", "A: Hello there!\nB:", "--ignore-eos", "--max-new-tokens", "1500", *MEMORY)
HEAVY = {"torch", "transformers", "tokenizers", "safetensors", "yaml"}
PATIENCE_S = 60.0


def read_some(process: subprocess.Popen[bytes], count: int) -> bytes:
    """At least `count` bytes of stdout, as they come."""
    assert process.stdout is not None
    found = b""
    while len(found) < count:
        piece = os.read(process.stdout.fileno(), 4096)
        assert piece, "it ended early"
        found += piece
    return found


def wait_for(process: subprocess.Popen[bytes], pattern: bytes) -> bytes:
    """What stderr says up to a match of `pattern`.

    A progress bar shows no more than ten counts a second: ask for "at least", never for one count.
    """
    assert process.stderr is not None
    found = b""
    while not re.search(pattern, found):
        piece = os.read(process.stderr.fileno(), 4096)
        assert piece, found
        found += piece
    return found


def stop(process: subprocess.Popen[bytes], number: signal.Signals) -> tuple[Done, float]:
    """Send the signal and wait; how it ended, and after how many seconds."""
    started = time.perf_counter()
    process.send_signal(number)
    out, err = process.communicate(timeout=PATIENCE_S)
    elapsed = time.perf_counter() - started
    return Done(process.returncode, out.decode(), err.decode()), elapsed


# --- signals in the middle of an answer


def test_terminated_in_mid_answer() -> None:
    with start(*LONG) as process:
        first = read_some(process, 30)
        done, elapsed = stop(process, signal.SIGTERM)
    assert done.code == 1
    assert elapsed < 10
    # Whole characters and a whole line, although it was cut.
    assert len(first) >= 30
    assert done.out.endswith("\n")
    assert "error: stopped by SIGTERM after " in done.err
    assert "Traceback" not in done.err


def test_interrupted_in_mid_answer_with_json() -> None:
    with start(*LONG, "--json") as process:
        wait_for(process, b"loaded in")
        time.sleep(0.2)  # some tokens, on any machine far fewer than all
        done, elapsed = stop(process, signal.SIGINT)
    assert done.code == 1
    assert elapsed < 10
    document = done.document
    assert document["finish_reason"] == "cancelled"
    assert document["new_tokens"] == len(document["token_ids"]) < 1500
    assert f"error: stopped by SIGINT after {document['new_tokens']} tokens" in done.err
    assert "Traceback" not in done.err


def test_nobody_reads_the_answer() -> None:
    with start(*LONG) as process:
        assert process.stdout is not None
        read_some(process, 1)
        process.stdout.close()
        assert process.stderr is not None
        err = process.stderr.read().decode()
        code = process.wait(PATIENCE_S)
    assert code == 1
    assert "Traceback" not in err
    assert "BrokenPipe" not in err
    assert "Exception ignored" not in err


def test_nobody_reads_a_table() -> None:
    """Short output is written when the program ends."""
    command = f"{sys.executable} -m retinue presets | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
        env=environment(),
    )
    assert done.returncode == 1, done
    assert done.stderr == ""


# --- the handler itself


def test_the_first_signal_cancels_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    calls: list[str] = []
    with cancel_on(lambda: calls.append("cancelled"), signal.SIGINT, signal.SIGTERM) as came:
        assert came == []
        signal.raise_signal(signal.SIGTERM)
        assert came == [signal.SIGTERM]
    assert calls == ["cancelled"]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_the_second_signal_raises() -> None:
    before = signal.getsignal(signal.SIGINT)
    calls: list[str] = []

    def twice() -> None:
        with cancel_on(lambda: calls.append("cancelled"), signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        twice()
    assert calls == ["cancelled"]
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_have_no_signals() -> None:
    seen: list[list[int]] = []

    def work() -> None:
        with cancel_on(lambda: None, signal.SIGINT) as came:
            seen.append(came)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(PATIENCE_S)
    assert seen == [[]]
    assert signal.getsignal(signal.SIGINT) is before


# --- without a model


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--help"], "Mixture-of-Experts"), (["--version"], f"retinue {retinue.__version__}\n")],
)
def test_answers_at_once(arguments: list[str], said: str) -> None:
    done, packages = imported(*arguments)
    assert done.code == 0
    assert said in done.out
    assert "argparse" in packages
    assert not HEAVY & packages


def test_errors_need_no_model_code() -> None:
    done = finish("plan", "sample", "--preset", "nonesuch")
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines()[0] == "error: unknown preset: `nonesuch`"
    assert done.err.splitlines()[1:] == ["", f"hint: known: {', '.join(retinue.PRESETS)}"]
    assert not HEAVY & imported("plan", "sample", "--preset", "nonesuch")[1]
