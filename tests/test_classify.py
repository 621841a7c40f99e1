"""The task of a prompt, from its tokens or its words; and how requests come to it."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

import models
from command import Call, caller
from retinue import UsageError
from retinue.config import CLASSIFIERS, load_config
from retinue.memory.home import sample_folder, sample_tasks
from retinue.model.profiles import write_profile
from retinue.policy.classify.classifiers import classifier
from retinue.policy.classify.keywords import Keywords
from retinue.policy.classify.learned import Learned
from retinue.policy.classify.noise import mislabelled
from retinue.policy.profile import Profile, TaskCounts, profile_from

WORDS = {
    "low": {token: 40 - token for token in range(10, 30)},
    "high": {token: 70 - token for token in range(40, 60)},
}
SHAPE = (models.LAYERS, models.EXPERTS)


def profile_of(words: dict[str, dict[int, int]]) -> Profile:
    """Tasks with these words; the first uses the first half of the experts, and so on."""
    tasks = {}
    for number, (name, counts) in enumerate(words.items()):
        weight = np.zeros(SHAPE, dtype=np.float32)
        weight[:, 4 * number : 4 * number + 4] = 1
        total = sum(counts.values())
        tasks[name] = TaskCounts(1, 10, weight.astype(np.int64), weight, counts, total)
    return Profile("tiny", *SHAPE, models.TOP_K, tasks)


def drawn(task: str, count: int, seed: int = 0) -> list[int]:
    counts = WORDS[task]
    return Random(seed).choices(list(counts), list(counts.values()), k=count)


# --- learnt


@pytest.mark.parametrize("count", [4, 20, 500])
@pytest.mark.parametrize("task", WORDS)
def test_a_text_of_a_task_is_its(task: str, count: int) -> None:
    assert Learned(WORDS).classify("", drawn(task, count)) == task


def test_the_common_words_decide() -> None:
    words = {"a": {1: 90, 2: 10, 3: 20}, "b": {1: 10, 2: 90, 3: 20}}
    learned = Learned(words)
    assert learned.classify("", [1, 1, 1, 2, 3]) == "a"
    assert learned.classify("", [1, 2, 2, 2, 3]) == "b"


def test_a_task_with_more_texts_is_not_likelier() -> None:
    words = {"much": {1: 9000, 2: 1000, 3: 100}, "little": {1: 2, 2: 8, 3: 1}}
    assert Learned(words).classify("", [2, 2, 1, 2, 2]) == "little"


@pytest.mark.parametrize(
    "ids", [[], [99] * 30, list(range(60, 120)), [10, 40, *range(60, 120)], [10] * 40]
)
def test_what_is_like_no_task_is_unknown(ids: list[int]) -> None:
    assert Learned(WORDS).classify("", ids) is None


def test_a_single_task_is_not_everybodys() -> None:
    learned = Learned({"low": WORDS["low"]})
    assert learned.classify("", drawn("low", 30)) == "low"
    assert learned.classify("", drawn("high", 30)) is None


def sample_texts() -> tuple[Tokenizer, dict[str, list[str]]]:
    texts: dict[str, list[str]] = {}
    for line in sample_tasks().read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        texts.setdefault(row["task"], []).append(row["prompt"])
    return Tokenizer.from_file(str(sample_folder() / "tokenizer.json")), texts


def halves() -> tuple[Tokenizer, dict[str, dict[int, int]], list[tuple[str, str, list[int]]]]:
    """Words of half of the sample's texts, and the others with their tasks and ids."""
    tokenizer, texts = sample_texts()
    words = {
        task: dict(Counter(i for text in some[::2] for i in ids_of(tokenizer, text)))
        for task, some in texts.items()
    }
    rest = [
        (task, text, ids_of(tokenizer, text)) for task, some in texts.items() for text in some[1::2]
    ]
    return tokenizer, words, rest


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def test_held_out_texts_of_the_sample() -> None:
    # Six texts a task to learn from; with thirty, see docs/LOG.md, it is right nine times in ten.
    tokenizer, words, rest = halves()
    learned = Learned(words)
    found = [(learned.classify("", ids), task) for task, _, ids in rest]
    assert sum(mine == task for mine, task in found) >= 0.75 * len(rest)
    unknown = ["모든 국민은 법 앞에 평등하고 자유롭다", "话说天下大势 分久必合 合久必分"]
    unknown.append(Random(0).randbytes(400).decode("latin-1"))
    assert {learned.classify("", ids_of(tokenizer, text)) for text in unknown} == {None}


# --- keywords


PIECES = {1: " select", 2: " from", 3: " where", 4: " dear", 5: " house", 6: "ing", 7: " 12"}
LISTS = {"sql": {1: 9, 2: 6, 3: 5, 7: 90}, "prose": {2: 6, 4: 9, 5: 8, 6: 90}}


def decode(ids: Sequence[int]) -> str:
    return "".join(PIECES[token] for token in ids)


@pytest.mark.parametrize(
    ("text", "task"),
    [
        ("SELECT a FROM b WHERE c", "sql"),
        ("My dear, the house!", "prose"),
        ("dear dear dear, select", None),  # a word counts once in a sentence: a tie
        ("Dear! Dear! Select.", "prose"),
        ("select dear", None),
        ("nothing of the kind", None),
        ("", None),
    ],
)
def test_the_task_with_most_keywords(text: str, task: str | None) -> None:
    assert Keywords(LISTS, decode).classify(text, []) == task


def test_keywords_are_words_that_tell_tasks_apart() -> None:
    lists = Keywords(LISTS, decode).lists
    assert lists["sql"] == {"select", "where", "from"}  # `from` is a third of one, a quarter here
    assert lists["prose"] == {"dear", "house"}


def test_keywords_of_a_prompt_that_was_given_as_ids() -> None:
    assert Keywords(LISTS, decode).classify("", [4, 5]) == "prose"


def test_keywords_are_better_than_chance_on_the_sample() -> None:
    tokenizer, words, rest = halves()
    keywords = Keywords(words, tokenizer.decode)
    right = sum(keywords.classify(text, ids) == task for task, text, ids in rest)
    assert right > 0.4 * len(rest)  # chance: 1 of 8


# --- by name, and in the configuration


def test_classifiers_by_name() -> None:
    profile, prompt = profile_of(WORDS), drawn("high", 20)
    assert classifier("learned", profile).classify("", prompt) == "high"
    assert classifier("none", profile).classify("", prompt) is None
    assert classifier("learned", profile_of({"low": {}})).classify("", prompt) is None
    assert classifier("learned", None).classify("", prompt) is None
    with pytest.raises(UsageError, match="guess"):
        classifier("guess", profile)
    with pytest.raises(UsageError, match="no tokenizer"):
        classifier("keywords", profile)
    texts = profile_of(LISTS)
    assert classifier("keywords", texts, decode).classify("dear house", []) == "prose"


def test_words_survive_the_profile_file() -> None:
    again = profile_from(json.loads(json.dumps(profile_of(WORDS).as_dict())))
    assert classifier("learned", again).classify("", drawn("low", 20)) == "low"


def test_the_setting() -> None:
    assert load_config({}, environ={}).infer_task == "learned"
    for name in CLASSIFIERS:
        assert load_config({}, environ={"RETINUE_INFER_TASK": name}).infer_task == name
    with pytest.raises(UsageError, match="infer_task"):
        load_config({"infer_task": "guess"}, environ={})


# --- in the engine


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("words") / "profile.json"
    write_profile(profile_of(WORDS), file)
    return file


def open_llm(folder: Path, profile: Path, **settings: Any) -> Any:
    return models.open_llm(
        folder, preset="popular-by-task", experts="50%", profile=profile, **settings
    )


def test_a_request_without_a_task_gets_its_own(olmoe: Path, profile: Path) -> None:
    with open_llm(olmoe, profile) as llm:

        def resident() -> list[int]:
            return list(np.flatnonzero(llm.assembly.cache.slot_of[0] >= 0))

        prompts = [drawn("high", 20), drawn("low", 20), list(range(70, 90))]
        found = [
            (out.task, resident())
            for prompt in prompts
            for out in llm.generate(prompt, models.greedy(2))
        ]
        assert found[0] == ("high", [4, 5, 6, 7])
        assert found[1] == ("low", [0, 1, 2, 3])
        assert found[2][0] is None
        (named,) = llm.generate(prompts[0], models.greedy(2), task="low")
        assert named.task == "low"
        *_, last = llm.stream(prompts[0], models.greedy(2))
        assert last.task == "high"
        both = llm.generate(prompts[:2], models.greedy(2), progress=False)
        assert [out.task for out in both] == ["high", "low"]


@pytest.mark.parametrize(
    ("settings", "task"), [({"task": "low"}, "low"), ({"infer_task": "none"}, None)]
)
def test_what_the_settings_say_comes_first(
    olmoe: Path, profile: Path, settings: dict[str, str], task: str | None
) -> None:
    with open_llm(olmoe, profile, **settings) as llm:
        (out,) = llm.generate(drawn("high", 20), models.greedy(2))
        assert out.task == task


@pytest.mark.parametrize(
    ("arguments", "said"), [((), True), (("--task", "high"), False), (("--infer-task", "none"), 0)]
)
def test_run_says_which_task_it_inferred(
    olmoe: Path,
    profile: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    said: bool,
) -> None:
    call: Call = caller(capsys)
    prompt = " ".join(map(str, drawn("high", 20)))
    settings = ("--preset", "popular-by-task", "--experts", "50%", "--profile", profile)
    room = ("--memory", "2GiB", "--context", "64", "--max-new-tokens", "2")
    done = call("run", olmoe, prompt, "--token-ids", *settings, *room, *arguments)
    assert done.code == 0, done.err
    assert ("task: high (inferred from the prompt" in done.err) is bool(said)


# --- wrong labels


def test_wrong_labels() -> None:
    tasks = ["low"] * 60 + ["high"] * 40
    noisy = mislabelled(tasks, 0.2, list(WORDS), seed=1)
    assert sum(mine != task for mine, task in zip(noisy, tasks, strict=True)) == 20
    assert noisy == mislabelled(tasks, 0.2, list(WORDS), seed=1)
    assert noisy != mislabelled(tasks, 0.2, list(WORDS), seed=2)
    assert mislabelled(tasks, 0, list(WORDS), seed=1) == tasks
    assert set(mislabelled([None, "low"], 1, list(WORDS), seed=1)) <= set(WORDS)
