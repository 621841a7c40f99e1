"""Runs a server until a signal: uvicorn around the application, the engine beside it."""

import asyncio
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from retinue.config import DEFAULT_BATCH, Config, parse_size
from retinue.server.app import Server, create_app
from retinue.server.bridge import Bridge
from retinue.server.call import Limits
from retinue.server.gate import HELD_BODIES
from retinue.server.metrics import ServerMetrics
from retinue.server.served import Served

log = logging.getLogger("retinue.server")

# Measured (40 MiB, see docs/LOG.md): what FastAPI, uvicorn and the Prometheus client take when
# imported, with 64 streams at once, without the bodies that are read.
SERVER_BYTES = 48 << 20


def server_bytes(config: Config) -> int:
    """What the server takes of the budget, beside the engine."""
    return SERVER_BYTES + HELD_BODIES * parse_size(config.max_body)


def make_server(
    model: str | Path, names: tuple[str, ...], config: Config, ready: Callable[[Served], None]
) -> Server:
    """A server of `model` under `config`, not started yet. `ready` is told when it is loaded."""
    metrics = ServerMetrics(names[0])

    def load() -> Served:
        return Served(model, config, server_bytes(config))

    def loaded(served: Served) -> None:
        metrics.watch(served)
        ready(served)

    limits = Limits(config.queue + (config.batch or DEFAULT_BATCH), config.time_limit)
    return Server(config, names, Bridge(load, limits, metrics, loaded), metrics)


def run_server(server: Server, listening: Callable[[str], None]) -> bool:
    """Serve until a signal comes. `listening` is told the address, before the model is loaded.

    The first SIGINT or SIGTERM refuses what waits and lets what runs end within `grace`; a second
    one ends it at once. Raises what made loading fail. Returns whether it still loads, which
    nothing but the end of the process can stop.
    """
    asyncio.run(serve(server, listening))
    if server.bridge.failure is not None:
        raise server.bridge.failure
    return server.bridge.loading


async def serve(server: Server, listening: Callable[[str], None]) -> None:
    """The same within a loop. Signals are only seen in the main thread."""
    config, bridge = server.config, server.bridge
    http = _Http(
        uvicorn.Config(
            create_app(server),
            host=config.host,
            port=config.port,
            http=_Connection,
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            log_level="error",  # what clients do wrong they are told, the log is not
            server_header=False,
            timeout_graceful_shutdown=5,
        )
    )
    bridge.start()
    with _on_signals(lambda: _stop(server, http)):
        serving = asyncio.create_task(http.serve())
        while not (http.started or serving.done()):
            await asyncio.sleep(0.01)
        if http.started:
            listening(http.address)
        ended = asyncio.create_task(bridge.ended.wait())
        await asyncio.wait({serving, ended}, return_when=asyncio.FIRST_COMPLETED)
        http.should_exit = True
        await serving
        bridge.leave()
        await ended
    server.texts.shutdown()


class _Connection(H11Protocol):
    """What cannot be read any more is answered where there is still room for an answer."""

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP; behind or within another answer nothing can be said of it."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()


class _Http(uvicorn.Server):
    """uvicorn without signal handlers of its own."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Ours are there already."""
        yield

    @property
    def address(self) -> str:
        """Where it listens."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _stop(server: Server, http: uvicorn.Server) -> None:
    """The first signal drains, each further one ends it."""
    bridge = server.bridge
    if bridge.phase in ("stopping", "failed"):
        http.force_exit = True
        bridge.leave()
        return
    log.info("stopping: %d answers are under way", bridge.under_way)
    task = asyncio.ensure_future(bridge.drain(server.config.grace))
    task.add_done_callback(lambda done: done.exception())


@contextmanager
def _on_signals(stop: Callable[[], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    main = threading.current_thread() is threading.main_thread()
    signals = (signal.SIGINT, signal.SIGTERM) if main else ()
    for number in signals:
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
