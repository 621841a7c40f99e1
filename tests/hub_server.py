"""A hub of our own: the part of its HTTP interface that huggingface_hub asks for, on this machine.

It serves the folders below `root/ORG/NAME`, counts what it is asked, and can misbehave: refuse,
demand a token, cut a transfer, or send wrong bytes.
"""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c" * 40


@dataclass
class Hub:
    """The server's state. `asked` holds (method, path, Range header) of every request."""

    root: Path
    commit: str = COMMIT
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    tokens: list[str | None] = field(default_factory=list)
    gated: bool = False
    private: bool = False
    status: int = 0
    reason: str = ""
    cut_after: dict[str, int] = field(default_factory=dict)
    pause_at: dict[str, int] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)
    ranges: bool = True
    url: str = ""

    def fetched(self) -> set[str]:
        """Names of the files whose bytes were asked for."""
        gets = [path for method, path, _ in self.asked if method == "GET"]
        return {path.rpartition("/")[2] for path in gets if "/resolve/" in path}

    def forget(self) -> None:
        self.asked.clear()
        self.sent.clear()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path, self.headers.get("Range", "")))
        token = self.headers.get("Authorization")
        self.hub.tokens.append(token)
        if self.hub.status:
            return self._refuse(self.hub.status, "", self.hub.reason)
        if self.hub.private and token is None:
            return self._refuse(401, "RepoNotFound")
        if self.hub.gated and token is None and "/resolve/" in path:
            return self._refuse(401, "GatedRepo")
        if self.hub.gated and token is None:
            return self._refuse(403, "GatedRepo")
        if path.startswith("/api/models/"):
            return self._api(path.removeprefix("/api/models/"))
        return self._resolve(path.strip("/"))

    def _api(self, rest: str) -> None:
        name, _, revision = rest.partition("/revision/")
        folder = self.hub.root / name
        if not folder.is_dir():
            return self._refuse(404, "RepoNotFound")
        if revision not in ("", "main", self.hub.commit):
            return self._refuse(404, "RevisionNotFound")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        siblings = [_listed(path, str(path.relative_to(folder))) for path in files]
        document = {"id": name, "sha": self.hub.commit, "siblings": siblings, "tags": []}
        return self._send(json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _resolve(self, path: str) -> None:
        name, _, rest = path.partition("/resolve/")
        _, _, file_name = rest.partition("/")
        file = self.hub.root / name / file_name
        if not file.is_file():
            return self._refuse(404, "EntryNotFound")
        content = file.read_bytes()
        digest = _digest(file)
        if file_name in self.hub.damaged:
            content = bytes(len(content))
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": self.hub.commit}
        headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        start, stop = _range(self.headers.get("Range", ""), len(content))
        if not self.hub.ranges or not self.headers.get("Range"):
            return self._send(content, headers, name=file_name)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return self._send(content[start:stop], headers, 206, file_name)

    def _send(
        self, content: bytes, headers: dict[str, str], status: int = 200, name: str = ""
    ) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if (limit := self.hub.cut_after.pop(name, None)) is not None:
            content = content[:limit]
            self.close_connection = True
        if (limit := self.hub.pause_at.pop(name, None)) is not None:
            self.wfile.write(content[:limit])
            self.hub.sent[name] = limit
            time.sleep(3)  # for whoever interrupts the client
            content = content[limit:]
        self.hub.sent[name] = self.hub.sent.get(name, 0) + len(content)
        with suppress(OSError):  # the client has left
            self.wfile.write(content)

    def _refuse(self, status: int, code: str, reason: str = "") -> None:
        self.send_response(status)
        for key, value in (("X-Error-Code", code), ("X-Error-Message", reason or code)):
            if value:
                self.send_header(key, value)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _listed(file: Path, name: str) -> dict[str, Any]:
    """A file as the hub lists it: weights in large storage, the rest in git."""
    found: dict[str, Any] = {"rfilename": name, "size": file.stat().st_size}
    found["blobId"] = _git_digest(file)
    if file.suffix == ".safetensors":
        found["lfs"] = {"sha256": _digest(file), "size": file.stat().st_size, "pointerSize": 130}
    return found


def _digest(file: Path) -> str:
    if file.suffix == ".safetensors":
        return hashlib.sha256(file.read_bytes()).hexdigest()
    return _git_digest(file)


def _git_digest(file: Path) -> str:
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _range(header: str, size: int) -> tuple[int, int]:
    first, _, last = header.removeprefix("bytes=").partition("-")
    return int(first or 0), min(size, int(last) + 1 if last else size)


@contextmanager
def serving(root: Path) -> Iterator[Hub]:
    """A running server."""
    hub = Hub(root)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
