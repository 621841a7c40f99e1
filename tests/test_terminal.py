"""Colours for a terminal that wants them, and tables."""

import io
import sys

import pytest

from command import ESCAPE, Terminal
from retinue.cli.main import main
from retinue.cli.terminal import table


@pytest.mark.parametrize(
    ("variables", "coloured"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
    ids=["colours", "NO_COLOR", "dumb"],
)
def test_colours_only_where_they_are_wanted(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], coloured: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    screen, pipe = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", pipe)
    for arguments in (["plan", "sample", "--memory", "100MiB"], ["plan", "./nothing"]):
        assert main(arguments) in (1, 3)
    # stdout is a pipe, whatever stderr is.
    assert ESCAPE not in pipe.getvalue()
    assert "does not fit" in pipe.getvalue()
    assert (ESCAPE in screen.getvalue()) is coloured
    assert "error:" in screen.getvalue()


def test_a_table_is_as_wide_as_its_contents() -> None:
    rows = [("a", 5), ("long name", 10.25)]
    assert table(("name", "count"), rows) == (
        "name       count\na              5\nlong name  10.25"
    )
