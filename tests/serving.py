"""A server on a thread of its own, around the counting network of `fakes` or a real model."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np

import fakes
from retinue.config import Config
from retinue.engine.request import Request
from retinue.metrics import Metrics
from retinue.server.activity import Activity
from retinue.server.app import Server
from retinue.server.bridge import Bridge
from retinue.server.call import Limits
from retinue.server.metrics import ServerMetrics
from retinue.server.run import serve
from retinue.server.served import draw

NAME = "counter"
CONTEXT = 96
CHAT = {"model": NAME, "messages": [{"role": "user", "content": "!"}], "max_tokens": 4}
TEXT = {"model": NAME, "prompt": "AB", "max_tokens": 3}
TASKS = ("chat", "inferred", "routed", "keyed", "headed", "said", "slow")
NEVER = np.full((1, 4), -1)
WAIT_S = 60.0  # for what has to happen; never reached


class Characters:
    """A tokenizer whose token n is the character chr(n + 32); others wrap around."""

    chat_template = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [(ord(letter) - 32) % fakes.VOCABULARY for letter in text]}

    def decode(self, ids: list[int], *, skip_special_tokens: bool = False) -> str:
        return "".join(chr(token + 32) for token in ids)


class FakeServed:
    """What the server needs of a model. `gate` has to be open for a pass to run."""

    def __init__(self, **fields: Any) -> None:
        self.engine, self.network = fakes.make(blocks=100, **({"context": CONTEXT} | fields))
        self.tokenizer, self.loaded_at = Characters(), 1
        self.tasks = frozenset(TASKS)
        self.gate = threading.Event()
        self.gate.set()
        self.network.before = lambda: self.gate.wait(WAIT_S)
        self.closed, self.inferred = False, None
        facts = SimpleNamespace(name=NAME, total_experts=4)
        preset = SimpleNamespace(name="auto", exact=True)
        parts = dict.fromkeys(("budget", "fixed", "kv", "workspace", "experts"), 1)
        self.assembly = SimpleNamespace(
            facts=facts,
            preset=preset,
            split=SimpleNamespace(**parts),
            metrics=Metrics(),
            engine=self.engine,
            cache=SimpleNamespace(
                slot_of=np.array([[0, -1, 1, -1]]),
                last_used=NEVER,
                step=0,
                reads=SimpleNamespace(counts={"decode": np.zeros((1, 2), dtype=np.int64)}),
            ),
            host=SimpleNamespace(last_missed=NEVER),
            residents=None,
        )
        self._activity = Activity(np.ones((1, 4), dtype=bool), exact=True)
        self.picture = draw(self.assembly, self._activity)

    def task_of(self, prompt: Any, ids: list[int], task: str | None) -> str | None:
        return task or self.inferred

    def stepped(self, moved: list[Request]) -> None:
        self.picture = draw(self.assembly, self._activity)

    def close(self) -> None:
        self.closed = True


@dataclass(slots=True)
class Running:
    """A server that runs; `stop` is what a signal does."""

    url: str
    server: Server
    loop: asyncio.AbstractEventLoop
    thread: threading.Thread

    def stop(self, grace_s: float = 0.0) -> None:
        self.call(self.server.bridge.drain(grace_s))

    def call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(WAIT_S)

    @property
    def left(self) -> int:
        """Requests under way whose client has left."""
        return sum(request.cancelled.is_set() for request in list(self.server.bridge._seats))

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=WAIT_S)

    def until(self, true: Callable[[], bool]) -> None:
        """Wait until something holds; fails if it never does."""
        paused = threading.Event()
        for _ in range(int(WAIT_S / 0.005)):
            if true():
                return
            paused.wait(0.005)
        raise AssertionError("it never came to that")

    def idle(self) -> None:
        """Wait until the books show that nothing is under way."""
        self.until(lambda: not self.server.bridge.under_way)


@contextmanager
def running(load: Callable[[], Any], **fields: Any) -> Iterator[Running]:
    """A server of what `load` gives, from its socket on; it is stopped at the end."""
    config = Config(**({"port": 0, "temperature": 0.0, "batch": fakes.BATCH} | fields))
    metrics = ServerMetrics(NAME)
    limits = Limits(config.queue + fakes.BATCH, config.time_limit)
    bridge: Bridge[Any] = Bridge(load, limits, metrics, metrics.watch)
    server = Server(config, (NAME, "alias"), bridge, metrics)
    listening, found = threading.Event(), []

    def tell(url: str) -> None:
        found.extend([url, asyncio.get_running_loop()])
        listening.set()

    thread = threading.Thread(target=lambda: asyncio.run(serve(server, tell)))
    thread.start()
    try:
        assert listening.wait(WAIT_S)
        yield (it := Running(found[0], server, found[1], thread))
    finally:
        if thread.is_alive():
            it.stop()
        thread.join(WAIT_S)
        assert not thread.is_alive()


@contextmanager
def ready(served: FakeServed | None = None, **fields: Any) -> Iterator[Running]:
    """A server whose model is loaded."""
    served = served or FakeServed()
    with running(lambda: served, **fields) as it:
        it.until(lambda: it.server.bridge.phase == "ready")
        yield it


def complete(client: httpx.Client, **fields: Any) -> httpx.Response:
    return client.post("/v1/completions", json=TEXT | fields)


def refused(response: httpx.Response, status: int, param: str | None = None) -> str:
    """The message of a refusal in OpenAI's shape."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    return str(error["message"])


def events(response: httpx.Response) -> list[Any]:
    """What a stream said; `[DONE]` as a text."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    data = [line.removeprefix("data: ") for line in lines]
    return [item if item == "[DONE]" else json.loads(item) for item in data]
