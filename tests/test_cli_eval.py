"""`retinue eval` and `retinue profile`, as tests and people call them."""

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

import models
from command import MEMORY, Call, caller, refused, start
from retinue.engine.tasks import TaskIds, as_ids, cut_to, read_texts
from retinue.errors import UsageError
from retinue.memory.home import sample_tasks
from retinue.model.profiles import read_profile
from test_cli_signals import stop, wait_for

# The contract: scripts outside the project rely on these.
KEYS = {"tasks", "nll", "nll_plain", "agreement", "degraded_share", "misses", "fetched"}
KEYS |= {"bytes_read", "degraded_by_layer"}
TASK_KEYS = {"nll", "nll_plain", "agreement", "tokens", "degraded_share"}
FEW = ("--per-task", 1, "--threads", 1, *MEMORY)
TINY = ("--threads", 1, *MEMORY)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    return caller(capsys)


@pytest.fixture
def ids_file(tmp_path: Path) -> Path:
    """Texts as token ids, for checkpoints without a tokenizer."""
    rows = [
        {"task": task, "prompt": models.prompt_of(12, seed), "continuation": models.prompt_of(6)}
        for seed, task in enumerate(["a", "b", "a"])
    ]
    return write(tmp_path, *rows)


def write(folder: Path, *rows: Any) -> Path:
    file = folder / "texts.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("\n".join(lines) + "\n")
    return file


def test_the_profile_that_ships_works_at_once(call: Call) -> None:
    """Agreement by task popularity is above that by chance, on texts that the profile knows."""
    found = {}
    for preset in ("popular-by-task", "popular", "random"):
        done = call("eval", "sample", "--preset", preset, "--experts", "40%", *FEW, "--json")
        assert done.code == 0, done.err
        found[preset] = done.document
    document = found["popular-by-task"]
    assert set(document) >= KEYS
    assert len(document["tasks"]) == 8
    for score in document["tasks"].values():
        assert set(score) >= TASK_KEYS
    assert 0 < document["degraded_share"] < 1
    assert document["fetched"] == 0
    assert document["bytes_read"] > 0
    assert document["peak_rss_bytes"] < document["budget_bytes"]
    agreements = [document["agreement"] for document in found.values()]
    assert agreements == sorted(agreements, reverse=True)
    losses = [document["nll"] for document in found.values()]
    assert losses == sorted(losses)
    assert len({document["nll_plain"] for document in found.values()}) == 1


def test_fetching_a_little_buys_most_of_the_quality(call: Call) -> None:
    """Against `on-demand` with as many slots: most of the loss is gone for few of the bytes."""
    evaluation = ("eval", "sample", "--experts", "40%", *FEW, "--json")
    exact = call(*evaluation, "--preset", "on-demand").document
    found = [
        call(*evaluation, "--preset", "popular-by-task", "--fetch-above", above).document
        for above in (1, 0.3, 0)
    ]
    added = [document["nll"] / document["nll_plain"] - 1 for document in found]
    assert added[1] < added[0] / 5
    assert found[1]["bytes_read"] < exact["bytes_read"] / 5
    assert 0 < found[1]["fetched"] < found[1]["misses"]
    assert added[2] == found[2]["degraded_share"] == 0
    assert found[2]["agreement"] == 1
    assert found[2]["fetched"] == found[2]["misses"]
    assert len(found[1]["degraded_by_layer"]) == 8
    refused(call(*evaluation, "--fetch-above", 0.3), 2, "`auto` is exact")
    leaning = call(*evaluation, "--preset", "cache-prior", "--fetch-above", 0.3)
    refused(leaning, 2, "`cache-prior` has no set that serves")


def test_an_exact_preset_for_people(call: Call) -> None:
    done = call("eval", "sample", "--experts", "50%", *FEW)
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0].split() == ["task", "loss", "plain", "added", "agreement", "tokens"]
    rows = {line.split()[0]: line.split() for line in lines[1:10]}
    assert rows["all"][3:5] == ["+0.000", "1.000"]
    assert "0.0% of routing weight degraded" in done.out
    assert "8/8" in done.err  # the bar


def test_profile_then_presets_find_it(
    call: Call, olmoe: Path, ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    evaluation = ("eval", olmoe, "--data", ids_file, "--preset", "popular", "--experts", "50%")
    refused(call(*evaluation, *TINY), 3, "no profile")
    profile = ("profile", olmoe, "--data", ids_file, *TINY, "--no-costs")
    done = call(*profile, "--json")
    assert done.code == 0, done.err
    document = done.document
    sizes = {name: (task["texts"], task["tokens"]) for name, task in document["tasks"].items()}
    assert sizes == {"a": (2, 36), "b": (1, 18)}
    assert set(document["tasks"]["a"]) >= {"sensitive_layers", "output_tokens", "likeness"}
    assert Path(document["out"]).is_relative_to(tmp_path / "cache")
    assert call(*evaluation, *TINY).code == 0
    elsewhere = tmp_path / "mine.json"
    done = call(*profile, "--out", elsewhere)
    assert done.code == 0
    assert "likeness: consecutive layers" in done.out
    assert str(elsewhere) in done.out
    assert elsewhere.read_text() == Path(document["out"]).read_text()
    assert call(*evaluation, *TINY, "--profile", elsewhere).code == 0


def test_profiles_merge(call: Call, olmoe: Path, ids_file: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    profile = ("profile", olmoe, "--data", ids_file, *TINY, "--sensitivity", "off")
    assert call(*profile, "--answers", "off", "--out", one).code == 0
    done = call(*profile, "--merge", one, "--out", two)
    assert done.code == 0
    assert "a pass takes" in done.out
    before, after = read_profile(one).tasks["a"], read_profile(two).tasks["a"]
    assert after.texts == 2 * before.texts
    assert (after.choices == 2 * before.choices).all()
    refused(call(*profile, "--merge", tmp_path / "none.json"), 2, "cannot read the profile")
    refused(call(*profile, "--insensitive-above", 2), 2, "insensitive-above is out of range")


def test_per_task_and_context(call: Call, olmoe: Path, ids_file: Path) -> None:
    evaluation = ("eval", olmoe, "--data", ids_file, *TINY, "--json")
    assert call(*evaluation).document["tasks"]["a"]["tokens"] == 12
    assert call(*evaluation, "--per-task", 1).document["tasks"]["a"]["tokens"] == 6
    done = call(*evaluation, "--context", 5)
    assert done.document["tasks"]["a"]["tokens"] == 8
    assert "note: 3 of 3 texts are cut from the left to 5 tokens" in done.err
    refused(call(*evaluation, "--per-task", 0), 2, "per-task is out of range")


GOOD = {"task": "a", "prompt": "x", "continuation": "y"}


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "not JSON"),
        ("[1]", "not an object"),
        ({"prompt": "x", "continuation": "y"}, "`task` is not a name"),
        (GOOD | {"task": ""}, "`task` is not a name"),
        ({"task": "a", "continuation": "y"}, "`prompt` is missing"),
        (GOOD | {"continuation": ""}, "`continuation` is missing, empty or no text"),
        (GOOD | {"continuation": 3}, "`continuation`"),
        (GOOD | {"prompt": [1, "2"]}, "`prompt`"),
        (GOOD | {"prompt": [True]}, "`prompt`"),
    ],
)
@pytest.mark.parametrize("verb", ["eval", "profile"])
def test_a_bad_line_is_named(
    call: Call, verb: str, line: object, what: str, tmp_path: Path
) -> None:
    file = write(tmp_path, GOOD, "", line)
    done = call(verb, "sample", "--data", file)
    refused(done, 2, what)
    assert f"{file}, line 3: " in done.err


def test_files_that_are_none(call: Call, tmp_path: Path) -> None:
    refused(call("eval", "sample", "--data", tmp_path / "nothing"), 2, "cannot read")
    refused(call("eval", "sample", "--data", write(tmp_path)), 2, "no texts in")


def test_texts_need_a_tokenizer(call: Call, olmoe: Path, tmp_path: Path) -> None:
    refused(call("eval", olmoe, "--data", write(tmp_path, GOOD)), 2, "has no tokenizer")
    wrong = GOOD | {"prompt": [1], "continuation": [models.VOCABULARY]}
    refused(call("eval", olmoe, "--data", write(tmp_path, wrong)), 2, "token id out of range")


def test_eval_refuses_what_it_would_not_honour(capsys: pytest.CaptureFixture[str]) -> None:
    """The texts name their tasks; a profile is always of the exact model."""
    for arguments in (("eval", "sample", "--task", "sql"), ("profile", "sample", "--preset", "x")):
        with pytest.raises(SystemExit):
            caller(capsys)(*arguments)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")
def test_interrupted_in_the_middle() -> None:
    with start("eval", "sample", "--json", *MEMORY) as process:
        wait_for(process, rb" [1-9]\d*/96")
        done, elapsed = stop(process, signal.SIGINT)
    assert done.code == 1
    assert elapsed < 10
    assert done.out == ""
    assert "error: stopped by SIGINT" in done.err
    assert "Traceback" not in done.err


# --- texts as data


def test_the_texts_that_ship() -> None:
    texts = read_texts(sample_tasks())
    assert len(texts) == 96
    assert len(read_texts(sample_tasks(), 2)) == 16


def test_special_tokens_come_once() -> None:
    texts = read_texts(sample_tasks(), 1)[:1]

    def encode(text: str, first: bool) -> list[int]:
        return [1, 7] if first else [8, 9, 10]

    (found,) = as_ids(texts, encode, 11)
    assert found == TaskIds(texts[0].task, [1, 7, 8, 9, 10], 3)
    with pytest.raises(UsageError, match="text 1: token id out of range: `10`"):
        as_ids(texts, encode, 10)
    with pytest.raises(UsageError, match="without any token"):
        as_ids(texts, lambda text, first: [], 10)


@pytest.mark.parametrize(
    ("context", "ids", "scored"),
    [(9, [1, 2, 3, 4, 5], 3), (5, [1, 2, 3, 4, 5], 3), (4, [2, 3, 4, 5], 3), (2, [4, 5], 1)],
)
def test_texts_are_cut_from_the_left(context: int, ids: list[int], scored: int) -> None:
    (found,) = cut_to([TaskIds("a", [1, 2, 3, 4, 5], 3)], context)
    assert (found.ids, found.scored, found.cut) == (ids, scored, len(ids) < 5)
