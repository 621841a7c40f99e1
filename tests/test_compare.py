"""The parts of `retinue compare`: what is measured in which order, verdicts, claims, the page."""

import re
from pathlib import Path
from typing import Any, Never

import numpy as np
import pytest

from retinue.compare.cells import Found, cells, defaults
from retinue.compare.charts import hits, loss_added, quality, share, speed
from retinue.compare.claims import CLAIMS, NOT_HERE, rows
from retinue.compare.document import document
from retinue.compare.foresight import foretold, recall
from retinue.compare.grid import Budget, Disk, Grid, budgets, disks, grid, references
from retinue.compare.live import NAME, measure, turns
from retinue.compare.measures import Seen, belady_points, change, times
from retinue.compare.measures import loss_added as added
from retinue.compare.page import report
from retinue.compare.replayed import Replays
from retinue.compare.verdict import (
    DEMANDED,
    FASTER,
    SLOWER,
    WITHIN,
    Spread,
    paired,
    spread,
    verdict,
)
from retinue.config import Config
from retinue.errors import Refused, UsageError
from retinue.lab.base import Row
from retinue.lab.bench import Bench
from retinue.lab.ledger import Ledger
from retinue.lab.markdown import markdown
from retinue.lab.page import page
from retinue.memory.home import sample_folder
from retinue.model.scoring import LayerRouting
from retinue.model.survey import survey
from retinue.policy.presets import PRESETS

QUARTER, NATIVE = Budget("1GiB", "25%"), Disk(None)


def some_grid(*presets: str, runs: int = 5, experts: tuple[str, ...] = ("25%",)) -> Grid:
    places = tuple(Budget("1GiB", each) for each in experts)
    return Grid(presets, places, (NATIVE, Disk("100MB")), runs, 8)


# --- what is measured


def some_bench(kept: Path) -> Bench:
    folder = sample_folder()
    return Bench(
        model="sample",
        folder=folder,
        facts=survey(folder),
        config=Config(),
        texts=(),
        ledger=Ledger(kept, {}),
        say=print,
    )


def test_no_slots_are_lent_as_no_replay_knows_of_those(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seen(bench: Bench, **settings: Any) -> Never:
        raise Refused(settings["experts"])

    monkeypatch.setattr(Bench, "opened", seen)
    bench = some_bench(tmp_path)
    places = (Budget("1GiB", None), Budget("1GiB", "25%"))
    assert measure(bench, Grid(("auto",), places, (NATIVE,), 1, 1)) == []
    assert list(bench.ledger.entry(NAME).left_out.values()) == ["100%", "25%"]


def test_a_replay_knows_what_the_live_runs_know(tmp_path: Path) -> None:
    """Also what a preset can do without, and which layers have experts."""
    bench = some_bench(tmp_path)
    replays = Replays(bench, some_grid("auto"), tmp_path / "none.trace")
    for row in PRESETS.values():
        given = replays._known(row, 8).given
        assert set(given.learned) == {*row.learned, *row.better_with}, row.name
        assert given.routed == bench.facts.routed
        assert (given.profile is not None) == row.profiled


def test_the_presets_that_are_asked_for() -> None:
    exact = [name for name, row in PRESETS.items() if row.exact]
    assert references("random") == ["auto", "on-demand", "random"]
    assert references("random,on-demand,random") == ["auto", "on-demand", "random"]
    assert set(references("exact")) == set(exact)
    assert set(references("all")) == set(PRESETS)
    assert set(references(None)) == {*exact, "emoe-fetch"}


@pytest.mark.parametrize(
    ("what", "call"),
    [
        ("unknown preset: `fast`", lambda: grid("fast", [QUARTER], [NATIVE], 1, 1)),
        ("an empty list: ` , `", lambda: grid(" , ", [QUARTER], [NATIVE], 1, 1)),
        ("runs is out of range: `0`", lambda: grid("auto", [QUARTER], [NATIVE], 0, 1)),
        ("new_tokens is out of range: `0`", lambda: grid("auto", [QUARTER], [NATIVE], 1, 0)),
        ("not a size: `some`", lambda: budgets(["1GiB"], ["some"])),
        ("not a size: `fast`", lambda: disks("none,fast")),
        ("read limit is out of range: `0MB`", lambda: disks("0MB")),
    ],
)
def test_what_cannot_be_compared(what: str, call: object) -> None:
    assert callable(call)
    with pytest.raises(UsageError) as caught:
        call()
    assert what in str(caught.value)
    assert caught.value.hint


def test_budgets_and_disks() -> None:
    assert budgets(["1GiB", "2GiB"], [None]) == [Budget("1GiB", None), Budget("2GiB", None)]
    assert [each.label for each in budgets(["1GiB"], ["25%", None])] == ["25%", "1GiB"]
    assert disks("none, 100MB, native") == [Disk(None), Disk("100MB")]
    assert [each.label for each in disks("none,1GB")] == ["the disk as it is", "1GB/s"]


@pytest.mark.parametrize(
    ("count", "runs"), [(1, 3), (2, 5), (3, 5), (7, 3), (8, 5), (15, 5), (4, 1)]
)
def test_nobody_is_always_early(count: int, runs: int) -> None:
    names = [f"p{at}" for at in range(count)]
    orders = [some_grid(*names, runs=runs).order(run) for run in range(runs)]
    assert all(sorted(order) == sorted(names) for order in orders)
    places = {name: [order.index(name) for order in orders] for name in names}
    if runs >= count:
        assert all(set(each) == set(range(count)) for each in places.values())
    if runs > 1 and count > 1:
        assert len({order[0] for order in orders}) == min(count, runs)


@pytest.mark.parametrize(("count", "runs"), [(4, 3), (8, 5), (13, 3), (15, 5), (30, 3)])
def test_nobody_always_comes_after_the_same_one(count: int, runs: int) -> None:
    names = [f"p{at}" for at in range(count)]
    orders = [some_grid(*names, runs=runs).order(run) for run in range(runs)]
    for name in names:
        before = [order[order.index(name) - 1] for order in orders if order.index(name)]
        assert len(set(before)) > 1


def test_whole_runs_come_one_after_the_other() -> None:
    found = turns(some_grid("a", "b", runs=2))
    assert [turn.run for turn in found] == [0] * 4 + [1] * 4
    assert [turn.preset for turn in found] == ["a", "b", "a", "b", "b", "a", "b", "a"]
    assert len({turn.key for turn in found}) == 8


# --- verdicts


def runs_of(preset: str, *speeds: float, **fields: object) -> list[Row]:
    """One row a run, at one place."""
    base: Row = {"preset": preset, "exact": True, "memory": "1GiB", "experts": "25%"}
    counts = dict.fromkeys(("slots", "resident_experts", "decode_tokens", "prefill_tokens"), 10)
    zero = ("stall_s", "prefill_stall_s", "bytes_read_per_token", "bytes_read", "load_s", "misses")
    more = ("prefill_bytes_read", "pending", "pending_rate", "degraded_share", "ttft_s")
    base |= counts | dict.fromkeys((*zero, *more), 0.0) | {"total_experts": 40, "decode_s": 1.0}
    base |= {"read_limit": None, "hits": 5, "hit_rate": 0.5, "miss_rate": 0.5, "prefill_s": 1.0}
    base |= {"budget_bytes": 100, "peak_rss_bytes": 90, **fields}  # type: ignore[dict-item]
    return [
        base | {"run": run, "decode_tokens_per_s": value, "prefill_tokens_per_s": 10 * value}
        for run, value in enumerate(speeds)
    ]


@pytest.mark.parametrize(
    ("mine", "theirs", "demanded", "wanted"),
    [
        ((11, 12, 13), (10, 10, 10), "", FASTER),
        ((9, 8, 9), (10, 10, 10), "", SLOWER),
        ((9, 8, 9), (10, 10, 10), "whole layers", DEMANDED),
        ((9, 11, 9), (10, 10, 10), "whole layers", WITHIN),
        ((10, 10), (10, 10), "", WITHIN),
        # A machine that becomes ten times as fast favours nobody: pairs are of the same run.
        ((5, 50), (10, 100), "", SLOWER),
        ((5,), (10,), "", None),
    ],
)
def test_verdicts_are_of_pairs(
    mine: tuple[float, ...], theirs: tuple[float, ...], demanded: str, wanted: str | None
) -> None:
    ratios = paired(runs_of("a", *mine), runs_of("b", *theirs), "decode_tokens_per_s")
    assert verdict(ratios, demanded) == wanted


def test_runs_without_a_partner_do_not_count() -> None:
    found = paired(runs_of("a", 6, 8), runs_of("b", 3), "decode_tokens_per_s")
    assert found == Spread(2, 2, 2, 1)
    assert paired(runs_of("a", 6), [], "decode_tokens_per_s") is None
    assert verdict(None) is None
    assert spread([3, 1, 2]) == Spread(2, 1, 3, 3)


def test_a_cell_is_the_median_of_its_runs() -> None:
    live = [*runs_of("on-demand", 10, 20, 40), *runs_of("auto", 11, 22, 80)]
    plain: Row = {"preset": "plain", "task": "all", "nll": 2.0, "nll_plain": 2.0, "agreement": 1.0}
    base, auto = cells(some_grid("on-demand", "auto", "random"), Found(live, [plain]))
    assert base["decode_tokens_per_s"] == 20
    assert (base["decode_tokens_per_s_min"], base["decode_tokens_per_s_max"]) == (10, 40)
    assert "decode_verdict" not in base
    assert auto["decode_against_on_demand"] == pytest.approx(1.1)
    assert auto["decode_against_on_demand_max"] == 2
    assert (auto["decode_verdict"], auto["prefill_verdict"]) == (FASTER, FASTER)
    assert (auto["runs"], auto["nll"], auto["agreement"]) == (3, 2.0, 1.0)


def test_what_a_replay_says_stands_beside() -> None:
    live = runs_of("on-demand", 10, 20)
    replay: Row = {"preset": "on-demand", "memory": "1GiB", "experts": "25%", "read_limit": None}
    replay |= {"hit_rate": 0.4, "belady_hit_rate": 0.7, "decode_tokens_per_s": 14.0}
    (cell,) = cells(some_grid("on-demand"), Found(live, [], simulated=[replay]))
    assert cell["simulated_hit_rate"] == 0.4
    assert cell["simulated_decode_tokens_per_s"] == 14
    assert cell["belady_distance"] == pytest.approx(0.3)
    assert belady_points().values(Seen([cell])) == [pytest.approx(30)]


def test_the_default_stands_beside_the_best() -> None:
    others = [*runs_of("on-demand", 10, 10), *runs_of("layer-stream", 12, 12)]
    lossy = runs_of("random", 99, 99, exact=False)
    live = [*others, *lossy, *runs_of("auto", 11, 11.5)]
    found = defaults(some_grid("auto", "on-demand", "layer-stream", "random"), Found(live, []))
    assert [row["phase"] for row in found] == ["decode", "prefill"]
    assert (found[0]["best"], found[0]["verdict"]) == ("layer-stream", SLOWER)
    assert found[0]["against_best"] == pytest.approx(11.25 / 12)


# --- foresight


def test_recall_of_the_next_gate() -> None:
    """Two tokens, top 2 of 4: the first names both, the second one of the one that there is."""
    scores = np.array([[0.4, 0.1, 0.3, 0.2], [0.1, 0.2, 0.3, 0.4]], np.float32)
    none = np.zeros((2, 2), np.int64)
    now = LayerRouting(1, none, np.ones((2, 2), np.float32), ahead={"next_scores": scores})
    chosen = np.array([[0, 2], [2, 4]])  # 4 means none
    after = LayerRouting(3, chosen, np.ones((2, 2), np.float32))
    assert foretold([now, after], 4) == {3: (3, 3)}
    other = LayerRouting(3, np.array([[1, 3], [0, 3]]), np.ones((2, 2), np.float32))
    assert foretold([now, other], 4) == {3: (1, 4)}
    assert recall([{"named": 3, "used": 3}, {"named": 1, "used": 5}]) == 0.5
    assert recall([]) is None


# --- claims


def test_measures_are_of_the_same_place() -> None:
    live = [*runs_of("on-demand", 10), *runs_of("auto", 15, hits=8)]
    slow = [*runs_of("on-demand", 4, read_limit="100MB"), *runs_of("auto", 2, read_limit="100MB")]
    seen = Seen(cells(some_grid("on-demand", "auto"), Found([*live, *slow], [])))
    assert sorted(times("auto").values(seen)) == [0.5, 1.5]
    assert times("auto", phase="prefill").found(seen) == Spread(1.0, 0.5, 1.5, 2)
    assert sorted(change("auto", "hits", ("hits",)).values(seen)) == [0, pytest.approx(0.6)]
    assert times("random").found(seen) is None
    one = times("auto")
    assert one.written(Spread(1.0, 0.5, 1.5, 2)) == "1.00 (0.50 to 1.50)"
    assert one.written(Spread(2.0, 2.0, 2.0, 1)) == "2.00"


def test_loss_is_over_the_plain_one() -> None:
    row: Row = {"preset": "a", "nll": 2.2, "nll_plain": 2.0}
    row |= {"memory": "1GiB", "experts": "25%", "read_limit": None}
    assert added("a").values(Seen([row])) == [pytest.approx(0.1)]
    assert loss_added(row) == pytest.approx(0.2)
    assert loss_added({"nll": None}) is None


def test_every_claim_has_a_row() -> None:
    foresight: list[Row] = [{"layer": 1, "named": 8, "used": 10, "recall": 0.8}]
    found = rows(Seen([], foresight))
    assert len(found) == len(CLAIMS)
    known = [row for row in found if row["found"] != NOT_HERE]
    assert {row["preset"] for row in known} == {"auto", "daop"}
    assert known[0]["found"] == "80.0%"
    for claim in CLAIMS:
        assert re.search(r"\d{4}\.\d{5}", claim.paper), claim.paper
        assert claim.preset in PRESETS
        assert claim.where
        assert re.search(r"\d|no loss|half", claim.said), claim.said
        assert claim.why


# --- what is shown


def a_document(tmp_path: Path) -> tuple[Grid, dict[str, object]]:
    wanted = some_grid("auto", "on-demand", "random", runs=2, experts=("25%", "50%"))
    live = []
    for experts, slots in (("25%", 10), ("50%", 20)):
        place = {"experts": experts, "slots": slots}
        live += [*runs_of("on-demand", 10, 20, **place), *runs_of("auto", 8, 19, **place)]
        live += runs_of("random", 30, 40, exact=False, **place)
    ledger = Ledger(tmp_path, {"version": "1"})
    ledger.entry("live").cells["all"] = live
    ledger.entry("live").left_out["emoe, 1GiB, 25%, None, run 1"] = "not of this grid"
    ledger.entry("live").left_out["random, 1GiB, 50%, 100MB, run 1"] = "a <reason>"
    score: Row = {"preset": "random", "memory": "1GiB", "experts": "25%", "task": "sql"}
    score |= {"nll": 2.5, "nll_plain": 2.0, "agreement": 0.5, "tokens": 9}
    ledger.entry("quality").cells["random"] = [score, score | {"task": "all"}]
    return wanted, document("a model", wanted, {"machine": "a box"}, ledger)


def test_the_document_is_flat(tmp_path: Path) -> None:
    _, found = a_document(tmp_path)
    assert found["refused"] == [{"preset": "random", "reason": "a <reason>"}]
    assert isinstance(found["cells"], list)
    assert len(found["cells"]) == 6
    for name in ("cells", "auto", "tasks", "claims", "foresight", "refused"):
        listed = found[name]
        assert isinstance(listed, list)
        for row in listed:
            assert not any(isinstance(value, (list, dict)) for value in row.values()), name


def test_the_page_says_what_was_found(tmp_path: Path) -> None:
    wanted, found = a_document(tmp_path)
    shown = report(wanted, found)
    text, words = page(shown), markdown(shown)
    for said in (
        "Slower than `on-demand` in decoding or prefill, of 4 places: `auto` in 2.",
        "the best exact preset, or faster, in 0 of 4 cells and phases",
        "a box",
    ):
        assert re.sub("`(.*?)`", r"<code>\1</code>", said) in text
        assert said in words
    assert "a &lt;reason&gt;" in text
    assert "| random | 1GiB | 25% | +0.500 (0.500) |" in words
    assert "| auto | 0.88 ▼ (0.80 to 0.95) |" in words
    for claim in CLAIMS:
        assert claim.said in words


def test_plots(tmp_path: Path) -> None:
    wanted, found = a_document(tmp_path)
    listed = found["cells"]
    assert isinstance(listed, list)
    decode, prefill = speed(wanted, listed)
    assert (decode.title, prefill.title) == (
        "Decode, the disk as it is",
        "Prefill, the disk as it is",
    )
    assert {series.label for series in decode.series} == {"auto", "on-demand", "random"}
    assert decode.series[0].x == [25, 50]
    assert decode.series[0].low == [8, 8]
    assert share({"slots": 50, "total_experts": 40}) == 100
    (loss,) = quality(listed, NATIVE)
    assert loss.series[0].y == [0.5]  # of the other share nothing was measured
    (rate,) = hits(listed, NATIVE)
    assert {series.label for series in rate.series} == {"auto", "on-demand"}
    best = [row | {"belady_hit_rate": 0.9} for row in listed]
    assert hits(best, NATIVE)[0].series[-1].y == [90, 90]
    one = [row for row in listed if row["experts"] == "25%"]
    assert not hits(one, NATIVE)
    assert not speed(wanted, one)
    many = [row | {"preset": f"p{at}"} for row in listed for at in range(9) if not row["exact"]]
    titles = [chart.title for chart in speed(wanted, many)]
    assert titles[:2] == [
        f"Decode of approximate presets ({part} of 2), the disk as it is" for part in (1, 2)
    ]
    assert not quality([row for row in listed if row["exact"]], NATIVE)
