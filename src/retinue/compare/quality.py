"""What presets cost in quality, task by task: once for each budget, since no disk changes a bit.

Exact presets give the plain model's tokens, so that they have its loss and agree with it.
"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

from retinue.compare.grid import DEFAULT, PLAIN, Budget, Grid, never_live
from retinue.engine.evaluate import TaskScore, evaluate, score_plain
from retinue.lab.base import Row
from retinue.lab.bench import Bench
from retinue.model.scoring import Scored
from retinue.policy.presets import preset

NAME = "quality"
ALL = "all"  # tasks together


class Quality:
    """Measures through `bench`. The plain model reads the texts when somebody first asks."""

    def __init__(self, bench: Bench, grid: Grid) -> None:
        self._bench, self._grid = bench, grid
        self._scored: list[Scored] | None = None

    def measure(self) -> list[Row]:
        """Rows of each approximate preset, budget and task, and of the plain model."""
        rows = list(self._bench.once(NAME, PLAIN, self._plain_rows))
        for name in self._grid.presets:
            row = preset(name)
            if row.exact or never_live(row):
                continue
            for budget in self._grid.budgets:
                key = f"{name}, {budget.memory}, {budget.experts}"
                rows += self._bench.once(NAME, key, partial(self._rows, name, budget))
        return rows

    def _rows(self, name: str, budget: Budget) -> list[Row]:
        plain = self._plain()
        with self._bench.opened(**asdict(budget), preset=name, read_limit=None) as llm:
            result = evaluate(llm.assembly, self._bench.texts, self._bench.check, plain)
        head = {"preset": preset(name).name, **asdict(budget)}
        scores = {**result.tasks, ALL: result.total}
        return [head | {"task": task, **asdict(score)} for task, score in scores.items()]

    def _plain(self) -> list[Scored]:
        """What the plain model says, in the largest of the budgets: residency changes no bit."""
        if self._scored is None:
            bench, budget = self._bench, self._grid.budgets[-1]
            bench.say("the plain model reads the texts")
            with bench.opened(**asdict(budget), preset=DEFAULT, read_limit=None) as llm:
                self._scored = score_plain(llm.assembly, bench.texts, bench.check)
        return self._scored

    def _plain_rows(self) -> list[Row]:
        plain, texts = self._plain(), self._bench.texts
        rows = []
        for task in [*self._bench.tasks, ALL]:
            nll = [
                float(value)
                for text, scored in zip(texts, plain, strict=True)
                if task in (text.task, ALL)
                for value in scored.nll
            ]
            mean = sum(nll) / len(nll)
            score = TaskScore(mean, mean, 1.0, len(nll))
            rows.append({"preset": PLAIN, "task": task, **asdict(score)})
        return rows


def of(rows: Sequence[Row], name: str, exact: bool, budget: Budget, task: str = ALL) -> Row:
    """Loss and agreement of a preset at a budget; empty where they were not measured.

    Exact presets have the plain model's.
    """
    where = {"preset": name, "memory": budget.memory, "experts": budget.experts}
    wanted = {"preset": PLAIN} if exact else where
    for row in rows:
        if row["task"] == task and all(row.get(key) == value for key, value in wanted.items()):
            return {key: row[key] for key in ("nll", "nll_plain", "agreement")}
    return {}
