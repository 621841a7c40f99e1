"""The papers whose evaluation can be run here, each a list of experiments."""

from collections.abc import Sequence
from dataclasses import dataclass

from retinue.errors import UsageError
from retinue.reproduce import (
    arrivals,
    labels,
    memory,
    period,
    predictors,
    refresh,
    sensitivity,
    shares,
)
from retinue.reproduce.experiment import Experiment


@dataclass(frozen=True, slots=True)
class Study:
    """A paper's evaluation. notes: what differs from the paper throughout."""

    name: str
    title: str
    paper: str
    experiments: Sequence[Experiment]
    notes: Sequence[str]

    def chosen(self, only: str | None) -> list[Experiment]:
        """The experiments called `only`, names with commas between; all without it.

        Raises UsageError for a name that is none.
        """
        if only is None:
            return list(self.experiments)
        known = {experiment.name: experiment for experiment in self.experiments}
        names = [name.strip() for name in only.split(",") if name.strip()]
        for name in names:
            if name not in known:
                raise UsageError(f"unknown experiment: `{name}`", hint=f"known: {', '.join(known)}")
        return [experiment for experiment in self.experiments if experiment.name in names]


EMOE = Study(
    name="emoe",
    title="eMoE, measured again",
    paper=(
        "eMoE: Task-aware Memory Efficient Mixture-of-Experts-Based (MoE) Model Inference,"
        " arXiv 2503.06823"
    ),
    experiments=(
        shares.EXPERIMENT,
        sensitivity.EXPERIMENT,
        period.EXPERIMENT,
        predictors.EXPERIMENT,
        refresh.EXPERIMENT,
        memory.EXPERIMENT,
        arrivals.EXPERIMENT,
        labels.EXPERIMENT,
    ),
    notes=(
        "The paper's figures are of Mixtral-8x7B and OpenMoE on four A100, over five tasks, with"
        " answers of up to 1000 tokens; what was found is of the model, the texts and the machine"
        " named above. Compare shapes and factors, not seconds.",
    ),
)
STUDIES = {study.name: study for study in (EMOE,)}


def study(name: str) -> Study:
    """The study called `name`. Raises UsageError that lists the known ones."""
    if name not in STUDIES:
        raise UsageError(f"unknown study: `{name}`", hint=f"known: {', '.join(STUDIES)}")
    return STUDIES[name]
