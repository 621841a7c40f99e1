"""Profiles: counts that add up, files that may be damaged, and where they are looked for."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

import models
from retinue.errors import Unsupported, UsageError, WriteError
from retinue.memory.home import sample_folder
from retinue.model.profiles import default_profile, find_profile, read_profile, write_profile
from retinue.model.survey import survey
from retinue.policy.profile import Profile, TaskCounts, profile_from

SHAPE = (models.LAYERS, models.EXPERTS)


def counts(seed: int, texts: int = 2) -> TaskCounts:
    random = np.random.default_rng(seed)
    weight = random.integers(0, 50, SHAPE).astype(np.float32) / 4
    return TaskCounts(texts, 10 * texts, random.integers(0, 100, SHAPE), weight)


def profile(*tasks: str, experts: int = models.EXPERTS) -> Profile:
    found = {name: counts(seed) for seed, name in enumerate(tasks)}
    return Profile("tiny", models.LAYERS, experts, models.TOP_K, found)


def equal(left: Profile, right: Profile) -> bool:
    return left.as_dict() == right.as_dict()


def test_shares_by_hand() -> None:
    weight = np.array([[1, 3], [0, 0]], dtype=np.float32)
    other = np.array([[3, 1], [5, 0]], dtype=np.float32)
    choices = np.ones((2, 2), dtype=np.int64)
    tasks = {"a": TaskCounts(1, 4, choices, weight), "b": TaskCounts(1, 4, choices, other)}
    made = Profile("by-hand", 2, 2, 1, tasks)
    assert made.shares("a").tolist() == [[0.25, 0.75], [0, 0]]
    assert made.shares("b").tolist() == [[0.75, 0.25], [1, 0]]
    for unknown in (None, "c"):
        assert made.shares(unknown).tolist() == [[0.5, 0.5], [1, 0]]


def test_merging_adds_counts() -> None:
    merged = profile("a", "b").plus(profile("c", "b"))
    assert list(merged.tasks) == ["a", "b", "c"]
    both = merged.tasks["b"]
    assert (both.texts, both.tokens) == (4, 40)
    assert (both.choices == counts(1).choices * 2).all()
    assert (both.weight == counts(1).weight * 2).all()
    assert equal(profile("a", "b").plus(profile()), profile("a", "b"))


def test_models_do_not_mix() -> None:
    with pytest.raises(UsageError, match="different models"):
        profile("a").plus(profile(experts=4))


def test_through_a_file(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "profile.json"
    write_profile(profile("a", "ü"), file)
    assert equal(read_profile(file), profile("a", "ü"))
    assert [entry.name for entry in file.parent.iterdir()] == ["profile.json"]
    document = json.loads(file.read_text())
    assert (document["format"], document["version"]) == ("retinue-profile", 1)


def test_unknown_parts_are_ignored() -> None:
    document = profile("a").as_dict()
    document["tasks"]["a"]["weather"] = [1, 2]
    document["remark"] = "from later"
    assert equal(profile_from(document), profile("a"))


def period_of(prompts: int) -> dict[str, object]:
    return {"texts": 1, "tolerance": 0.01, "degraded": {str(prompts): 0.5}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=2), "unknown version of a profile: `2`"),
        (lambda d: d.update(format="trace"), "not a profile"),
        (lambda d: d.pop("top_k"), "damaged profile"),
        (lambda d: d["tasks"]["a"].pop("popularity"), "damaged profile"),
        (lambda d: d["tasks"]["a"]["popularity"]["choices"].pop(), "damaged profile"),
        (lambda d: d["tasks"]["a"]["popularity"]["choices"][0].append(1), "damaged profile"),
        (lambda d: d["tasks"]["a"]["popularity"]["choices"][0].__setitem__(0, -1), "damaged"),
        (lambda d: d["tasks"]["a"]["popularity"]["weight"][0].__setitem__(0, -1), "damaged"),
        (lambda d: d["tasks"]["a"]["popularity"]["weight"][0].__setitem__(0, math.nan), "damaged"),
        (lambda d: d.update(period=period_of(0)), "damaged profile"),
        (lambda d: d["tasks"]["a"].update(popularity=3), "damaged profile"),
        (lambda d: d.update(tasks=[1]), "damaged profile"),
    ],
)
def test_damaged(change: object, message: str, tmp_path: Path) -> None:
    document = profile("a").as_dict()
    change(document)  # type: ignore[operator]
    file = tmp_path / "profile.json"
    file.write_text(json.dumps(document))
    with pytest.raises(UsageError, match=message) as caught:
        read_profile(file)
    assert str(file) in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '"text"'])
def test_no_profile_at_all(content: str, tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    file.write_text(content)
    with pytest.raises(UsageError, match="profile"):
        read_profile(file)
    with pytest.raises(UsageError, match="cannot read"):
        read_profile(tmp_path / "nothing.json")


def test_a_profile_is_found_by_its_checkpoint(olmoe: Path, tmp_path: Path) -> None:
    own = models.copy(olmoe, tmp_path / "own")
    facts = survey(own)
    with pytest.raises(Unsupported, match="there is no profile") as caught:
        find_profile(own, facts, None)
    assert f"retinue profile {own}" in caught.value.hint
    write_profile(profile("a"), default_profile(own))
    assert equal(find_profile(own, facts, None), profile("a"))
    named = tmp_path / "named.json"
    write_profile(profile("b"), named)
    assert equal(find_profile(own, facts, str(named)), profile("b"))
    models.edit_config(own, remark="another checkpoint now")
    with pytest.raises(Unsupported):
        find_profile(own, facts, None)


def test_a_profile_of_another_shape_is_refused(olmoe: Path, tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    write_profile(Profile("other", 4, 9, 2, {}), file)
    with pytest.raises(UsageError, match="is of `other`: 4 layers of 9 experts"):
        find_profile(olmoe, survey(olmoe), str(file))


def test_an_unwritable_place_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="cannot write") as caught:
        write_profile(profile("a"), tmp_path / "file" / "profile.json")
    assert caught.value.hint
    (tmp_path / "folder").mkdir()
    with pytest.raises(WriteError):
        write_profile(profile("a"), tmp_path / "folder")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "folder"]


def test_the_sample_ships_its_profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = find_profile(sample_folder(), survey(sample_folder()), None)
    assert len(made.tasks) == 8
    for counted in made.tasks.values():
        assert counted.texts == 12
        assert (counted.choices.sum(axis=1) == counted.tokens * made.top_k).all()
        # Its router normalises: each token's weights add up to one, but for rounding.
        assert counted.weight.sum(axis=1) == pytest.approx(counted.tokens, rel=0.01)
