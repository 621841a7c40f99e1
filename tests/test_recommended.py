"""What replays recommend: kept in a profile, merged, and what `--preset auto` stands for then."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import models
from retinue.errors import UsageError
from retinue.memory.machine import machine_name
from retinue.model.profiles import read_profile, write_profile
from retinue.policy.profile import Profile, TaskCounts, profile_from
from retinue.policy.recommended import Recommendation, best_for, joined

HERE = machine_name()
QUARTER = Recommendation(0.25, 3e8, "on-demand", 0.5, 0.12, HERE)


def profile_of(*entries: Recommendation) -> Profile:
    counts = np.ones((models.LAYERS, models.EXPERTS), dtype=np.int64)
    tasks = {"a": TaskCounts(1, 1, counts, counts.astype(np.float32))}
    shape = (models.LAYERS, models.EXPERTS, models.TOP_K)
    return Profile("tiny", *shape, tasks, recommended=entries)


@pytest.mark.parametrize(
    ("share", "disk", "found"),
    [
        (0.25, 3e8, True),
        (0.3, 3e8, True),
        (0.2, 3e8, True),
        (0.33, 3e8, False),
        (0.25, 4.7e8, True),
        (0.25, 1.9e8, True),
        (0.25, 1e8, False),
        (0.25, 1e9, False),
    ],
)
def test_it_holds_for_what_is_near(share: float, disk: float, found: bool) -> None:
    assert (best_for((QUARTER,), share, disk, HERE) is not None) == found
    assert best_for((QUARTER,), share, disk, "another machine") is None


def test_the_nearest_one_holds() -> None:
    near = replace(QUARTER, share=0.28, preset="auto")
    assert best_for((QUARTER, near), 0.29, 3e8, HERE) == near
    assert best_for((QUARTER, near), 0.25, 3e8, HERE) == QUARTER
    assert best_for((), 0.25, 3e8, HERE) is None


def test_new_ones_take_the_place_of_old_ones() -> None:
    half, newer = replace(QUARTER, share=0.5), replace(QUARTER, preset="layer-stream")
    foreign = replace(QUARTER, machine="another")
    assert joined((QUARTER, half, foreign), (newer,)) == (half, foreign, newer)
    merged = profile_of(QUARTER, half).plus(profile_of(newer))
    assert merged.recommended == (half, newer)


def test_profiles_keep_them(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    write_profile(profile_of(QUARTER, replace(QUARTER, share=1.0, ring=None)), file)
    assert read_profile(file).recommended == (QUARTER, replace(QUARTER, share=1.0, ring=None))
    content = profile_of(QUARTER).as_dict()
    assert not profile_from({**content, "recommended": []}).recommended
    for wrong in ({"share": 2.0}, {"disk_bytes_per_s": 0}, {"ring": 1.5}):
        rows = [content["recommended"][0] | wrong]
        with pytest.raises(UsageError, match="damaged profile"):
            profile_from({**content, "recommended": rows})


def opened(olmoe: Path, file: Path, *entries: Recommendation, **settings: Any) -> Any:
    write_profile(profile_of(*entries), file)
    known = {"experts": "50%", "read_limit": "300MB", "profile": file} | settings
    return models.open_llm(olmoe, **known)


def test_auto_stands_for_what_is_recommended(olmoe: Path, tmp_path: Path) -> None:
    half = replace(QUARTER, share=0.5, ring=1.0)
    file = tmp_path / "profile.json"
    with opened(olmoe, file, half) as llm:
        assembly = llm.assembly
        assert assembly.preset.name == "on-demand"
        assert assembly.cache.division.whole
        assert any("auto is `on-demand` here: 12% faster" in note for note in assembly.notes)
        tokens = llm.generate([models.prompt_of(9)], models.greedy(6))[0].token_ids
    with opened(olmoe, file, half, read_limit="5MB") as llm:
        assert llm.assembly.preset.name == "auto", "another disk"
        assert llm.generate([models.prompt_of(9)], models.greedy(6))[0].token_ids == tokens
    with opened(olmoe, file, half, experts="100%") as llm:
        assert llm.assembly.preset.name == "auto", "nothing has to leave"
    with opened(olmoe, file, half, preset="layer-stream", profile=None) as llm:
        assert llm.assembly.preset.name == "layer-stream", "the user's word comes first"


@pytest.mark.parametrize(
    ("name", "reason"), [("popular", "approximate"), ("gone", "unknown"), ("belady", "replays")]
)
def test_what_cannot_run_is_said(olmoe: Path, tmp_path: Path, name: str, reason: str) -> None:
    file = tmp_path / "profile.json"
    with opened(olmoe, file, replace(QUARTER, share=0.5, preset=name)) as llm:
        assert llm.assembly.preset.name == "auto"
        (said,) = [note for note in llm.assembly.notes if "recommended" in note]
        assert reason in said


def test_a_given_profile_that_is_damaged_is_refused(olmoe: Path, tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    file.write_text("{")
    with pytest.raises(UsageError, match="cannot read the profile"):
        models.open_llm(olmoe, experts="50%", profile=file)
