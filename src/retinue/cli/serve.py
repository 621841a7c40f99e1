"""`retinue serve`: an HTTP server in the OpenAI form."""

import logging
import os
import sys
from argparse import Namespace
from pathlib import Path

from retinue.cli.options import config_from
from retinue.cli.terminal import emit_json, note
from retinue.config import DEFAULT_BATCH, Config, format_size
from retinue.memory.home import locate
from retinue.server.run import make_server, run_server
from retinue.server.served import Served

LOCAL = ("127.0.0.1", "::1", "localhost")


def execute(options: Namespace) -> int:
    """Serve until a signal; returns the exit code."""
    config = config_from(options, temperature=1.0, batch=DEFAULT_BATCH, learn=True)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("retinue").setLevel(logging.INFO)
    folder = locate(options.model, note)
    names = _names(options.model, folder, config)
    _remark_on_keys(config)

    def listening(address: str) -> None:
        note(f"listening at {address}, loading {names[0]}")
        if options.json:
            emit_json({"url": address, "model": names[0]})

    loading = run_server(make_server(folder, names, config, _remark_on_model), listening)
    note("stopped")
    if loading:
        sys.stdout.flush()
        os._exit(0)  # Python would wait for the thread that loads
    return 0


def _names(model: str, folder: Path, config: Config) -> tuple[str, ...]:
    """What clients may call the model: the first is what it calls itself."""
    found = [config.served_name, model, folder.name]
    return tuple(dict.fromkeys(name for name in found if name))


def _remark_on_keys(config: Config) -> None:
    if config.api_key or config.keys:
        return
    if config.host in LOCAL:
        note("note: any key passes, since no --api-key is given", "yellow")
    else:
        note(
            f"warning: whoever reaches {config.host} may use this server: give an --api-key", "red"
        )


def _remark_on_model(served: Served) -> None:
    assembly = served.assembly
    for text in assembly.notes:
        note(f"note: {text}", "yellow")
    split, preset = assembly.split, assembly.preset
    exact = "exact" if preset.exact else "approximate"
    note(
        f"{assembly.facts.name}: preset {preset.name} ({exact}), room for {split.slots} of"
        f" {assembly.facts.total_experts} experts in {format_size(split.budget)},"
        f" {split.context} tokens of context, loaded in {assembly.load_s:.1f} s"
    )
