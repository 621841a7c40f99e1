"""From measured rows to what is said of them: one JSON document, and one page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from retinue.lab.base import Chart, Row
from retinue.lab.drawing import HOW_TO_GET, can_draw, draw
from retinue.lab.ledger import Ledger
from retinue.lab.page import Figure, Report, Section
from retinue.lab.tables import said, table_of
from retinue.reproduce.experiment import Experiment
from retinue.reproduce.similarity import can_embed
from retinue.reproduce.studies import Study


@dataclass(frozen=True, slots=True)
class Finding:
    """What one experiment measured so far; `done` says that nothing is missing."""

    experiment: Experiment
    rows: Sequence[Row]
    done: bool
    left_out: Mapping[str, str]

    @property
    def verdict(self) -> str:
        """A sentence about the rows."""
        said = self.experiment.verdict(self.rows)
        return said if self.done else f"Not finished yet. {said}"


def collect(study: Study, ledger: Ledger) -> list[Finding]:
    """What the ledger has of the study's experiments; those that never began are left out."""
    entries = [(experiment, ledger.entry(experiment.name)) for experiment in study.experiments]
    return [
        Finding(each, entry.rows, entry.done, entry.left_out)
        for each, entry in entries
        if entry.cells or entry.left_out
    ]


def document(
    study: Study, setting: Mapping[str, Any], findings: Sequence[Finding]
) -> dict[str, Any]:
    """Everything, as JSON."""
    experiments = {
        finding.experiment.name: {
            "title": finding.experiment.title,
            "claim": finding.experiment.claim,
            "verdict": finding.verdict,
            "done": finding.done,
            "left_out": dict(finding.left_out),
            "rows": list(finding.rows),
        }
        for finding in findings
    }
    head = {"study": study.name, "paper": study.paper, "setting": dict(setting)}
    return head | {"experiments": experiments}


def report(study: Study, setting: Mapping[str, Any], findings: Sequence[Finding]) -> Report:
    """The page's parts; plots only where matplotlib is installed, which the page says."""
    notes = list(study.notes)
    if not can_draw():
        notes.append(f"Plots are missing, since matplotlib is not installed: {HOW_TO_GET}")
    if not can_embed():
        notes.append(f"Similarity is missing, since its package is not installed: {HOW_TO_GET}")
    return Report(
        title=study.title,
        lead=study.paper,
        claim_heading="The paper",
        found_heading="Found here",
        setting=[(key.replace("_", " "), said(value)) for key, value in setting.items()],
        sections=[_section(finding) for finding in findings],
        notes=notes,
    )


def _section(finding: Finding) -> Section:
    experiment = finding.experiment
    charts = experiment.charts(finding.rows) if finding.rows else []
    return Section(
        name=experiment.name,
        title=experiment.title,
        claim=experiment.claim,
        found=finding.verdict,
        figures=_figures(experiment.name, charts) if can_draw() else (),
        tables=[table_of(experiment.columns, finding.rows)] if finding.rows else [],
        notes=[*experiment.notes, *_left_out(finding)],
    )


def _left_out(finding: Finding) -> list[str]:
    """One note for each reason."""
    found: dict[str, list[str]] = {}
    for key, reason in finding.left_out.items():
        found.setdefault(reason, []).append(key)
    return [f"Left out: {'; '.join(keys)}: {reason}." for reason, keys in found.items()]


def _figures(name: str, charts: Sequence[Chart]) -> list[Figure]:
    return [Figure(draw(chart, f"{name}-{at}"), chart.title) for at, chart in enumerate(charts)]
