"""Presets from outside the tree: found, refused with the reason, and the guide's own, run."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from command import Call, caller, refused
from retinue import LLM, SamplingParams, UsageError
from retinue.memory.home import sample_tasks
from retinue.policy.outside import outside
from retinue.policy.preset import Given, Preset
from retinue.policy.presets import preset
from test_readme import Block, read_blocks

GUIDE = Path(__file__).resolve().parents[1] / "docs" / "policies.md"
HEAD = "from retinue.policy.policies import Policies\nfrom retinue.policy.preset import Preset\n"
ROW = 'MINE = Preset("{name}", {exact}, "my own", (), "", lambda given: {made})\n'


def blocks(language: str) -> list[Block]:
    text = GUIDE.read_text(encoding="utf-8")
    return [block for block in read_blocks(text) if block.language == language]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    return caller(capsys)


@pytest.fixture
def guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The guide's policy, in a folder where its commands run."""
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    file = tmp_path / "my_policy.py"
    file.write_text(code.text, encoding="utf-8")
    return file


def a_file(folder: Path, text: str) -> str:
    file = folder / "mine.py"
    file.write_text(text, encoding="utf-8")
    return f"{file}:MINE"


# --- the guide


def test_the_guide_keeps_its_word() -> None:
    (code,) = blocks("python")
    assert len([line for line in code.text.splitlines() if line.strip()]) <= 30
    assert "torch" not in code.text


def test_the_guides_rule(guide: Path) -> None:
    """Used once: by age. Used twice of late: behind all of those."""
    from types import SimpleNamespace

    heat = np.array([[1.0, 1.9, 0.5]], np.float32)
    view = SimpleNamespace(heat=heat, last_used=np.array([[7, 3, 5]]))
    evictor = outside(f"{guide}:MINE").build(Given()).evictor
    layers, experts = np.zeros(3, np.int64), np.arange(3)
    assert np.argsort(evictor.priorities(layers, experts, view)).tolist() == [2, 0, 1]


def test_the_guides_commands(guide: Path, call: Call) -> None:
    commands = [command for block in blocks("sh") for command in block.commands]
    few = guide.parent / "few.jsonl"  # the guide's own takes all of the sample's tasks
    few.write_text("".join(sample_tasks().read_text().splitlines(keepends=True)[:1]))
    assert any("compare" in command for command in commands)
    for command in commands:
        name, *words = shlex.split(command)
        assert name == "retinue"
        done = call(*words, *(("--data", few) if words[0] == "compare" else ()))
        assert done.code == 0, done.err
    document = json.loads((guide.parent / "mine" / "compare.json").read_text())
    (cell,) = [row for row in document["cells"] if row["preset"] == "mine"]
    assert cell["hits"] > 0
    assert cell["decode_against_on_demand"] > 0
    assert "mine" in (guide.parent / "mine" / "compare.md").read_text()


def test_it_gives_the_plain_tokens(guide: Path) -> None:
    params, prompt = SamplingParams(max_new_tokens=12), "A: Hello there!"
    with LLM("sample", experts="25%", context=128) as llm:
        (plain,) = llm.generate([prompt], params, progress=False)
    with LLM("sample", experts="25%", context=128, preset=f"{guide}:MINE") as llm:
        (mine,) = llm.generate([prompt], params, progress=False)
        assert llm.assembly.preset.name == "mine"
    assert mine.token_ids == plain.token_ids


# --- where it is


def test_a_file_runs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = a_file(tmp_path, HEAD + "COUNT = []\n" + ROW.format(name="a", exact=True, made=None))
    assert preset(place) is outside(place)
    monkeypatch.chdir(tmp_path)
    assert outside("./mine.py:MINE") is outside(place)


def test_a_module_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "some_package_of_mine.py"
    file.write_text(HEAD + ROW.format(name="b", exact=True, made=None))
    monkeypatch.syspath_prepend(tmp_path)
    assert isinstance(preset("some_package_of_mine:MINE"), Preset)


@pytest.mark.parametrize(
    ("text", "what", "hint"),
    [
        ("1 / 0\n", "ZeroDivisionError: division by zero", "try it with `python`"),
        ("import nothing_there\n", "ModuleNotFoundError", "try it with `python`"),
        ("x = (\n", "SyntaxError", "try it with `python`"),
        ("MINE = 1\n", "has no preset called `MINE`", "write `MINE = Preset(...)` there"),
        (HEAD + ROW.format(name="auto", exact=True, made=None), "as one of ours", "of its own"),
        (
            HEAD + ROW.format(name="c", exact=True, made=None).replace("MINE", "OTHER"),
            "has no preset called `MINE`",
            "it has: OTHER",
        ),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, what: str, hint: str) -> None:
    place = a_file(tmp_path, text)
    for _ in range(2):  # a file that failed is not taken for loaded
        with pytest.raises(UsageError) as caught:
            preset(place)
        assert what in str(caught.value)
        assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("place", "what"),
    [
        (":MINE", "not a preset's place"),
        ("mine.py:", "not a preset's place"),
        ("mine.py:a-b", "not a preset's place"),
        ("nowhere.py:MINE", "no such file: `nowhere.py`"),
        ("nothing_there:MINE", "cannot load `nothing_there`: ModuleNotFoundError"),
    ],
)
def test_wrong_places(call: Call, place: str, what: str) -> None:
    refused(call("run", "sample", "x", "--preset", place), 2, what)


def test_what_is_not_exact_may_not_say_so(tmp_path: Path, call: Call) -> None:
    imports = "from retinue.policy.systems.fixed_sets import PRESETS\n"
    made = "PRESETS[-1].build(given)"
    place = a_file(tmp_path, HEAD + imports + ROW.format(name="d", exact=True, made=made))
    done = call("run", "sample", "x", "--preset", place)
    refused(done, 2, "the preset `d` says that it is exact, but its parts are not")
