"""What an experiment is: how it is measured, shown and judged."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from retinue.lab.base import Chart, Column, Row
from retinue.reproduce.workbench import Workbench


@dataclass(frozen=True, slots=True)
class Experiment:
    """One part of a paper's evaluation.

    claim: what the paper says, with its numbers. run: measures, cell by cell, through
    `Workbench.once`. verdict: a sentence about `rows`, computed from them. notes: what differs
    from the paper, whatever the rows say.
    """

    name: str
    title: str
    claim: str
    columns: Sequence[Column]
    run: Callable[[Workbench], list[Row]]
    charts: Callable[[Sequence[Row]], list[Chart]]
    verdict: Callable[[Sequence[Row]], str]
    notes: Sequence[str] = ()

    def measure(self, bench: Workbench) -> None:
        """Measure what is not in the ledger yet. Raises Cancelled, or what a measurement raises."""
        self.run(bench)
        bench.ledger.entry(self.name).done = True
        bench.ledger.keep(self.name)
