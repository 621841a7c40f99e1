"""`retinue rm`: free what a model takes in the hub's cache, or what retinue keeps for itself."""

import sys
from argparse import Namespace
from collections.abc import Callable
from difflib import get_close_matches

from retinue.cli.list import OWN
from retinue.cli.terminal import audience, emit_json
from retinue.config import format_size
from retinue.errors import UsageError
from retinue.memory.headers import headers_root
from retinue.memory.hub_cache import Repository, cached, delete, remove, used_bytes
from retinue.memory.machine import cache_folder


def execute(options: Namespace) -> int:
    """Delete after asking; returns 0, or 1 if the answer was no."""
    size, act = _target(options.name)
    if not options.yes and not _agreed(options.name, size):
        print("nothing was deleted", file=sys.stderr)
        return 1
    act()
    print(f"freed {size} bytes ({format_size(size)})", file=audience(options.json))
    if options.json:
        emit_json({"name": options.name, "freed_bytes": size})
    return 0


def _target(name: str) -> tuple[int, Callable[[], None]]:
    """The bytes that `name` takes, and what deletes it. Raises UsageError if there is none."""
    if name == OWN:
        folder = cache_folder()
        return used_bytes(folder), lambda: delete(folder) if folder.exists() else None
    known = {model.name: model for model in cached()}
    if name not in known:
        raise _unknown(name, [*known, OWN])
    headers = headers_root() / Repository(name).folder_name

    def act() -> None:
        remove(name)
        if headers.exists():
            delete(headers)

    return known[name].bytes + used_bytes(headers), act


def _unknown(name: str, known: list[str]) -> UsageError:
    whole = name.partition("@")[0]
    if whole != name and whole in known:
        hint = f"`retinue rm {whole}` deletes every revision"
    else:
        near = get_close_matches(name, known, n=1)
        hint = (f"did you mean `{near[0]}`? " if near else "") + f"known: {', '.join(known)}"
    return UsageError(f"not in the cache: `{name}`", hint=hint)


def _agreed(name: str, size: int) -> bool:
    if sys.stdin is None or not sys.stdin.isatty():
        raise UsageError(
            f"deleting `{name}` needs a yes", hint="use --yes where nobody can be asked"
        )
    print(f"delete `{name}`, {format_size(size)}? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
