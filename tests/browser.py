"""A headless Chromium, spoken to in WebDriver's plain HTTP by way of ChromeDriver."""

import base64
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
ARGUMENTS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--disable-dev-shm-usage",
)


class Browser:
    """One window. `script` runs JavaScript in the page, where `return` gives a value."""

    def __init__(self, client: httpx.Client, session: str) -> None:
        self._client, self._session = client, session

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """One WebDriver command."""
        answer = self._client.request(
            method, f"/session/{self._session}{path}", json=body if method == "POST" else None
        )
        value = answer.json()["value"]
        assert answer.status_code == 200, value
        return value

    def devtools(self, command: str, **parameters: Any) -> Any:
        """A command of the DevTools protocol."""
        body = {"cmd": command, "params": parameters}
        return self.call("POST", "/goog/cdp/execute", body)

    def open(self, url: str) -> None:
        """Load a page."""
        self.call("POST", "/url", {"url": url})

    def size(self, width: int, height: int, *, scale: float = 1) -> None:
        """The page's own size in CSS pixels."""
        self.devtools(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=False,
        )

    def media(self, **features: str) -> None:
        """What `@media (name: value)` sees, with _ for -."""
        pairs = [{"name": k.replace("_", "-"), "value": v} for k, v in features.items()]
        self.devtools("Emulation.setEmulatedMedia", features=pairs)

    def script(self, code: str, *arguments: Any) -> Any:
        """What `code` returns."""
        return self.call("POST", "/execute/sync", {"script": code, "args": list(arguments)})

    def text(self, name: str) -> str:
        """The text of the element with this id, as it is shown."""
        return str(self.script("return document.getElementById(arguments[0]).innerText", name))

    def until(self, ready: Callable[[], object], what: str, seconds: float = 20) -> None:
        """Wait for the page."""
        end = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < end, f"not in time: {what}"
            time.sleep(0.05)

    def complaints(self) -> list[str]:
        """What the console has said since this was asked last, warnings and worse."""
        return [row["message"] for row in self.call("POST", "/se/log", {"type": "browser"})]

    def screenshot(self, file: Path) -> None:
        """The whole page as a PNG."""
        shot = self.devtools("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser with an empty profile in `folder`."""
    assert CHROMIUM is not None
    assert DRIVER is not None
    command = [DRIVER, "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            options = {
                "binary": CHROMIUM,
                "args": [*ARGUMENTS, f"--user-data-dir={folder}"],
            }
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "WARNING"}}
            with httpx.Client(base_url=_address(process), timeout=60, trust_env=False) as client:
                body = {"capabilities": {"alwaysMatch": wanted}}
                answer = client.post("/session", json=body).json()["value"]
                session = answer["sessionId"]
                yield Browser(client, session)
                client.delete(f"/session/{session}")
        finally:
            process.terminate()


def _address(process: "subprocess.Popen[bytes]") -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(rb"started successfully on port (\d+)", line):
            return f"http://127.0.0.1:{int(found[1])}"
    raise AssertionError("chromedriver did not start")
