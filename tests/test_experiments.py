"""What experiments say of their rows, and the plots they make of them; nothing is measured."""

from typing import Any

import pytest

from retinue.lab.base import NOTHING_YET, Row
from retinue.lab.drawing import describe
from retinue.reproduce.experiment import Experiment
from retinue.reproduce.studies import EMOE

BY_NAME = {experiment.name: experiment for experiment in EMOE.experiments}


def shares(method: str, share: int, added: float, **fields: Any) -> Row:
    row: Row = {"method": method, "share": share, "added": added, "agreement": 1 - added}
    row |= {"exact": False, "fetched": 0, "answer_s": 1.0, "bytes_read": 0}
    return row | fields


SHARES = [
    shares("all resident", 100, 0.0, exact=True),
    shares("eMoE-A", 40, 0.3, similarity=0.75),
    shares("popularity by task", 40, 0.25),
    shares("random set", 40, 0.9),
    shares("emoe-fetch", 40, 0.01, fetched=9, bytes_read=100),
    shares("on demand", 40, 0.0, exact=True, fetched=80, bytes_read=1000),
    shares("popularity", 60, 0.4),
    shares("eMoE-A", 60, 0.2),
    shares("popularity by task", 60, 0.1),
    shares("emoe-fetch", 60, 0.005, fetched=5, bytes_read=50),
    shares("on demand", 60, 0.0, exact=True, fetched=40, bytes_read=400),
]
SENSITIVITY: list[Row] = [
    {"task": task, "side": side, "layers": layers, "exact": 100 - 12.5 * layers, "agreement": value}
    for side in ("from the input side", "from the output side")
    for task, layers, value in (("a", 4, 0.9), ("a", 8, 0.3), ("b", 4, 0.7), ("b", 8, 0.2))
]
PERIOD: list[Row] = [
    {"forecaster": name, "period": period, "added": added}
    for name, period, added in (("x", 1, 0.1), ("x", 10, 0.2), ("x", 40, 0.3), ("y", 1, 0.5))
]
PREDICTORS: list[Row] = [
    {"forecaster": name, "precision": f1, "recall": f1, "f1": f1, "texts": 12}
    | {f"covered_{share}": f1 for share in (20, 40, 60, 80)}
    for name, f1 in (("running-mean", 0.8), ("emoe-a", 0.7), ("emoe-l", 0.6))
]
REFRESH: list[Row] = [
    {"forecaster": "emoe-a", "share": share, "seconds": seconds, "of_time": seconds}
    | {"experts": 7.0, "bytes": 3 << 20}
    for share, seconds in ((20, 0.01), (40, 0.03))
]
LENGTHS: list[Row] = [
    {"what": "length", "share": share, "tokens": tokens, "batch": 1, "computed": computed}
    | {"peak": peak, "fixed": 500 << 20, "kv": 1 << 20, "workspace": 2 << 20}
    | {"experts": share << 20}
    for share, tokens, computed, peak in ((60, 512, 563, 500), (100, 512, 603, 510))
]
EQUAL: list[Row] = [
    {"what": "equal length", "from": 512, "to": 5120, "factor": 10.0, "own_limit": 2048},
    {"what": "equal batch", "from": 4, "to": 10, "factor": 2.5},
]
ARRIVALS: list[Row] = [
    {"order": order, "clock": clock, "load": load, "attainment": share, "goodput": 2 * share}
    | {"p50": 1.0, "p99": 9.0}
    for clock in ("simulated", "live")
    for load in (0.8, 1.5)
    for order, share in (("fcfs", 0.25), ("emoe", 0.75))
]
LABELS: list[Row] = [
    {"wrong": wrong, "added": 0.1 + wrong / 1000, "prompt_s": 0.1, "slower": wrong / 200}
    for wrong in (0, 20, 40, 60, 80, 100)
]
ROWS = {
    "shares": SHARES,
    "sensitivity": SENSITIVITY,
    "period": PERIOD,
    "predictors": PREDICTORS,
    "refresh": REFRESH,
    "memory": [*LENGTHS, *EQUAL],
    "arrivals": ARRIVALS,
    "labels": LABELS,
}
SAID = {
    "shares": (
        "with 40, 60 % of the experts and nothing fetched: popularity by task +0.250, +0.100;"
        " eMoE-A +0.300, +0.200; random set +0.900, not run.",
        "With misses fetched: emoe-fetch +0.010, +0.005, reading 10.0, 8.0 times fewer bytes",
    ),
    "sensitivity": (
        "Random from the input side, with 8 layers random a keeps the most next tokens (30%)",
        "b the fewest (20%); with half of the layers exact, 1 of 2 tasks keep 80%",
        "Random from the output side",
    ),
    "period": ("to the next: x +0.100 every 1 and +0.300 every 40.",),
    "predictors": ("running-mean has the best F1, 0.800", "of the paper's two, emoe-a has 0.700"),
    "refresh": ("emoe-a with 40 % of the experts, takes 30.0 ms and moves 7 experts", "3.0% at"),
    "memory": (
        "With 60 % of the experts 40 MiB are saved",
        "room for 5120 tokens, 10.0 times as many",
        "for 10 prompts instead of 4, 2.5 times",
        "The model itself has a context of 2048 only",
        "Every measured peak is within what was computed",
    ),
    "arrivals": (
        "Simulated, at 1.5 times what can be served: 75% of all requests in time against 25%",
        "Live, at 1.5",
        "1.50 a second against 0.50",
    ),
    "labels": (
        "a text takes 10.0% more time",
        "from +0.100 to +0.120",
        "it takes 50.0% more time, and the loss added is +0.200",
    ),
}


@pytest.fixture(params=list(BY_NAME))
def experiment(request: pytest.FixtureRequest) -> Experiment:
    return BY_NAME[request.param]


def test_every_experiment_says_what_it_found(experiment: Experiment) -> None:
    said = experiment.verdict(ROWS[experiment.name])
    for part in SAID[experiment.name]:
        assert part in said
    assert said.endswith(".")


def test_every_experiment_shows_what_it_found(experiment: Experiment) -> None:
    charts = experiment.charts(ROWS[experiment.name])
    assert charts
    for chart in charts:
        assert chart.series
        assert all(len(series.x) == len(series.y) > 0 for series in chart.series)
        assert describe(chart)


def test_nothing_is_said_of_nothing(experiment: Experiment) -> None:
    assert experiment.verdict([]) == NOTHING_YET
    assert experiment.charts([]) == []


def test_names_are_short_and_columns_are_keys(experiment: Experiment) -> None:
    assert experiment.name.isidentifier()
    keys = [column.key for column in experiment.columns]
    assert len(set(keys)) == len(keys)
    known = {key for row in ROWS[experiment.name] for key in row}
    assert known & set(keys)


def test_a_peak_over_the_budget_is_said() -> None:
    over = [LENGTHS[0] | {"peak": 1 << 40}, *LENGTHS[1:], *EQUAL]
    assert "1 measured peaks are over it" in BY_NAME["memory"].verdict(over)


def test_exact_methods_are_no_lines_of_loss() -> None:
    loss, *_, time = BY_NAME["shares"].charts(SHARES)
    assert "on demand" not in [series.label for series in loss.series]
    assert "on demand" in [series.label for series in time.series]
