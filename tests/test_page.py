"""The page at `/` in a headless browser, against a server that says what a test wants to see."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

import models
from browser import CHROMIUM, DRIVER, Browser, browser
from retinue.config import Config
from retinue.server.activity import Activity
from retinue.server.page import HEADERS, add_page, html
from retinue.server.served import Served
from serving import NAME, running

needs_browser = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="there is no chromium with its chromedriver here"
)
COUNTERS = dict.fromkeys(("passes", "tokens", "hits", "pending", "misses"), 0)
COUNTERS |= {"routed_weight": 0.0, "degraded_weight": 0.0}


def state(*rows: str, **changes: Any) -> dict[str, Any]:
    """What `/v1/state` says of a model whose layers are `rows`."""
    parts = {"fixed": 3 << 20, "kv": 1 << 20, "workspace": 1 << 20, "experts": 2 << 20}
    memory = {"budget_bytes": 8 << 20, "resident_bytes": 6 << 20, "peak_bytes": 7 << 20}
    found: dict[str, Any] = {
        "model": "tiny",
        "preset": "popular",
        "exact": False,
        "at_s": 1.0,
        "memory": memory | {"parts": parts},
        "running": 0,
        "waiting": 0,
        "tasks": [],
        "phases": {"prefill": COUNTERS, "decode": COUNTERS},
        "experts": [{"layer": number, "map": row} for number, row in enumerate(rows)],
    }
    return found | changes


def task(name: str | None, **changes: int | float) -> dict[str, Any]:
    found: dict[str, Any] = dict.fromkeys(("running", "waiting", "answered"), 0)
    found |= dict.fromkeys(
        ("refused", "cancelled", "failed", "deadlines_met", "deadlines_missed"), 0
    )
    return {"task": name, "routed_weight": 0.0, "degraded_share": 0.0} | found | changes


class Stub:
    """Serves the page as it is, and `say` for `/v1/state`."""

    def __init__(self) -> None:
        self.say: tuple[int, Any] = (200, state("0" * 8, "1" * 8))
        self.key: str | None = None
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, body, headers = 200, html(), HEADERS | {"content-type": "text/html"}
                if self.path != "/":
                    status, content = stub.say
                    if stub.key and self.headers["authorization"] != f"Bearer {stub.key}":
                        status, content = 401, {"error": {"code": "invalid_api_key"}}
                    body, headers = json.dumps(content).encode(), {}
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@contextmanager
def served() -> Iterator[Stub]:
    stub = Stub()
    try:
        yield stub
    finally:
        stub.close()


@pytest.fixture
def stub() -> Iterator[Stub]:
    with served() as stub:
        yield stub


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.fixture
def page(window: Browser, stub: Stub) -> Browser:
    window.size(1180, 800)
    window.media()
    window.complaints()
    window.open(stub.url)
    window.until(lambda: window.text("status") == "ready", "the first state")
    return window


def drawn(page: Browser) -> str:
    """The map's pixels."""
    return str(page.script("return document.getElementById('map').toDataURL()"))


def cells(page: Browser) -> list[str]:
    """The marks of the first layer, without their colours: which pixels each covers."""
    return list(
        page.script(
            """const pen = document.getElementById('map').getContext('2d');
            const scale = devicePixelRatio, side = shape.side * scale;
            return Array.from(state.experts[0].map, (_, i) => {
              const x = (shape.label * scale) + i * side;
              const data = pen.getImageData(x, shape.top * scale, side - scale, side - scale).data;
              return data.filter((_, n) => n % 4 === 3).map((a) => a > 100 ? 1 : 0).join('');
            });"""
        )
    )


@needs_browser
def test_nothing_is_wrong_and_nothing_comes_from_elsewhere(page: Browser, stub: Stub) -> None:
    assert page.complaints() == []
    loaded = page.script("return performance.getEntriesByType('resource').map((e) => e.name)")
    assert set(loaded) == {f"{stub.url}v1/state"}


@needs_browser
def test_what_happens_is_seen(page: Browser, stub: Stub) -> None:
    before = drawn(page)
    decode = COUNTERS | {"tokens": 50, "passes": 9, "hits": 6, "misses": 2}
    decode |= {"routed_weight": 8.0, "degraded_weight": 2.0}
    tasks = [
        task("sql", running=2, deadlines_met=3, deadlines_missed=1),
        task(None, answered=7, refused=2),
    ]
    stub.say = 200, state(
        *("01234444", "11111111"), at_s=3.0, running=2, waiting=5, tasks=tasks,
        phases={"prefill": COUNTERS, "decode": decode},
    )  # fmt: skip
    page.until(lambda: page.text("status") == "serving", "the next state")
    assert drawn(page) != before
    assert page.text("decode") == "25.0"  # 50 tokens in 2 seconds
    assert page.text("hits") == "75 %"
    assert page.text("degraded") == "25 %"
    assert (page.text("resident"), page.text("total")) == ("11", "16")
    assert (page.text("running"), page.text("waiting")) == ("2", "5")
    rows = [" ".join(row.split()) for row in page.text("tasks").splitlines()]
    assert rows == ["sql 2 0 0 3 of 4 \u2013", "unknown 0 0 7, 2 refused none due \u2013"]
    assert "6.00 MiB held now" in page.text("held")
    assert page.text("part-left") == "1.00 MiB"


@needs_browser
@pytest.mark.parametrize("colours", ["none", "active"])
def test_each_state_has_a_shape_of_its_own(page: Browser, stub: Stub, colours: str) -> None:
    page.media(forced_colors=colours)
    stub.say = 200, state("012345-", "1111111", model="shapes")
    page.until(lambda: page.text("model").startswith("shapes"), "the next state")
    marks = cells(page)
    assert len(set(marks)) == 7
    assert set(marks[6]) == {"0"}  # there is no such expert
    inks = page.script("return new Set(Object.values(colours())).size")
    assert (inks <= 3) == (colours == "active")


@needs_browser
def test_the_same_as_a_table(page: Browser, stub: Stub) -> None:
    page.script("document.querySelector('details').open = true")
    stub.say = 200, state("00112222", "34444555")
    page.until(lambda: "3" in page.text("layers"), "the table")
    rows = [row.split() for row in page.text("layers").splitlines()]
    assert rows == [["0", "2", "2", "4", "0", "0", "0"], ["1", "0", "0", "0", "1", "3", "4"]]
    heads = page.script("return [...document.querySelectorAll('#kinds th')].map((e) => e.scope)")
    assert heads == ["col"] * 7


@needs_browser
@pytest.mark.parametrize(("layers", "experts"), [(8, 32), (48, 128)])
def test_no_width_is_too_small(page: Browser, stub: Stub, layers: int, experts: int) -> None:
    page.size(360, 740)
    long = task("a_task_with_quite_a_long_name", running=100, waiting=100, deadlines_met=1234)
    stub.say = 200, state(*["0123" * (experts // 4)] * layers, tasks=[long], model="m" * 80)
    page.until(lambda: page.text("total") == str(layers * experts), "the next state")
    assert page.script("return document.documentElement.scrollWidth <= innerWidth")
    assert page.script("return shape.label + shape.across * shape.side <= shape.width")
    assert page.script("return shape.side >= 6")


@needs_browser
def test_it_says_when_the_server_loads_stops_and_is_gone(window: Browser) -> None:
    with served() as stub:
        stub.say = 503, {"error": {"code": "loading"}}
        window.open(stub.url)
        window.until(lambda: window.text("status") == "the model is loading", "loading")
        stub.say = 200, state("01", "10")
        window.until(lambda: window.text("status") == "ready", "ready")
        stub.say = 503, {"error": {"code": "stopping"}}
        window.until(lambda: window.text("status") == "the server is stopping", "stopping")
        assert window.script("return document.getElementById('all').className") == "stale"
    window.until(lambda: "the server is gone" in window.text("status"), "gone")
    assert window.text("total") == "4"  # what was said last stays


@needs_browser
def test_a_key_is_asked_for_once_and_kept_in_the_tab(window: Browser, stub: Stub) -> None:
    stub.key = "secret"
    window.open(stub.url)
    window.until(lambda: window.text("status") == "locked", "the question")
    enter = """document.getElementById('key').value = arguments[0];
        document.querySelector('form').requestSubmit()"""
    window.script(enter, "wrong")
    window.until(lambda: window.text("wrong"), "the answer to a wrong key")
    window.script(enter, "secret")
    window.until(lambda: window.text("status") == "ready", "the first state")
    assert "secret" not in window.script("return document.documentElement.outerHTML")
    window.open(stub.url)
    window.until(lambda: window.text("status") == "ready", "the state, unasked")
    window.script("sessionStorage.clear()")


@needs_browser
def test_a_request_is_seen_on_the_map(window: Browser, olmoe: Path) -> None:
    config = Config(memory=models.MEMORY, context=64, experts="50%", preset="on-demand")
    with running(lambda: Served(olmoe, config, 0)) as it:
        it.until(lambda: it.server.bridge.phase == "ready")
        window.complaints()
        window.open(f"{it.url}/")
        window.until(lambda: window.text("status") == "ready", "the first state")
        before = drawn(window)
        with it.client() as client:
            body = {"model": NAME, "prompt": models.prompt_of(20), "max_tokens": 4}
            assert client.post("/v1/completions", json=body).status_code == 200
        window.until(lambda: drawn(window) != before, "another map")
        assert window.text("resident") == "16"
        assert "2" in window.script("return state.experts.map((layer) => layer.map).join('')")
        assert window.text("tasks").split()[0] == "unknown"
        assert window.complaints() == []


# --- without a browser


def test_the_page_is_served_with_its_policy() -> None:
    app = FastAPI()
    add_page(app)
    answer = TestClient(app).get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    rules = dict(
        rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; ")
    )
    assert rules["default-src"] == "'none'"
    assert rules["connect-src"] == "'self'"
    assert rules["script-src"].startswith("'sha256-")
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert b"http://" not in html().replace(b"http://www.w3.org/2000/svg", b"")
    assert b"https://" not in html()


@pytest.mark.parametrize(("exact", "absent"), [(False, "4"), (True, "5")])
def test_what_an_expert_was(exact: bool, absent: str) -> None:
    now = [10.0]
    there = np.array([[True] * 5, [True, True, True, False, False]])
    activity = Activity(there, exact, lambda: now[0])
    resident = np.array([[False, True, True, True, False]] * 2)
    used, missed = np.full((2, 5), -1), np.full((2, 5), -1)
    assert activity.rows(resident, used, missed, 0) == ["01110", "011--"]
    now[0], used[:, 2], missed[:, 3:] = 10.1, 1, 1
    used[:, 3] = 1
    assert activity.rows(resident, used, missed, 1) == [f"0123{absent}", "012--"]
    now[0] = 10.3  # the pass was a moment ago
    assert activity.rows(resident, used, missed, 2) == [f"0123{absent}", "012--"]
    now[0], used[:, 1] = 10.4, 3
    assert activity.rows(resident, used, missed, 3) == ["02110", "021--"]
