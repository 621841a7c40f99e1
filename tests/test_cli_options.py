"""No option is accepted and ignored; what cannot be done is refused first, with a hint."""

import json
import shlex
from pathlib import Path

import pytest

import models
from command import Call, caller, refused
from retinue.cli.main import main
from retinue.engine import packing
from retinue.memory.home import called, sample_folder

HELLO = "A: Hello there!"
TINY = ("--memory", models.MEMORY, "--no-self-check")


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    return caller(capsys)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return models.write_texts(tmp_path / "texts.jsonl", 5, 4)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (f'run sample "{HELLO}" --logprobs 2', "`--logprobs` is of no use without `--json`"),
        ("pack some --check --precision int8", "`--precision` is of no use with `--check`"),
        ("pack some --check --memory 1GiB", "`--memory` is of no use with `--check`"),
        ("doctor --memory 1GiB", "`--memory` is of no use without a MODEL"),
        ("doctor --preset emoe", "`--preset` is of no use without a MODEL"),
        ("doctor --no-self-check", "`--self-check` is of no use without a MODEL"),
    ],
)
def test_what_would_do_nothing_is_refused(call: Call, line: str, what: str) -> None:
    refused(call(*shlex.split(line)), 2, what)


@pytest.mark.parametrize(
    "line",
    [
        f'run sample "{HELLO}"',
        "plan sample",
        "doctor",
        "bench sample",
        "pack sample out",
        "trace sample --out out",
        "profile sample",
        "train-predictor sample",
        "eval sample",
        "compare sample",
        "reproduce emoe sample",
        "serve sample --port 0",
    ],
)
def test_memory_of_a_gpu_is_refused_by_every_verb(call: Call, line: str) -> None:
    refused(call(*shlex.split(line), "--gpu-memory", "2GiB"), 3, "this version uses no GPU: `2GiB`")


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("run sample hi --max-tokens 3", "unrecognized arguments: --max-tokens 3; did you mean"),
        ("run sample hi --threads many", "invalid int value: 'many'"),
        ("plan", "the following arguments are required: MODEL"),
        ("chat sample", "invalid choice: 'chat'"),
    ],
)
def test_wrong_command_lines_have_a_hint(
    capsys: pytest.CaptureFixture[str], line: str, what: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(shlex.split(line))
    assert caught.value.code == 2
    error, hint = capsys.readouterr().err.split("error: ")[1].split("\n\n")
    assert error.startswith(what) or what in error
    verb = line.split()[0] if line != "chat sample" else ""
    assert hint == f"hint: `{f'retinue {verb}'.strip()} --help`\n"


@pytest.mark.parametrize("verb", ["trace", "profile", "train-predictor"])
def test_a_place_that_takes_no_file_is_seen_before_the_work(
    call: Call, olmoe: Path, texts: Path, tmp_path: Path, verb: str
) -> None:
    line = (verb, olmoe, "--data", texts, *TINY, "--out")
    for out, what in ((tmp_path, "is a folder"), (texts / "out", "nothing can be written")):
        done = call(*line, out)
        refused(done, 2, what)
        assert "text/s" not in done.err


@pytest.mark.parametrize("verb", ["compare", "reproduce emoe"])
def test_a_place_that_takes_no_folder_is_seen_before_the_work(
    call: Call, texts: Path, verb: str
) -> None:
    refused(call(*verb.split(), "sample", "--out", texts), 2, "is a file")


def test_who_stops_a_pack_is_told_that_it_goes_on(
    call: Call, olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(packing, "pack", stopped)
    refused(call("pack", olmoe, tmp_path / "pack"), 1, "interrupted")


def test_a_hint_names_the_model_as_a_command_line_does(tmp_path: Path) -> None:
    assert called(sample_folder()) == "sample"
    assert called(tmp_path) == str(tmp_path)


def test_plan_says_what_a_preset_still_needs(call: Call, olmoe: Path) -> None:
    done = call("plan", olmoe, "--preset", "promoe", "--json")
    assert done.code == 0
    assert (
        f"retinue train-predictor {olmoe} --data FILE --kind promoe" in done.document["reasons"][-1]
    )
    done = call("plan", olmoe, "--preset", "emoe", "--json")
    assert f"retinue profile {olmoe} --data FILE" in done.document["reasons"][-1]
    done = call("plan", "sample", "--preset", "promoe", "--json")
    assert "cannot run" not in " ".join(done.document["reasons"])


def test_plan_knows_what_reading_other_precisions_takes(call: Call, olmoe: Path) -> None:
    """The smallest budget of `plan` is one that `run` takes."""
    smallest = call("plan", olmoe, "--preset", "hobbit", "--json").document["smallest_budget_bytes"]
    prompt = ("--token-ids", "1 2 3", "--max-new-tokens", "2", "--preset", "hobbit")
    assert call("run", olmoe, *prompt, "--memory", smallest - 1).code == 3
    assert call("run", olmoe, *prompt, "--memory", smallest).code == 0


def test_a_comparison_under_other_settings_is_another(
    call: Call, olmoe: Path, texts: Path, tmp_path: Path
) -> None:
    line = ("compare", olmoe, "--data", texts, "--presets", "auto", "--runs", "1", "--new-tokens")
    line = (*line, "2", "--out", tmp_path / "out", "--no-self-check")
    assert call(*line).code == 0
    assert json.loads((tmp_path / "out" / "live.json").read_text())["setting"]["eager"] is None
    refused(call(*line, "--eager"), 2, "was measured with another eager: `None`, not `True`")
    refused(call(*line, "--chunk", "16"), 2, "was measured with another chunk")
