"""The sample behind a server, and clients of every kind for a while; prints what became of them."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

from benchmarks.results import Document
from benchmarks.soak_library import Library, Lost

MODEL, MEMORY, QUEUE, CONTEXT = "sample", "900MiB", 40, 512
MOST_BODY = 1 << 16
KEPT_S = 2.0  # a connection that is idle for longer may be one that the server is about to end
PATIENCE_S = 120.0  # for one answer: who waits longer counts it as lost
TASKS = ("dialogue", "python_code", "english_prose", None)
DEADLINES = """
deadlines:
  dialogue: {first_token_s: 20, between_tokens_s: 5}
  python_code: {first_token_s: 2}
"""
MARKS = (0.25, 0.5, 1.0)  # of the time: when the server is weighed
Reply = tuple[int, bytes]


class Client:
    """What is right is asked through the `openai` client; what is not, by hand over plain streams.

    By hand it has one connection at a time, kept while the server keeps it.
    """

    def __init__(self, port: int, seed: int, seen: Counter[str]) -> None:
        self._port, self._random, self._seen = port, random.Random(seed), seen
        self._library = Library(port)
        self._used = 0.0  # when the connection was used last
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def run(self, until: float) -> None:
        """One request after the other."""
        kinds = [kind for kind, count in KINDS.items() for _ in range(count)]
        while time.monotonic() < until:
            outcome = await self.once(self._random.choice(kinds))
            if outcome.startswith("429"):
                await asyncio.sleep(self._random.uniform(0.2, 1.0))
        self.close()
        await self._library.close()

    async def once(self, kind: "Kind") -> str:
        """One request; returns and counts what came of it."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                outcome = await kind(self)
        except (Lost, EOFError, OSError, TimeoutError, ValueError) as error:
            outcome = f"LOST {type(error).__name__}: {error}"[:120]
            self.close()
        self._seen[f"{kind.__name__.strip('_')}: {outcome}"] += 1
        return outcome

    def close(self) -> None:
        """Leave, as a client does whose process ends."""
        if self._writer is not None:
            self._writer.transport.abort()
        self._reader = self._writer = None

    # --- kinds of requests; each says what came of it

    async def _whole(self) -> str:
        return await self._library.ask(self._body())

    async def _several(self) -> str:
        return await self._library.ask(self._body(n=2, logprobs=2, temperature=1.0))

    async def _chat(self) -> str:
        said = [{"role": "user", "content": self._text()}]
        tokens = self._random.randrange(1, 24)
        return await self._library.ask({"model": MODEL, "messages": said, "max_tokens": tokens})

    async def _stream(self) -> str:
        return await self._library.ask(self._body(stream=True))

    async def _leave_midway(self) -> str:
        """Leave after a few events."""
        body = self._body(stream=True, max_tokens=200)
        return await self._library.ask(body, leave_after=self._random.randrange(1, 12))

    async def _slow(self) -> str:
        """Read a stream late: the server must not wait for it."""
        await self._send(self._body(stream=True, max_tokens=200))
        await asyncio.sleep(self._random.uniform(0.5, 3.0))
        status, _ = await self._receive()
        return str(status)

    async def _leave(self) -> str:
        """Leave before the answer."""
        await self._send(self._body(stream=self._random.random() < 0.5, max_tokens=200))
        await asyncio.sleep(self._random.uniform(0.0, 1.0))
        self.close()
        return "left"

    async def _half(self) -> str:
        """Announce a body, send half of it, and leave."""
        await self._write(_head(1000) + b'{"model": "sa')
        await asyncio.sleep(self._random.uniform(0.0, 0.3))
        self.close()
        return "left"

    async def _malformed(self) -> str:
        bodies = (b"{", b"[]", b'{"model": 1}', b"\xff\xfe", b"null", b"[" * 900, b'"\\ud800"')
        await self._write_body(self._random.choice(bodies))
        return str((await self._receive())[0])

    async def _oversized(self) -> str:
        body = b" " * (MOST_BODY + 1)
        if self._random.random() < 0.5:
            await self._write_body(body)
        else:
            head = _head(None) + b"%x\r\n" % len(body)
            await self._write(head + body + b"\r\n0\r\n\r\n")
        return str((await self._receive())[0])

    async def _wrong(self) -> str:
        fields = ({"model": "x"}, {"n": 99}, {"tools": []}, {"prompt": ""}, {"max_tokens": 10**6})
        return await self._library.ask(self._body() | self._random.choice(fields))

    async def _look(self) -> str:
        path = self._random.choice(("/health", "/metrics", "/v1/experts", "/v1/state", "/nothing"))
        await self._write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        return str((await self._receive())[0])

    async def _nonsense(self) -> str:
        """What is no HTTP at all."""
        await self._write(b"\x16\x03\x01 hello\r\n\r\n")
        status, _ = await self._receive()
        self.close()
        return str(status)

    # --- HTTP

    def _text(self) -> str:
        return "A: Hello " + " ".join(self._random.choices(WORDS, k=self._random.randrange(1, 60)))

    def _body(self, **fields: object) -> dict[str, object]:
        body: dict[str, object] = {"model": MODEL, "prompt": self._text()}
        body["max_tokens"] = self._random.randrange(1, 24)
        task = self._random.choice((*TASKS, f"unheard-{self._random.randrange(10**6)}"))
        return body | {"task": task} | fields

    async def _send(self, body: object, path: str = "/v1/completions") -> None:
        await self._write_body(json.dumps(body).encode(), path)

    async def _write_body(self, body: bytes, path: str = "/v1/completions") -> None:
        await self._write(_head(len(body), path) + body)

    async def _write(self, data: bytes) -> None:
        if time.monotonic() - self._used > KEPT_S:
            self.close()
        self._used = time.monotonic()
        if self._writer is None or self._writer.is_closing():
            opened = await asyncio.open_connection("127.0.0.1", self._port)
            self._reader, self._writer = opened
        self._writer.write(data)
        await self._writer.drain()

    async def _receive(self) -> Reply:
        """The answer; a connection that the server ends is forgotten."""
        assert self._reader is not None
        try:
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            body = await self._rest(head)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise Lost(repr(error)[:60]) from error
        if "connection: close" in head:
            self.close()
        return int(head.split()[1]), body

    async def _rest(self, head: str) -> bytes:
        assert self._reader is not None
        length = head.partition("content-length:")[2].split()
        if length:
            return await self._reader.readexactly(int(length[0]))
        if "transfer-encoding: chunked" not in head:
            return await self._reader.read()
        found = b""
        while count := int(await self._reader.readline(), 16):
            found += await self._reader.readexactly(count)
            await self._reader.readline()
        await self._reader.readline()
        return found


WORDS = ("the", "a", "river", "stone", "went", "over", "house", "and", "light", "small", "words")
Kind = Callable[[Client], Awaitable[str]]
KINDS: dict[Kind, int] = {  # and how often each comes
    Client._whole: 6,
    Client._several: 3,
    Client._chat: 4,
    Client._stream: 6,
    Client._slow: 2,
    Client._leave: 3,
    Client._leave_midway: 3,
    Client._half: 2,
    Client._malformed: 2,
    Client._oversized: 1,
    Client._wrong: 2,
    Client._look: 2,
    Client._nonsense: 1,
}


def _head(length: int | None, path: str = "/v1/completions") -> bytes:
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    kind = "Content-Type: application/json; charset=utf-8"
    return f"POST {path} HTTP/1.1\r\nHost: x\r\n{kind}\r\n{size}\r\n\r\n".encode()


# --- the server


class Served:
    """The server's process, and what the kernel says of it."""

    def __init__(self, folder: Path, log: Path) -> None:
        config = folder / "soak.yaml"
        config.write_text(DEADLINES, encoding="utf-8")
        command = [sys.executable, "-m", "retinue", "serve", MODEL, "--port", "0", "--json"]
        command += ["--preset", "emoe-fetch", "--experts", "40%", "--memory", MEMORY]
        command += ["--context", str(CONTEXT), "--kv-tokens", str(8 * CONTEXT)]
        command += ["--queue", str(QUEUE), "--max-body", str(MOST_BODY), "--config", str(config)]
        with log.open("w") as errors:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors)
        assert self.process.stdout is not None
        self.port = int(json.loads(self.process.stdout.readline())["url"].rpartition(":")[2])
        self._clock = os.sysconf("SC_CLK_TCK")

    def weigh(self) -> Document:
        """Threads, open files, bytes and seconds of processor time, now."""
        folder = Path("/proc") / str(self.process.pid)
        lines = (folder / "status").read_text().splitlines()
        facts = dict(line.split(":", 1) for line in lines)
        times = (folder / "stat").read_text().rpartition(")")[2].split()
        return {
            "threads": int(facts["Threads"]),
            "files": sum(1 for _ in (folder / "fd").iterdir()),
            "resident_bytes": int(facts["VmRSS"].split()[0]) * 1024,
            "peak_bytes": int(facts["VmHWM"].split()[0]) * 1024,
            "processor_s": (int(times[11]) + int(times[12])) / self._clock,
        }

    def stop(self) -> int:
        """End it as an operator does; returns its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


async def ask(port: int, path: str) -> Document:
    """One of the server's own views."""
    client = Client(port, 0, Counter())
    await client._write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    status, body = await client._receive()
    client.close()
    return {"http": status} | json.loads(body)


async def soak(served: Served, clients: int, seconds: float) -> Document:
    """All clients for a while, and how the server is meanwhile and afterwards."""
    while (await ask(served.port, "/health"))["http"] != 200:
        await asyncio.sleep(0.2)
    seen: Counter[str] = Counter()
    began = time.monotonic()
    until = began + seconds
    weights = [served.weigh()]
    crowd = [Client(served.port, seed, seen).run(until) for seed in range(1, clients + 1)]
    crowded = asyncio.gather(*crowd)
    for mark in MARKS:
        await asyncio.sleep(max(0.0, began + mark * seconds - time.monotonic()))
        weights.append(served.weigh())
    await crowded
    answered_s = time.monotonic() - began
    state = await ask(served.port, "/v1/state")
    while (state["running"] or state["waiting"]) and time.monotonic() < began + answered_s + 30:
        await asyncio.sleep(0.1)
        state = await ask(served.port, "/v1/state")
    idle_s = time.monotonic() - began - answered_s
    weights.append(served.weigh())
    return {
        "seconds": answered_s,
        "idle_after_s": idle_s,
        "outcomes": dict(sorted(seen.items())),
        "weights": weights,
        "running": state["running"],
        "waiting": state["waiting"],
        "kv_used": state["kv_used"],
        "tasks": state["tasks"],
        "budget_bytes": state["memory"]["budget_bytes"],
        "health": (await ask(served.port, "/health"))["http"],
    }


def main() -> None:
    """Serve, soak, stop; the last line is JSON."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--clients", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="retinue-soak-") as folder:
        log = Path(folder, "log")
        served = Served(Path(folder), log)
        try:
            found = asyncio.run(soak(served, options.clients, options.seconds))
            found["exit_code"] = served.stop()
        finally:
            served.process.kill()
            served.process.wait()
        found["log"] = log.read_text(encoding="utf-8").splitlines()[-20:]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
