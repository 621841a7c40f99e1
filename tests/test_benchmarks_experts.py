"""The benchmarks of few experts: their commands, rows and tables, and one child on the sample."""

from pathlib import Path
from typing import Any

import pytest
from benchmarks import methods, quality, saved, slow_disk, slow_disk_child
from benchmarks.checkpoint import Checkpoint
from benchmarks.methods import Method
from benchmarks.setting import Setting

from models import open_llm
from retinue.cli.verbs import build_parser
from retinue.engine.tasks import TaskText

SMALL = Checkpoint(Path("small"), "olmoe", 1000, 800, experts=16, top_k=2)
SETTING = Setting(SMALL, 1 << 30, 1, small=lambda: SMALL, per_task=2, data=Path("texts.jsonl"))


def scores(nll: float, bytes_read: int) -> dict[str, Any]:
    """What `eval` says of one cell."""
    tasks = {"a": {"nll": 2 * nll - 2, "nll_plain": 2.0}, "b": {"nll": 2.0, "nll_plain": 2.0}}
    document = {"nll": nll, "nll_plain": 2.0, "agreement": 0.9, "degraded_share": 0.1}
    return document | {"bytes_read": bytes_read, "tasks": tasks}


@pytest.mark.parametrize("method", quality.METHODS + slow_disk.METHODS)
def test_every_method_is_one_that_the_command_line_knows(method: Method) -> None:
    words = quality.command(SETTING, 40, method)[3:]
    options = build_parser().parse_args(words)
    assert (options.model, options.per_task, options.experts) == ("sample", 2, "40%")
    assert Path(options.data) == Path("texts.jsonl").resolve()
    child = slow_disk.command(SETTING, 20, 300, method)[3:]
    ours = slow_disk_child.build_parser().parse_args(child)
    assert (ours.preset, ours.fetch_above) == (method.preset, method.fetch_above)
    assert (ours.experts, ours.read_limit, ours.forecaster) == ("20%", "300MB", method.forecaster)


def test_methods_have_names_of_their_own() -> None:
    for each in (quality.METHODS, slow_disk.METHODS):
        assert len({method.name for method in each}) == len(each)
    assert set(slow_disk.OURS) <= {method.name for method in slow_disk.METHODS}
    assert Method("emoe-fetch", 0.25).name == "emoe-fetch W=0.25"


@pytest.mark.parametrize(
    ("nll", "read", "ok"), [(2.01, 90, [True, True]), (2.03, 90, [False, True])]
)
def test_what_fetching_promises(nll: float, read: int, ok: list[bool]) -> None:
    cell = {methods.ON_DEMAND.name: scores(2.0, 500), methods.FETCH.name: scores(nll, read)}
    rows = quality.rows({"40 %": cell})
    assert [row.ok for row in rows] == ok
    assert rows[1].ratio == pytest.approx(500 / 90)
    assert [row.ok for row in quality.rows({"60 %": cell})] == [None, None]
    assert quality.rows({"40 %": cell | {"on-demand": scores(2.0, 400)}})[1].ok is False


def test_emoe_against_random_and_popularity() -> None:
    cell = {"emoe running-mean": scores(2.2, 9), "random": scores(2.8, 0)}
    cell |= {"popular-by-task": scores(2.1, 0)}
    random, popular = quality.rows({"20 %": cell})
    assert (random.ok, popular.ok) == (True, False)
    assert random.ratio == pytest.approx(4)


def test_the_table_has_spread_and_ratio() -> None:
    cells = {"40 %": {"on-demand": scores(2.0, 500), "emoe-fetch": scores(2.01, 100)}}
    text = quality.shown(cells)
    assert "+0.00% to +1.00%" in text
    assert text.splitlines()[-1].endswith("5.0")


def speeds(decode: float) -> list[dict[str, Any]]:
    keys = ("prefill_tokens_per_s", "ttft_s", "degraded_share", "bytes_read_per_token")
    return [dict.fromkeys(keys, 1.0) | {"decode_tokens_per_s": decode}]


def test_a_slow_disk_compares_with_on_demand() -> None:
    runs = {"on-demand": speeds(2.0), slow_disk.OURS[1]: speeds(6.0)}
    rows = slow_disk.rows("40 %, 100 MB/s", runs)
    assert [row.ratio for row in rows] == [3, 1, 1]
    assert slow_disk.line(40, 100, slow_disk.OURS[1], runs)[3:5] == ("6.0", "3.00")


def test_one_child_on_the_sample() -> None:
    words = ["sample", "--experts", "40%", "--read-limit", "1GB", "--preset", "emoe-fetch"]
    options = slow_disk_child.build_parser().parse_args([*words, "--new-tokens", "3"])
    texts = [TaskText("json", list(range(9)), list(range(20, 40)))] * 2
    with open_llm("sample", experts="40%", preset="emoe-fetch", context=1024) as llm:
        found = slow_disk_child.measure(llm, texts, options)
    assert (found["texts"], found["slots"], found["total_experts"]) == (2, 102, 256)
    assert 0 < found["degraded_share"] < 1
    assert found["decode_tokens_per_s"] > 0


def test_memory_saved_is_computed_and_measured() -> None:
    words = saved.command(SETTING, 40)[3:]
    assert build_parser().parse_args(words).experts == "40%"
    plans = {
        "20 %": {"placement": {"fixed": 100, "experts": 20}, "resident_experts": 2},
        "100 %": {"placement": {"fixed": 100, "experts": 100}, "resident_experts": 10},
    }
    runs = {
        name: [{"stats": {"peak_rss_bytes": peak}}]
        for name, peak in (("20 %", 110), ("100 %", 201))
    }
    oks = [saved.row(name, plans[name], runs[name]).ok for name in runs]
    assert oks == [True, False]
    assert saved.shown(plans, runs).splitlines()[-2].split()[-4:] == ["80", "B", "91", "B"]
