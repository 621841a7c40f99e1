"""Writes a file whole or not at all: what was there stays until the new one is complete."""

from contextlib import suppress
from pathlib import Path

from retinue.errors import WriteError


def write_whole(file: Path, content: bytes, what: str = "") -> None:
    """Put `content` into `file`, in a folder that is made if need be; `what` is for the error.

    Raises WriteError where that is not possible, and leaves nothing behind.
    """
    draft = file.with_name(f".{file.name}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(content)
        draft.replace(file)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        raise WriteError(
            f"cannot write {what}{' ' * bool(what)}`{file}`: {error}",
            hint="make room there, or name another place",
        ) from error
