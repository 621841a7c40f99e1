"""Whom replays recommend: nobody but the default, unless it is sure."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from recordings import HEAD, READ_BYTES, chance, setting, trace_of
from retinue.policy.preset import Given, Preset
from retinue.policy.presets import preset
from retinue.sim.candidates import Known, candidates
from retinue.sim.cells import Cell, Table
from retinue.sim.costs import Times
from retinue.sim.recommend import DECODE_ERROR, PREFILL_ERROR, Advice, Evidence, Live, advise
from retinue.sim.recorded import Recording
from retinue.sim.stage import Setting

PLAIN = Times(1e-4, 2e-4)


def place(share: float) -> Setting:
    """Where each token costs `auto` so much more than `on-demand`, as a share of a pass."""
    return replace(setting(24, times=PLAIN), own={"auto": replace(PLAIN, pass_s=share * 1.2e-3)})


def known(row: Preset, slots: int) -> Known:
    shape = HEAD.layers, HEAD.experts, HEAD.top_k, HEAD.routed
    return Known(Given(HEAD.model, *shape, slots))


def advised(
    file: Path, shares: Sequence[float], live: Live | None = None, *, prompt: int = 1
) -> Advice:
    """With the costs of runs in which `auto` was so much slower, and of the first of them."""
    trace = trace_of(file, [chance(0, 200, prompt=prompt)], ("next_scores",))
    able, _ = candidates([preset("auto"), preset("on-demand")], HEAD_AHEAD, known, timed=False)
    table = Table(Recording(trace, ("next_scores",)), able, READ_BYTES)
    evidence = Evidence([place(share) for share in shares])
    if live is not None:
        evidence = replace(evidence, live=live)
    return advise(table, able, Cell("all", place(shares[0])), evidence)


HEAD_AHEAD = replace(HEAD, signals=("next_scores",))


def test_who_is_ahead_by_more_than_all_errors_is_named(tmp_path: Path) -> None:
    found = advised(tmp_path / "a.trace", (0.5, 0.4, 0.6))
    assert (found.best.preset, found.why_not) == ("on-demand", ())
    assert found.margin == pytest.approx(0.5, abs=0.1)  # reads are the same


@pytest.mark.parametrize(
    ("shares", "reason"),
    [
        ((0.5, 0.5), "costs of too few runs to tell presets apart (2)"),
        ((0.5, -0.1, 0.6), "so it is within their spread"),
        ((0.5, 0.5, 0.12), "which is within what replays err (15%)"),
    ],
)
def test_otherwise_the_default_stays(
    tmp_path: Path, shares: tuple[float, ...], reason: str
) -> None:
    found = advised(tmp_path / "a.trace", shares)
    assert (found.best.preset, found.margin) == ("auto", 0)
    assert found.why_not[0].startswith("`on-demand`")
    assert reason in found.why_not[0]
    assert found.tries[0].preset == "on-demand", "though it seems the fastest"


def test_the_default_is_not_doubted_where_it_is_ahead(tmp_path: Path) -> None:
    found = advised(tmp_path / "a.trace", (0.005, 0.5, 0.5))
    assert (found.best.preset, found.why_not) == ("auto", ())


def test_what_ran_live_has_the_last_word(tmp_path: Path) -> None:
    asked = []

    def live(name: str, prefill_tokens: int, decode_tokens: int) -> tuple[float, ...]:
        asked.append((name, prefill_tokens, decode_tokens))
        return (1.2, 0.97, 1.3)

    found = advised(tmp_path / "a.trace", (0.5, 0.5, 0.5), live)
    assert found.best.preset == "auto"
    assert "but live it was 0.97 to 1.30 times as fast" in found.why_not[0]
    assert asked[0] == ("on-demand", 1, 199)
    assert advised(tmp_path / "b.trace", (0.5, 0.5, 0.5), lambda *_: (1.1, 1.2)).margin > 0


def test_prompts_are_foreseen_less_well(tmp_path: Path) -> None:
    """Of a recording that is half prompts in time, both errors count for half."""
    assert DECODE_ERROR < PREFILL_ERROR
    found = advised(tmp_path / "a.trace", (0.25, 0.25, 0.25), prompt=190)
    assert found.best.preset == "auto"
    assert "within what replays err" in found.why_not[0]
    assert "(15%)" not in found.why_not[0]
