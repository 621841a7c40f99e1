"""Clients that come and go, limits, keys, and how the server begins and ends."""

import threading
from typing import Any

import httpx
import pytest

from retinue.errors import CheckpointError, Overloaded
from retinue.types import Deadline
from serving import TEXT, FakeServed, complete, events, ready, refused, running


def test_health_answers_while_the_model_loads() -> None:
    loaded, served = threading.Event(), FakeServed()

    def load() -> FakeServed:
        loaded.wait()
        return served

    with running(load) as it, it.client() as client:
        assert client.get("/health").status_code == 503
        response = complete(client)
        assert "loading" in refused(response, 503)
        assert response.headers["Retry-After"] == "1"
        assert client.get("/version").status_code == 200
        assert client.get("/metrics").status_code == 200
        loaded.set()
        it.until(lambda: client.get("/health").status_code == 200)
        assert complete(client).status_code == 200
    assert served.closed


def test_a_model_that_cannot_be_loaded_ends_the_server() -> None:
    def load() -> FakeServed:
        raise CheckpointError("damaged")

    with running(load) as it:
        it.thread.join(20)
    assert isinstance(it.server.bridge.failure, CheckpointError)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_forgotten(stream: bool) -> None:
    served = FakeServed()
    with ready(served) as it, it.client() as client:
        served.gate.clear()
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json=TEXT | {"stream": stream}, timeout=0.2)
        assert it.server.bridge.under_way == 1
        client.close()
        it.until(lambda: it.left == 1)
        served.gate.set()
        it.idle()
        assert it.server.metrics.tally.tasks[None].cancelled == 1
        with it.client() as other:
            assert complete(other).json()["choices"][0]["text"] == "CDE"


def test_one_that_waits_may_leave_too() -> None:
    served = FakeServed(batch=1)
    with ready(served) as it, it.client() as client:
        served.gate.clear()
        first = threading.Thread(target=lambda: complete(client))
        first.start()
        it.until(lambda: it.server.bridge.under_way == 1)
        with it.client() as other, pytest.raises(httpx.ReadTimeout):
            other.post("/v1/completions", json=TEXT, timeout=0.2)
        it.until(lambda: it.server.bridge._inbox.qsize() == 2)  # the call, and that it is over
        served.gate.set()
        first.join()
        it.idle()
    assert it.server.metrics.tally.tasks[None].answered == 1


def test_a_full_queue_refuses() -> None:
    served = FakeServed()
    with ready(served, queue=1) as it, it.client() as client:
        served.gate.clear()
        first = threading.Thread(target=lambda: complete(client, n=3))
        first.start()
        it.until(lambda: it.server.bridge.under_way == 3)
        with it.client() as other:
            response = complete(other, n=2)
        assert response.headers["Retry-After"] == "1"
        assert "queue" in refused(response, 429)
        served.gate.set()
        first.join()
        assert complete(client, n=3).status_code == 200
        it.idle()


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_has_a_time_limit(stream: bool) -> None:
    served = FakeServed()
    with ready(served, time_limit=0.2) as it, it.client() as client:
        pause = threading.Event()
        served.network.before = lambda: pause.wait(0.05)
        response = complete(client, max_tokens=60, stream=stream)
        if stream:
            assert events(response)[-1]["error"]["code"] == "time_limit"
        else:
            assert "0.2 s" in refused(response, 408)
        it.idle()


def test_a_fault_fails_its_requests_and_the_server_goes_on() -> None:
    served = FakeServed()
    with ready(served) as it, it.client() as client:

        def fail() -> None:
            raise ZeroDivisionError

        served.network.before = fail
        assert "log" in refused(complete(client), 500)
        served.network.before = lambda: None
        assert complete(client).status_code == 200
        it.idle()


def test_stopping_finishes_what_runs_and_refuses_what_waits() -> None:
    served = FakeServed(batch=1)
    answers: list[httpx.Response] = []
    with ready(served) as it, it.client() as client:
        served.gate.clear()
        first = threading.Thread(target=lambda: answers.append(complete(client)))
        first.start()
        it.until(lambda: bool(served.network.runs))
        second = threading.Thread(target=lambda: answers.append(complete(client)))
        second.start()
        it.until(lambda: it.server.bridge.under_way == 2)
        stopper = threading.Thread(target=lambda: it.stop(20))
        stopper.start()
        it.until(lambda: client.get("/health").status_code == 503)
        assert "stopping" in refused(complete(client), 503)
        served.gate.set()
        for thread in (first, second, stopper, it.thread):
            thread.join(20)
    assert sorted(answer.status_code for answer in answers) == [200, 503]
    assert served.closed


def test_after_the_grace_what_runs_is_ended() -> None:
    served = FakeServed()
    pause = threading.Event()
    served.network.before = lambda: pause.wait(0.05)
    answers: list[httpx.Response] = []
    with ready(served) as it, it.client() as client:
        thread = threading.Thread(target=lambda: answers.append(complete(client, max_tokens=90)))
        thread.start()
        it.until(lambda: bool(served.network.runs))
        it.stop(0.1)
        thread.join(20)
    assert "stopping" in refused(answers[0], 503)


# --- keys and tasks


def test_keys() -> None:
    keys = {"two": {"task": "chat"}, "three": {}}
    with ready(api_key="one", keys=keys) as it, it.client() as client:
        assert client.get("/health").status_code == 200
        assert "needed" in refused(client.get("/v1/models"), 401)
        for wrong in ("Bearer on", "Bearer onee", "one", "Basic one", "Bearer \xe9"):
            head = {"Authorization": wrong.encode("latin-1")}
            response = client.get("/v1/models", headers=head)
            assert "wrong" in refused(response, 401)
            assert response.headers["WWW-Authenticate"] == "Bearer"
        for right in ("one", "two", "three"):
            head = {"Authorization": f"Bearer {right}"}
            answer = client.post("/v1/completions", json=TEXT, headers=head)
            assert answer.json()["retinue"]["task"] == keys.get(right, {}).get("task")


def test_the_task_of_a_request() -> None:
    """The body says most, then the header, the key, the route, and then the prompt."""
    config = {"keys": {"k": {"task": "keyed"}, "x": {}}}
    config |= {"routes": {"/code": {"task": "routed"}}}
    served = FakeServed()
    served.inferred = "inferred"
    with ready(served, **config) as it, it.client() as client:

        def task(path: str = "", key: str = "x", header: str = "", **fields: Any) -> Any:
            head = {"Authorization": f"Bearer {key}", "X-Retinue-Task": header}
            answer = client.post(f"{path}/v1/completions", json=TEXT | fields, headers=head)
            return answer.json()["retinue"]["task"]

        assert task() == "inferred"
        assert task("/code") == "routed"
        assert task("/code", "k") == "keyed"
        assert task("/code", "k", "headed") == "headed"
        assert task("/code", "k", "headed", task="said") == "said"


def test_deadlines_are_counted() -> None:
    deadlines = {"slow": Deadline(first_token_s=1e-9)}
    with ready(deadlines=deadlines) as it, it.client() as client:
        complete(client)
        complete(client, task="slow")
        complete(client, task="slow", deadline={"first_token_s": 100, "between_tokens_s": 100})
        it.idle()
        tasks = it.server.metrics.tally.tasks
    assert (tasks[None].deadlines_met, tasks[None].deadlines_missed) == (0, 0)
    assert (tasks["slow"].deadlines_met, tasks["slow"].deadlines_missed) == (1, 1)


def test_an_engine_that_has_too_much_to_do_refuses() -> None:
    served = FakeServed()

    def refuse(request: object) -> None:
        raise Overloaded("too much waits", retry_after_s=2.5)

    served.engine.scheduler.add = refuse
    with ready(served) as it, it.client() as client:
        for fields in ({}, {"stream": True}, {"n": 2}):
            response = complete(client, task="chat", **fields)
            assert "too much" in refused(response, 429)
            assert response.headers["Retry-After"] == "3"
        it.idle()
        assert it.server.metrics.tally.tasks["chat"].refused == 3
