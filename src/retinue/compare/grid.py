"""What is compared: presets at budgets on disks, so and so often, in which order."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from retinue.config import parse_size
from retinue.errors import UsageError
from retinue.lab.base import Row, number
from retinue.policy.preset import Preset
from retinue.policy.presets import PRESETS, preset

BASE, DEFAULT = "on-demand", "auto"  # both always run
ALSO = ("emoe-fetch",)  # beside the exact ones, if nobody says otherwise
PLAIN = "plain"  # the model with every expert at hand, in rows of quality
NO_LIMIT = ("none", "native")


@dataclass(frozen=True, slots=True)
class Budget:
    """An upper bound for all memory and one for the resident experts; None: what the first leaves.

    Both as the user wrote them.
    """

    memory: str
    experts: str | None

    @property
    def label(self) -> str:
        """For people: the share, if there is one."""
        return self.memory if self.experts is None else self.experts


@dataclass(frozen=True, slots=True)
class Disk:
    """A limit of reads in bytes a second, as the user wrote it; None: as fast as it goes."""

    limit: str | None

    @property
    def label(self) -> str:
        """For people."""
        return "the disk as it is" if self.limit is None else f"{self.limit}/s"


@dataclass(frozen=True, slots=True)
class Grid:
    """Every combination. `presets` by how they were asked for: a name, or a place outside."""

    presets: tuple[str, ...]
    budgets: tuple[Budget, ...]
    disks: tuple[Disk, ...]
    runs: int
    new_tokens: int  # decoding steps of each text, at most

    def __post_init__(self) -> None:
        for name in ("runs", "new_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is out of range: `{getattr(self, name)}`", hint="1 or up")

    @property
    def names(self) -> list[str]:
        """What the presets are called in rows."""
        return [preset(each).name for each in self.presets]

    def holds(self, row: Row) -> bool:
        """Whether a row of a ledger is of this grid, and not of an earlier, larger one."""
        if row["preset"] == PLAIN:
            return True
        budget = str(row["memory"]), row["experts"]
        known = [(each.memory, each.experts) for each in self.budgets]
        return (
            row["preset"] in self.names
            and budget in known
            and (number(row, "run") or 0) < self.runs
        )

    def order(self, run: int) -> list[str]:
        """The presets as they take their turns in `run`.

        The rows of a Williams square (E. J. Williams, Aust. J. Sci. Res. A2, 1949), one from each
        end in turn: each run begins further on, so that nobody is always early or late, and nobody
        always comes after the same one, whose traces in caches and memory he would pay for.
        """
        count = len(self.presets)
        start = run * max(1, count // self.runs)
        places = [(at + 1) // 2 if at % 2 else -(at // 2) for at in range(count)]
        return [self.presets[(start + place) % count] for place in places]


def grid(
    presets: str | None,
    budgets: Sequence[Budget],
    disks: Sequence[Disk],
    runs: int,
    new_tokens: int,
) -> Grid:
    """A grid whose presets are names with commas between, `exact`, `all` or None, the default.

    Raises UsageError for a name that is none, and for two presets of one name.
    """
    chosen = references(presets)
    names: dict[str, str] = {}
    for each in chosen:
        name = preset(each).name
        if names.setdefault(name, each) != each:
            raise UsageError(
                f"`{names[name]}` and `{each}` are both called `{name}`", hint="rename one of them"
            )
    return Grid(tuple(chosen), tuple(budgets), tuple(disks), runs, new_tokens)


def references(text: str | None) -> list[str]:
    """Presets as they were asked for, each once; `auto` and `on-demand` are the first ones."""
    exact = [name for name, row in PRESETS.items() if row.exact]
    groups = {"exact": exact, "all": list(PRESETS)}
    asked = words(text) if text is not None else ["exact", *ALSO]
    found = [name for word in asked for name in groups.get(word, [word])]
    return list(dict.fromkeys([DEFAULT, BASE, *found]))


def budgets(memory: Sequence[str], experts: Sequence[str | None]) -> list[Budget]:
    """Each memory with each share. Raises UsageError for what is no size or share."""
    for size in [*memory, *experts]:
        if size is not None:
            parse_size(size, whole=1 << 40)
    return [Budget(*each) for each in product(memory, experts)]


def disks(text: str) -> list[Disk]:
    """Limits with commas between; `none` is the disk as it is. Raises UsageError."""
    found = []
    for word in words(text):
        if word not in NO_LIMIT and parse_size(word) < 1:
            raise UsageError(f"read limit is out of range: `{word}`", hint="such as 300MB, or none")
        found.append(Disk(None if word in NO_LIMIT else word))
    return list(dict.fromkeys(found))


def words(text: str) -> list[str]:
    """What stands between commas. Raises UsageError where nothing does."""
    found = [word.strip() for word in text.split(",") if word.strip()]
    if not found:
        raise UsageError(f"an empty list: `{text}`", hint="write values with commas between")
    return found


def never_live(row: Preset) -> str:
    """Why a preset cannot run on a model; empty if it can."""
    return "it knows the future: only `retinue simulate` can run it" if row.replayed else ""
