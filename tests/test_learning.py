"""Learning while serving: what requests add, when it is saved, and that nothing is ever lost."""

import json
import logging
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import models
from retinue.engine import learning
from retinue.engine.learning import (
    FADE,
    SAVE_REQUESTS,
    SAVE_S,
    Finished,
    Learner,
    finished,
    open_learner,
)
from retinue.engine.request import new_request
from retinue.model.profiles import read_profile, write_profile
from retinue.model.survey import survey
from retinue.policy.profile import Profile, TaskCounts
from retinue.types import SamplingParams
from test_evaluate import opened

SHAPE = (2, 4)
USED = np.array([[1, 2, 0, 0], [0, 0, 3, 0]], np.float32)
DYING = """
import os, signal, sys
from pathlib import Path
import numpy as np
from retinue.engine.learning import Finished, Learner
from retinue.policy.profile import Profile

whole, left = Path.write_bytes, [int(sys.argv[2])]

def write_bytes(self, content, *rest, **named):
    left[0] -= 1
    whole(self, content if left[0] else content[: len(content) // 2], *rest, **named)
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)

Path.write_bytes = write_bytes
learner = Learner(Profile("tiny", 2, 4, 1, {}), Path(sys.argv[1]))
while True:
    learner.learn(Finished("a", np.ones((2, 4), np.float32), [5], 7))
    learner.save()
"""


def measured() -> Profile:
    counts = TaskCounts(2, 6, np.ones(SHAPE, np.int64), np.ones(SHAPE, np.float32))
    return Profile("tiny", *SHAPE, 1, {"a": counts})


def request(task: str | None = "a", answer: int = 7) -> Finished:
    return Finished(task, USED, [5, 5, 9], answer)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_requests_add_to_what_was_measured(tmp_path: Path) -> None:
    learner = Learner(measured(), tmp_path / "learnt.json", Clock())
    learner.learn(request())
    learner.learn(request("b", answer=9))
    learner.learn(request(None))
    both = learner.profile
    assert list(both.tasks) == ["a", "b"]
    assert (both.tasks["a"].weight == 1 + USED).all()
    assert (both.tasks["b"].weight == USED).all()
    assert (both.tasks["a"].texts, both.tasks["a"].tokens) == (3, 9)
    assert both.tasks["a"].words == {5: 2, 9: 1}
    assert both.output_tokens("b").mean == 9  # type: ignore[union-attr]
    assert (measured().tasks["a"].weight == 1).all()
    learner.learn(Finished("a", None, [1], 2))  # its routing was not recorded
    assert (learner.profile.tasks["a"].weight == 1 + USED).all()
    assert learner.profile.tasks["a"].answers == {7: 1, 2: 1}


def test_the_file_holds_what_was_learnt_alone_and_is_continued(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "learnt.json"
    for _ in range(3):  # three lives of a server
        learner = Learner(measured(), file, Clock())
        learner.learn(request())
        learner.close()
    assert read_profile(file).tasks["a"].texts == 3
    assert (Learner(measured(), file).profile.tasks["a"].weight == 1 + 3 * USED).all()


def test_when_it_is_saved(tmp_path: Path) -> None:
    file, clock = tmp_path / "learnt.json", Clock()
    learner = Learner(measured(), file, clock)
    for _ in range(SAVE_REQUESTS - 1):
        learner.learn(request())
    assert not file.exists()
    learner.learn(request())
    assert read_profile(file).tasks["a"].texts == SAVE_REQUESTS
    clock.now = SAVE_S - 1
    learner.learn(request())
    assert read_profile(file).tasks["a"].texts == SAVE_REQUESTS
    clock.now = SAVE_S
    learner.learn(request())
    assert read_profile(file).tasks["a"].texts == SAVE_REQUESTS + 2
    before = file.stat().st_mtime_ns
    learner.close()  # nothing is new
    assert file.stat().st_mtime_ns == before


def test_a_disk_that_refuses_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    tried = []

    def write(profile: Profile, file: Path) -> None:
        tried.append(1)
        write_profile(profile, file)

    monkeypatch.setattr(learning, "write_profile", write)
    learner = Learner(measured(), tmp_path / "file" / "learnt.json", Clock())
    with caplog.at_level(logging.WARNING, "retinue"):
        for _ in range(SAVE_REQUESTS + 5):
            learner.learn(request())
        learner.close()
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "what requests teach is not kept"
    ]
    assert len(tried) == 2
    assert learner.profile.tasks["a"].texts == 2 + SAVE_REQUESTS + 5  # nothing is forgotten


def test_a_damaged_file_is_said_and_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "learnt.json"
    other = Profile("other", 3, 4, 1, {})
    for content in ("{", json.dumps(other.as_dict())):
        file.write_text(content)
        caplog.clear()
        learner = Learner(measured(), file)
        assert "is not used" in caplog.text
        learner.learn(request())
        learner.close()
        assert read_profile(file).tasks["a"].texts == 1


def test_old_requests_fade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "KEPT_WORDS", 2)
    learner = Learner(measured(), tmp_path / "learnt.json", Clock())
    learnt = TaskCounts(
        FADE - 1, 4, np.zeros(SHAPE, np.int64), 2 * USED, words=dict.fromkeys(range(5), 9)
    )
    write_profile(Profile("tiny", *SHAPE, 1, {"b": learnt}), tmp_path / "learnt.json")
    learner = Learner(measured(), tmp_path / "learnt.json", Clock())
    learner.learn(request("b"))
    faded = learner.profile.tasks["b"]
    assert faded.texts == FADE // 2
    assert (faded.weight == 1.5 * USED).all()
    assert len(faded.words) == 2


def test_a_server_learns_from_its_engine(
    olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assembly = opened(olmoe)
    learner = open_learner(olmoe, assembly.facts)  # there is no profile yet
    try:
        assembly.host.changes.accounts.on = True
        params = SamplingParams(max_new_tokens=3, ignore_eos=True)
        asked = new_request(models.prompt_of(12, 1), params, None, task="a")
        assembly.engine.add(asked)
        while assembly.engine.busy:
            assembly.engine.step()
        learner.learn(finished(asked))
    finally:
        assembly.close()
    learner.close()
    again = open_learner(olmoe, survey(olmoe)).profile.tasks["a"]
    assert asked.usage is not None
    assert (asked.usage.used.sum(axis=1) > 1).all()
    assert again.weight == pytest.approx(asked.usage.used, abs=0.006)
    assert (again.answers, again.words_total) == ({3: 1}, 12)


def test_killed_while_it_writes(tmp_path: Path) -> None:
    """Dead in the middle of a write, the file is still the one before, and is continued."""
    file = tmp_path / "learnt.json"
    for writes in (2, 3, 4):
        file.unlink(missing_ok=True)
        command = [sys.executable, "-c", DYING, str(file), str(writes)]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
        assert read_profile(file).tasks["a"].texts == writes - 1
    learner = Learner(measured(), file)
    learner.learn(request())
    learner.close()
    assert read_profile(file).tasks["a"].texts == 4
