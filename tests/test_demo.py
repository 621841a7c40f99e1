"""`make demo`: the same tokens with a quarter of the experts, or an exit code that says so."""

import dataclasses

import pytest

from command import ESCAPE
from retinue.cli import demo
from retinue.metrics import Costs, PhaseCounters
from retinue.types import Output, Stats


def output(*token_ids: int) -> Output:
    stats = Stats(
        decode_s=0.5,
        decode_tokens_per_s=4.0,
        hits=30,
        pending=4,
        misses=6,
        bytes_read=1 << 20,
        prefill_bytes_read=1 << 20,
        resident_experts=64,
        total_experts=256,
    )
    return Output("some  text\n", list(token_ids), "length", 5, stats=stats)


def test_the_demonstration(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "TASKS", demo.TASKS[:2])
    monkeypatch.setattr(demo, "PARAMS", dataclasses.replace(demo.PARAMS, max_new_tokens=6))
    assert demo.main() == 0
    out, err = capsys.readouterr()
    assert out.count("(same tokens with all and a quarter of the experts)") == len(demo.TASKS)
    assert out.endswith("\nall tokens are equal\n")
    lines = out.splitlines()
    header, whole, quarter = (line.split() for line in lines[-5:-2])
    assert header[:2] == ["experts", "resident"]
    assert (whole[0], quarter[0], quarter[2:4]) == ("100%", "25%", ["of", "256"])
    # Fewer than the slots where the last token's look-ahead was still reading.
    assert 48 < int(quarter[1]) <= 64 < int(whole[1]) <= 256
    assert len(err.splitlines()) == 2
    assert ESCAPE not in out + err


COSTS = Costs(
    PhaseCounters(bytes_read=1 << 20),
    PhaseCounters(tokens=4, seconds=1.0, hits=60, pending=5, misses=15, bytes_read=3 << 20),
)


def test_tokens_that_differ(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(share: str, prompts: list[str]) -> demo.Run:
        last = output(1, 2) if share == "100%" else output(1, 3)
        return demo.Run(share, [output(1, 2)] * (len(prompts) - 1) + [last], 3 << 20, COSTS)

    monkeypatch.setattr(demo, "_run", run)
    assert demo.main() == 1
    out = capsys.readouterr().out
    assert out.count("(same tokens") == 3
    assert out.count("(DIFFERENT TOKENS") == 1
    assert "  -> some text" in out
    assert out.endswith("\nthe tokens differ: this is a defect\n")


def test_the_table_adds_up() -> None:
    table = demo._table([demo.Run("25%", [output(1), output(2)], 3 << 20, COSTS)])
    header, row = table.splitlines()
    assert header.split() == [
        *("experts", "resident", "resident", "bytes"),
        *("hit", "rate", "bytes", "read", "tokens/s"),
    ]
    # 60 of 80 lookups hit, 3 + 1 MiB read, 4 tokens in one second.
    assert " ".join(row.split()) == "25% 64 of 256 3 MiB 75% 4 MiB 4.0"


def test_one_prompt_a_task() -> None:
    prompts = demo._prompts()
    assert tuple(prompts) == demo.TASKS
    assert all(0 < len(prompt) <= 600 for prompt in prompts.values())
