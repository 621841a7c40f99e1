"""What was measured so far, on disk: one file an experiment, written after each of its cells.

A run that was interrupted, or killed, keeps all finished cells. The file names the setting under
which they were measured; cells of another setting are never mixed with them.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from retinue.errors import UsageError
from retinue.lab.base import Row
from retinue.memory.whole_file import write_whole


@dataclass(slots=True)
class Entry:
    """The finished cells of one experiment, by key, in their order; `done`: there are no others.

    left_out: why other cells could not be measured, by key.
    """

    cells: dict[str, list[Row]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    done: bool = False

    @property
    def rows(self) -> list[Row]:
        """Those of all cells."""
        return [row for rows in self.cells.values() for row in rows]


class Ledger:
    """The entries in `folder`; `setting` is what they depend on. JSON-shaped."""

    def __init__(self, folder: Path, setting: Mapping[str, Any]) -> None:
        self._folder, self._setting = folder, dict(setting)
        self._entries: dict[str, Entry] = {}

    def entry(self, experiment: str) -> Entry:
        """What there is of `experiment`; empty at first.

        Raises UsageError where it belongs to another setting, or the file is damaged.
        """
        if experiment not in self._entries:
            self._entries[experiment] = self._read(self._file(experiment))
        return self._entries[experiment]

    def keep(self, experiment: str) -> None:
        """Write the entry, whole or not at all. Raises WriteError where that is not possible."""
        file, entry = self._file(experiment), self.entry(experiment)
        content = {"setting": self._setting, **asdict(entry)}
        write_whole(file, json.dumps(content, ensure_ascii=False, indent=1).encode())

    def forget(self, experiment: str) -> None:
        """Delete what there is of `experiment`."""
        self._file(experiment).unlink(missing_ok=True)
        self._entries.pop(experiment, None)

    def _read(self, file: Path) -> Entry:
        if not file.is_file():
            return Entry()
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            setting = dict(content["setting"])
            cells, left_out = dict(content["cells"]), dict(content["left_out"])
            entry = Entry(cells, left_out, bool(content["done"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"cannot read `{file}`: {error}", hint="start again with `--fresh`"
            ) from error
        for key, value in self._setting.items():
            if setting.get(key) != value:
                was = setting.get(key)
                raise UsageError(
                    f"`{file}` was measured with another {key}: `{was}`, not `{value}`",
                    hint="use another `--out`, or start again with `--fresh`",
                )
        return entry

    def _file(self, experiment: str) -> Path:
        return self._folder / f"{experiment}.json"
