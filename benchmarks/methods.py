"""What is compared where experts are few: presets, forecasters, and when a miss is fetched."""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.setting import Setting


@dataclass(frozen=True, slots=True)
class Method:
    """A preset with its settings; `fetch_above` and `forecaster` are None for the preset's own."""

    preset: str
    fetch_above: float | None = None
    forecaster: str | None = None

    @property
    def name(self) -> str:
        """As tables and JSON name it."""
        parts = [self.preset, self.forecaster]
        parts += [None if self.fetch_above is None else f"W={self.fetch_above:g}"]
        return " ".join(part for part in parts if part)

    @property
    def words(self) -> list[str]:
        """The options of the command line."""
        words = ["--preset", self.preset]
        if self.fetch_above is not None:
            words += ["--fetch-above", f"{self.fetch_above:g}"]
        return words if self.forecaster is None else [*words, "--forecaster", self.forecaster]


ON_DEMAND, EMOE, FETCH = Method("on-demand"), Method("emoe"), Method("emoe-fetch")
RANDOM, POPULAR, BY_TASK = Method("random"), Method("popular"), Method("popular-by-task")


def model_words(setting: Setting) -> list[str]:
    """The model and its texts, as verbs and children take them."""
    words = [str(setting.model)]
    if setting.data is not None:
        words += ["--data", str(Path(setting.data).resolve())]
    return words if setting.per_task is None else [*words, "--per-task", str(setting.per_task)]
