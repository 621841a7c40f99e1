"""Decoding far below what the machine should give is said once, with the likely reason."""

import pytest

from command import Call, caller
from retinue.engine import bands, watch
from retinue.engine.bands import Machine
from retinue.engine.watch import Watch, expected
from retinue.memory import machine
from retinue.memory.machine import CoreTimes, Rate, Speeds
from retinue.metrics import PhaseCounters
from test_plan import FACTS, GB, MB

# 20 experts of 1 MB and 40 MB of dense weights a step: 6 ms at best; 4 MB read: 4 ms.
MACHINE = Machine(Speeds(1 * GB, 10 * GB), {"bfloat16": Rate(10 * GB, 1e12)}, threads=2)
STEPS = {"hits": 160, "pending": 20, "misses": 20, "used_bytes_read": 40 * MB}


@pytest.fixture(autouse=True)
def round_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DISK", "ROWS"):
        monkeypatch.setattr(bands, name, (0.5, 1.0))
    monkeypatch.setattr(bands, "STEP_LAYER_S", (1e-3, 0.0))


def counted(seconds: float, *, steps: int = 10, **fields: float) -> PhaseCounters:
    return PhaseCounters(
        passes=steps,
        tokens=steps,
        seconds=seconds,
        **(STEPS | {"bytes_read": 50 * MB} | fields),  # type: ignore[arg-type]
    )


def alone(seen: PhaseCounters, others: float = 0.0) -> Watch:
    """A watch of a process beside which others take so many cores from now on."""
    now = machine.core_times()
    return Watch(
        FACTS, MACHINE, seen, began=CoreTimes(now.at - 1e6, now.everyone - others * 1e6, now.own)
    )


def test_what_is_expected_follows_from_what_was_read_and_used() -> None:
    band = expected(FACTS, MACHINE, counted(1.0))
    assert band is not None
    # At worst 8 ms of reads, then 12 ms of weights and 10 ms of the layers' own.
    assert band.low == pytest.approx(1000 / 30)
    assert band.high == pytest.approx(1000 / 6)
    assert expected(FACTS, MACHINE, PhaseCounters()) is None
    assert expected(FACTS, Machine(MACHINE.speeds, {}, 2), counted(1.0)) is None


def test_it_is_said_once_and_only_far_below() -> None:
    assert alone(counted(0.59, dense_s=0.5)).after() == ""
    slow = alone(counted(0.61, dense_s=0.5))
    assert slow.after().startswith("slow: 16.39 tokens/s, where this machine should give 33.33 to")
    assert slow.after() == slow.during() == ""


def test_while_it_goes_on_only_a_long_run_is_judged() -> None:
    assert alone(counted(9.9, dense_s=5.0)).during() == ""
    assert alone(counted(10.1, dense_s=5.0)).during() != ""


def test_too_little_to_judge() -> None:
    assert alone(counted(9.0, steps=watch.LEAST_STEPS - 1)).after() == ""
    several = counted(9.0)
    several.tokens = 30
    assert alone(several).after() == ""


@pytest.mark.parametrize(
    ("fields", "others", "reason"),
    [
        (
            {"stall_s": 0.8},
            0.0,
            "80% of the time it waited for reads: 0.05 of 1.00 GB/s of the disk",
        ),
        (
            {"expert_s": 0.4, "dense_s": 0.2},
            0.0,
            "60% of the time it multiplied: 1.00 of 10.00 GB/s of weights",
        ),
        ({"expert_s": 0.2}, 0.0, "80% of the time it neither read nor multiplied"),
        ({"stall_s": 0.8}, 1.5, "other programs took 1.5 of 4 cores"),
    ],
)
def test_the_likely_reason(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, float], others: float, reason: str
) -> None:
    monkeypatch.setattr(watch, "cores", lambda: 4)
    monkeypatch.setattr(watch, "core_times", lambda: CoreTimes(10.0, 100.0, 50.0))
    began = CoreTimes(0.0, 100.0 - 10 * others, 50.0)
    said = Watch(FACTS, MACHINE, counted(1.0, **fields), began=began).after()
    assert said.endswith(f"; {reason}")


def test_cores_that_others_take() -> None:
    first = CoreTimes(at=0.0, everyone=100.0, own=10.0)
    assert first.others_until(CoreTimes(10.0, 115.0, 13.0)) == pytest.approx(1.2)
    assert first.others_until(CoreTimes(10.0, 105.0, 17.0)) == 0.0
    assert first.others_until(first) == 0.0


def test_core_times_of_a_system(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stat:
        def __init__(self, path: str) -> None:
            assert path == "/proc/stat"

        def read_text(self) -> str:
            return "cpu  100 20 30 9000 8000 4 6 0 0 0\ncpu0 1 2\n"

    monkeypatch.setattr(machine, "Path", Stat)
    monkeypatch.setattr(machine.os, "sysconf", lambda name: 10)
    assert machine.core_times().everyone == 16.0


@pytest.mark.parametrize(("verb", "more"), [("run", ("hello", "--ignore-eos")), ("bench", ())])
def test_run_and_bench_say_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str, more: tuple[str]
) -> None:
    """As if the machine could do a million tokens a second, and then as it is."""
    speeds, fast = Speeds(1e15, 1e15), {"bfloat16": Rate(1e15, 1e18)}
    for name in ("measure_disk", "measure_memory"):
        monkeypatch.setattr(f"retinue.cli.bench.{name}", lambda *_, **__: 1e15)
    monkeypatch.setattr("retinue.cli.bench.known_rates", lambda *_, **__: fast)
    monkeypatch.setattr("retinue.cli.run.remembered_speeds", lambda folder: speeds)
    monkeypatch.setattr("retinue.cli.run.remembered_rates", lambda threads: fast)
    count = "--max-new-tokens" if verb == "run" else "--new-tokens"
    call: Call = caller(capsys)
    words = (verb, "sample", *more, count, 12, "--memory", "2GiB")
    assert "slow: " not in call(*words).err
    monkeypatch.setattr(bands, "STEP_LAYER_S", (1e-9, 1e-9))
    said = call(*words).err
    assert said.count("slow: ") == 1
    assert "tokens/s, where this machine should give" in said
