"""What a profile knows beside popularity: questions, how parts add up, and their JSON."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import models
from retinue.errors import UsageError
from retinue.memory.machine import machine_name
from retinue.model.profiles import find_profile, write_profile
from retinue.model.survey import survey
from retinue.policy.measured import (
    Damage,
    MachineCosts,
    OutputTokens,
    Periods,
    Sensitivity,
    output_tokens,
    rounded_length,
)
from retinue.policy.profile import WORDS, Profile, TaskCounts, profile_from

SHAPE = (models.LAYERS, models.EXPERTS)
COSTS = MachineCosts(0.5, 0.01, 0.2, 0.003, "a machine")


def counts(**parts: object) -> TaskCounts:
    return TaskCounts(2, 20, np.ones(SHAPE, np.int64), np.ones(SHAPE, np.float32), **parts)  # type: ignore[arg-type]


def profile(**tasks: TaskCounts) -> Profile:
    return Profile("tiny", *SHAPE, models.TOP_K, tasks)


def curve(*agreements: float) -> dict[int, Damage]:
    return {n: Damage(2, agreement, 0.25) for n, agreement in enumerate(agreements, 1)}


def test_what_is_missing_is_unknown() -> None:
    bare = profile(a=counts())
    assert bare.sensitive("a").tolist() == [True] * models.LAYERS
    assert bare.output_tokens("a") is None
    assert bare.period is None
    assert bare.costs is None
    assert bare.tasks["a"].words == {}
    assert profile().sensitive(None).all()
    assert profile().output_tokens(None) is None


def test_sensitive_layers_by_hand() -> None:
    first = Sensitivity(0.8, curve(0.95, 0.9, 0.7, 0.85), curve(0.9, 0.5, 0.4, 0.3))
    assert first.insensitive(4) == range(2)  # what recovers deeper down does not count
    last = Sensitivity(0.8, curve(0.7), curve(0.9, 0.85, 0.8, 0.3))
    assert last.insensitive(4) == range(1, 4)
    wide = Profile("by-hand", 4, models.EXPERTS, 2, {})
    made = replace(wide, tasks={"a": counts(sensitivity=first), "b": counts(sensitivity=last)})
    assert made.sensitive("a").tolist() == [False, False, True, True]
    assert made.sensitive("b").tolist() == [True, False, False, False]
    for unknown in (None, "c"):  # as sensitive as any
        assert made.sensitive(unknown).tolist() == [True, False, True, True]


def test_sensitivity_adds_up_by_texts() -> None:
    left = Sensitivity(0.8, {1: Damage(1, 1.0, 0.0), 2: Damage(1, 0.5, 1.0)})
    right = Sensitivity(0.9, {1: Damage(3, 0.6, 0.4)}, {1: Damage(3, 0.2, 2.0)})
    both = left.plus(right)
    assert both.above == 0.9
    assert both.first[1].texts == 4
    assert both.first[1].agreement == pytest.approx(0.7)
    assert both.first[1].added_nll == pytest.approx(0.3)
    assert both.first[2] == left.first[2]
    assert both.last == right.last


def test_lengths_by_hand() -> None:
    assert output_tokens({10: 5, 20: 4, 100: 1}) == OutputTokens(23.0, 10, 20)
    assert output_tokens({7: 1}) == OutputTokens(7.0, 7, 7)
    assert [rounded_length(n) for n in (99, 100, 101, 149, 1234)] == [99, 100, 100, 150, 1200]


def test_answers_outweigh_the_texts_continuations() -> None:
    made = profile(a=counts(answers={8: 1}, continuations={50: 9}), b=counts(continuations={4: 1}))
    assert made.output_tokens("a") == OutputTokens(8.0, 8, 8)
    assert made.output_tokens("b") == OutputTokens(4.0, 4, 4)
    assert made.output_tokens("unknown") == OutputTokens(6.0, 4, 8)


def test_the_period_is_the_longest_within_the_tolerance() -> None:
    shares = {1: 0.2, 5: 0.205, 10: 0.209, 20: 0.22, 40: 0.2}
    assert Periods(9, 0.01, shares).best == 10
    assert Periods(9, 0.5, shares).best == 40
    assert Periods(0, 0.5, {}).best is None
    merged = Periods(1, 0.01, {1: 0.2, 5: 0.4}).plus(Periods(3, 0.02, {1: 0.4}))
    assert (merged.texts, merged.tolerance) == (4, 0.02)
    assert merged.degraded == {1: pytest.approx(0.35)}


def whole() -> Profile:
    sensitivity = Sensitivity(0.8, curve(0.9, 0.5), curve(0.95))
    parts = {"words": {5: 3, 9: 1}, "words_total": 12, "answers": {6: 1}, "continuations": {7: 2}}
    made = profile(a=counts(sensitivity=sensitivity, **parts), b=counts())
    return replace(made, periods=Periods(4, 0.01, {1: 0.25, 40: 0.5}), costs=COSTS)


def test_all_parts_go_through_json() -> None:
    document = json.loads(json.dumps(whole().as_dict()))
    again = profile_from(document)
    assert again.as_dict() == whole().as_dict()
    assert again.costs == COSTS
    assert again.period == 1
    assert again.tasks["a"].words == {5: 3, 9: 1}
    assert again.tasks["a"].sensitivity == whole().tasks["a"].sensitivity
    assert document["tasks"]["b"].keys() == {"texts", "tokens", "popularity"}


def test_parts_add_up() -> None:
    both = whole().plus(whole())
    task = both.tasks["a"]
    assert (task.words, task.words_total) == ({5: 6, 9: 2}, 24)
    assert (task.answers, task.continuations) == ({6: 2}, {7: 4})
    assert task.sensitivity is not None
    assert task.sensitivity.first[1].texts == 4
    assert both.periods is not None
    assert both.periods.texts == 8
    plain = profile(a=counts())
    assert whole().plus(plain).costs == COSTS
    assert plain.plus(whole()).tasks["a"].sensitivity == whole().tasks["a"].sensitivity
    assert whole().plus(replace(plain, costs=replace(COSTS, base_s=9.0))).costs.base_s == 9  # type: ignore[union-attr]


def test_only_frequent_words_are_kept() -> None:
    words = {token: 1 + (token < WORDS) for token in range(2 * WORDS)}
    kept = profile_from(profile(a=counts(words=words, words_total=9)).as_dict()).tasks["a"]
    assert kept.words == dict.fromkeys(range(WORDS), 2)
    assert kept.words_total == 9


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["tasks"]["a"].update(sensitivity=[1]),
        lambda d: d["tasks"]["a"]["sensitivity"]["first"]["1"].pop("texts"),
        lambda d: d["tasks"]["a"]["words"]["counts"].update({"5": -1}),
        lambda d: d["tasks"]["a"].update(words=3),
        lambda d: d["tasks"]["a"].update(answers=["x"]),
        lambda d: d["period"].pop("degraded"),
        lambda d: d["costs"].pop("token_s"),
    ],
)
def test_damaged_parts(change: object) -> None:
    document = json.loads(json.dumps(whole().as_dict()))
    change(document)  # type: ignore[operator]
    with pytest.raises(UsageError, match="damaged profile"):
        profile_from(document)


def test_costs_of_another_machine_are_not_believed(olmoe: Path, tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    write_profile(replace(profile(a=counts()), costs=COSTS), file)
    assert find_profile(olmoe, survey(olmoe), str(file)).costs is None
    mine = replace(COSTS, machine=machine_name())
    write_profile(replace(profile(a=counts()), costs=mine), file)
    assert find_profile(olmoe, survey(olmoe), str(file)).costs == mine
