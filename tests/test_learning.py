"""Learning while serving: what requests add, when it is saved, and that nothing is ever lost."""

import json
import logging
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from retinue.engine import learning
from retinue.engine.learning import FADE, SAVE_REQUESTS, SAVE_S, Finished, Learner
from retinue.model.profiles import read_profile, write_profile
from retinue.policy.profile import Profile, TaskCounts

SHAPE = (2, 4)
USED = np.array([[1, 2, 0, 0], [0, 0, 3, 0]], np.float32)
FOREVER = """
import sys
from pathlib import Path
from test_learning import *
learner = Learner(measured(), Path(sys.argv[1]))
while True:
    learner.learn(request())
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


def test_killed_while_it_writes(tmp_path: Path) -> None:
    """Whatever moment it dies at, the file is one that was written whole, and is continued."""
    file = tmp_path / "learnt.json"
    texts = 0
    for _ in range(2):
        child = subprocess.Popen(
            [sys.executable, "-c", FOREVER, str(file)], cwd=Path(__file__).parent
        )
        try:
            before = file.read_bytes() if file.exists() else b""
            while not file.exists() or file.read_bytes() == before:
                assert child.poll() is None
                time.sleep(0.001)
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
        now = read_profile(file).tasks["a"].texts
        assert now > texts
        texts = now
