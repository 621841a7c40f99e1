"""Clients name tasks as they like; only so many of them are told apart."""

import logging
from pathlib import Path

import numpy as np
import pytest

import models
from retinue.config import Config
from retinue.engine.task_names import MOST_TASKS, TaskNames, task_names
from retinue.policy.profile import Profile, TaskCounts
from retinue.types import Deadline


def test_the_first_names_and_known_ones_are_told_apart(caplog: pytest.LogCaptureFixture) -> None:
    names = TaskNames(["sql"], most=3)
    told = [names.told(task) for task in ("a", "b", "c", "d", "a", "sql", None)]
    assert told == ["a", "b", None, None, "a", "sql", None]
    assert ["more than 3 tasks: `c`" in record.message for record in caplog.records] == [True]


def test_what_settings_and_profile_name_has_its_place() -> None:
    counts = TaskCounts(1, 1, np.zeros((1, 1), np.int64), np.zeros((1, 1), np.float32))
    many = [f"learnt {index}" for index in range(2 * MOST_TASKS)]
    config = Config(
        task="own",
        deadlines={"due": Deadline(1.0)},
        keys={"key": {"task": "keyed"}},
        routes={"/code": {"task": "routed"}},
    )
    names = task_names(config, Profile("tiny", 1, 1, 1, dict.fromkeys(many, counts)))
    for task in (*many, "own", "due", "keyed", "routed"):
        assert names.told(task) == task
    assert names.told("another") is None
    assert task_names(config, None).told("another") == "another"


def test_requests_beyond_them_have_no_task(olmoe: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    with models.open_llm(olmoe, preset="random", experts="50%") as llm:
        llm.assembly.task_names = TaskNames((), most=2)
        for task in "abca":
            llm.generate([models.prompt_of(5)], models.greedy(1), task=task)
        *_, last = llm.stream(models.prompt_of(5), models.greedy(1), task="d")
        assert last.task is None
        assert set(llm.assembly.metrics.tasks) == {"a", "b", None}
