"""What could grow for ever, hang or get lost: odd names, odd bodies, slow clients, signals."""

import asyncio
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

import fakes
from retinue.config import Config
from retinue.engine.request import Request, new_request
from retinue.server.app import Server
from retinue.server.bridge import Bridge
from retinue.server.call import Call, Limits
from retinue.server.gate import HELD_BODIES, Gate
from retinue.server.metrics import ServerMetrics
from retinue.server.run import serve
from retinue.types import SamplingParams
from serving import (
    CHAT,
    NAME,
    TEXT,
    WAIT_S,
    Characters,
    FakeServed,
    complete,
    ready,
    refused,
    running,
)

JSON = {"Content-Type": "application/json"}


def asked() -> Request:
    return new_request([33, 34], SamplingParams(max_new_tokens=3), Characters())


# --- names


def test_names_that_nobody_knows_are_not_kept() -> None:
    served = FakeServed()
    served.inferred = "inferred"
    keys = {"k": {"task": "keyed"}, "x": {}}
    with ready(served, keys=keys) as it, it.client() as client:

        def task(name: str, key: str, place: str) -> Any:
            head, body = {"Authorization": f"Bearer {key}"}, TEXT
            if place == "header":
                head["X-Retinue-Task"] = name
            else:
                body = TEXT | {"task": name}
            answer = client.post("/v1/completions", json=body, headers=head)
            return answer.json()["retinue"]["task"]

        for place in ("header", "body"):
            assert task("chat", "x", place) == "chat"
            assert task("unheard", "x", place) == "inferred"
            assert task("unheard", "k", place) == "keyed"
        it.idle()
        assert set(it.server.metrics.tally.tasks) == {"chat", "inferred", "keyed"}
        assert "unheard" not in client.get("/metrics").text


def test_the_client_gets_its_mark_back() -> None:
    with ready() as it, it.client() as client:
        assert complete(client, user="me").json()["retinue"]["user"] == "me"
        assert complete(client).json()["retinue"]["user"] is None
        refused(complete(client, user="x" * 257), 400, "user")


# --- bodies


def test_ids_that_are_none() -> None:
    with ready() as it, it.client() as client:
        assert "out of range" in refused(complete(client, prompt=[fakes.VOCABULARY]), 400, "prompt")
        bias = {"logit_bias": {str(fakes.VOCABULARY): 1}}
        refused(complete(client, **bias), 400, "logit_bias")
        refused(client.post("/v1/chat/completions", json=CHAT | bias), 400, "logit_bias")


@pytest.mark.parametrize("coding", ["gzip", "br", "deflate"])
def test_compressed_bodies_are_refused_by_name(coding: str) -> None:
    with ready() as it, it.client() as client:
        head = JSON | {"Content-Encoding": coding}
        response = client.post("/v1/completions", content=b"\x1f\x8b", headers=head)
        assert coding in refused(response, 415)


def test_other_methods() -> None:
    with ready() as it, it.client() as client:
        refused(client.options("/v1/completions"), 405)
        response = client.head("/health")
        assert (response.status_code, response.content) == (405, b"")


@pytest.mark.parametrize("kind", ["text/plain", "application/json"])
def test_a_body_that_is_no_http_ends_the_connection_quietly(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Before an answer it is one; behind an answer there is no room for another."""
    head = f"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Type: {kind}\r\n"
    with ready() as it, it.client() as client:
        address = (client.base_url.host, client.base_url.port)
        with socket.create_connection(address, timeout=WAIT_S) as connection:
            connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n3\r\n{{ }}\r\n".encode())
            if kind == "text/plain":
                assert connection.recv(12).endswith(b"415")
            connection.sendall(b"no number\r\n")
            rest = b"".join(iter(lambda: connection.recv(4096), b""))
        assert (b" 400 " in rest) == (kind == "application/json")
        assert complete(client).status_code == 200
    assert not [record for record in caplog.records if record.exc_info]


def test_bodies_of_unknown_length_do_not_keep_their_room() -> None:
    """Each is as long as can be until it is read, and as long as it is from then on."""
    served, body = FakeServed(), json.dumps(TEXT).encode()
    codes: list[int] = []
    with ready(served, max_body=4096) as it:

        def post() -> None:
            pieces = iter([body[:9], body[9:]])
            head = {"Content-Type": "application/json; charset=UTF-8"}
            with it.client() as client:
                response = client.post("/v1/completions", content=pieces, headers=head)
                codes.append(response.status_code)

        served.gate.clear()
        threads = [threading.Thread(target=post) for _ in range(HELD_BODIES + 2)]
        for count, thread in enumerate(threads, 1):
            thread.start()
            it.until(lambda count=count: it.server.bridge.under_way + len(codes) == count)
        served.gate.set()
        for thread in threads:
            thread.join()
    assert codes == [200] * len(threads)


def test_more_answers_than_there_is_ever_room_for() -> None:
    with ready(queue=1) as it, it.client() as client:
        refused(complete(client, n=fakes.BATCH + 2), 400)


# --- slow clients


def test_a_client_that_reads_nothing_is_left() -> None:
    ended = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        finally:
            ended.append(scope["path"])

    async def stuck(message: Any) -> None:
        await asyncio.Event().wait()

    async def visit() -> None:
        gate = Gate(application, Config(time_limit=0.01), lambda status: None)
        scope = {"type": "http", "method": "GET", "path": "/x", "headers": []}
        await asyncio.wait_for(gate(scope, asyncio.Event().wait, stuck), WAIT_S)

    asyncio.run(visit())
    assert ended == ["/x"]


def test_what_is_not_read_yet_has_no_room_for_others() -> None:
    with ready(queue=1) as it, it.client() as client:
        bridge = it.server.bridge

        async def submit() -> Call:
            call = Call([[asked()] for _ in range(fakes.BATCH + 1)])
            await bridge.submit(call)
            return call

        call = it.call(submit())
        it.idle()
        assert bridge.held == fakes.BATCH + 1
        refused(complete(client), 429)
        it.loop.call_soon_threadsafe(bridge.cancel, call)
        it.until(lambda: not bridge.held)
        assert complete(client).status_code == 200
        it.until(lambda: not bridge.held)


# --- ends


def test_a_stop_does_not_wait_for_a_model_that_loads() -> None:
    loaded, served = threading.Event(), FakeServed()

    def load() -> FakeServed:
        loaded.wait(WAIT_S)
        return served

    with running(load) as it:
        it.stop(WAIT_S)
        it.thread.join(WAIT_S)
        assert not it.thread.is_alive()
        assert it.server.bridge.loading
        loaded.set()
        it.until(lambda: served.closed)
    assert not it.server.bridge.loading


def test_who_comes_while_the_engine_fails_is_told() -> None:
    served, late = FakeServed(), []
    with ready(served) as it, it.client() as client:
        bridge = it.server.bridge
        refuse = bridge._refuse_all

        def refuse_then_see_another(problem: Any) -> None:
            refuse(problem)
            thread = threading.Thread(target=lambda: late.append(complete(client)))
            thread.start()
            it.until(lambda: bridge._inbox.qsize() == 1)

        bridge._refuse_all = refuse_then_see_another

        def fail() -> None:
            raise AssertionError("the books do not balance")

        served.engine.idle = fail
        with it.client() as other:
            assert complete(other).status_code == 200  # and then it is idle
        it.thread.join(WAIT_S)
        it.until(lambda: bool(late))
    assert "failed" in refused(late[0], 500)
    assert isinstance(bridge.failure, AssertionError)


@pytest.fixture
def signals() -> Iterator[None]:
    """Whatever happens, the process's own handlers are there again."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals")
def test_a_second_signal_ends_what_runs() -> None:
    """Signals come to the main thread alone, so that the server runs in it."""
    served, pause = FakeServed(), threading.Event()
    served.network.before = lambda: pause.wait(0.05)
    config = Config(port=0, temperature=0.0, grace=WAIT_S)
    metrics = ServerMetrics(NAME)
    bridge: Bridge[Any] = Bridge(lambda: served, Limits(9, WAIT_S), metrics, metrics.watch)
    server, answers = Server(config, (NAME,), bridge, metrics), []

    def visit(url: str) -> None:
        with httpx.Client(base_url=url, timeout=WAIT_S) as client:
            while client.get("/health").status_code != 200:
                pause.wait(0.01)
            asking = threading.Thread(
                target=lambda: answers.append(complete(client, max_tokens=90))
            )
            asking.start()
            while not served.network.runs:
                pause.wait(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
            while bridge.phase != "stopping":
                pause.wait(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
            asking.join(WAIT_S)

    visitors: list[threading.Thread] = []

    def listening(url: str) -> None:
        visitors.append(threading.Thread(target=visit, args=(url,)))
        visitors[0].start()

    asyncio.run(serve(server, listening))
    visitors[0].join(WAIT_S)
    assert "stopping" in refused(answers[0], 503)
    assert served.closed
