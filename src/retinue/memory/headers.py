"""A repository of the hub without its weights: what `plan` needs, read in ranges of a few bytes.

The folder that is made looks like a checkpoint to everyone who reads headers: each weight file has
its true header and its true size, and a hole where the weights would be, which takes no disk.
"""

import os
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp

from retinue.errors import DownloadError, Refused
from retinue.memory import hub_cache
from retinue.memory.hub import (
    INDEX,
    TEXT_FILES,
    Remote,
    Say,
    address,
    ask,
    fall_back,
    is_offline,
    weight_names,
)
from retinue.memory.hub_cache import Repository
from retinue.memory.hub_errors import explained
from retinue.memory.machine import cache_folder

_FIRST_BYTES = 1 << 17  # most headers are shorter: one request a file
_MAX_HEADER_BYTES = 100_000_000
_AT_ONCE = 8
_NEEDED = TEXT_FILES & {"config.json", "generation_config.json", INDEX}


def headers_root() -> Path:
    """Where the folders without weights are kept; they can be made again at any time."""
    return cache_folder() / "headers"


def is_stand_in(folder: Path) -> bool:
    """Whether `folder` was made here, and has headers but no weights."""
    return folder.is_relative_to(headers_root())


def fetch_headers(repository: Repository, say: Say) -> Path:
    """A folder with configuration and headers of `repository`: its own, if it is in the cache.

    Raises what `hub.fetch` raises, but nothing is too large for it.
    """
    here = hub_cache.find(repository)
    if here is not None and (repository.fixed or is_offline()):
        return here
    try:
        remote = ask(repository)
        if here is not None and here.name == remote.commit:
            return here
        return _stand_in(remote)
    except (DownloadError, Refused) as error:
        copy = fall_back(repository, here, error)
        say(f"{error}; using the copy of {copy.name[:12]} that is here")
        return copy


def _stand_in(remote: Remote) -> Path:
    folder = headers_root() / remote.repository.folder_name / "snapshots" / remote.commit
    if hub_cache.is_complete(folder):
        return folder
    with explained(remote.repository):
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(mkdtemp(dir=folder.parent))
        try:
            _fill(remote, draft)
            with suppress(FileExistsError):  # another process was quicker
                draft.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return folder


def _fill(remote: Remote, folder: Path) -> None:
    for name in sorted(_NEEDED & remote.files.keys()):
        (folder / name).write_bytes(_read(remote, name, 0, remote.files[name].size))
    names = weight_names(remote, folder)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(lambda name: _write_header(remote, folder, name), names))


def _write_header(remote: Remote, folder: Path, name: str) -> None:
    size = remote.files[name].size
    start = _read(remote, name, 0, min(size, _FIRST_BYTES))
    length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
    stop = 8 + length
    # A length that cannot be is left to whoever checks headers: it is in the file.
    if len(start) < stop <= min(size, _MAX_HEADER_BYTES):
        start += _read(remote, name, len(start), stop)
    with (folder / name).open("wb") as file:
        file.write(start[:stop])
        os.truncate(file.fileno(), size)


def _read(remote: Remote, name: str, start: int, stop: int) -> bytes:
    """Bytes `[start, stop)` of a file of the hub; no more are fetched."""
    from huggingface_hub.utils import hf_raise_for_status, http_stream_backoff

    url, headers = address(remote, name)
    headers["Range"] = f"bytes={start}-{stop - 1}"
    found = bytearray()
    with http_stream_backoff("GET", url, headers=headers, timeout=30) as response:
        hf_raise_for_status(response)
        # A server that knows no ranges sends the file from its beginning.
        skip = start if response.status_code == 200 else 0
        for piece in response.iter_bytes():
            found += piece
            if len(found) >= skip + stop - start:
                break
    wanted = bytes(found[skip : skip + stop - start])
    if len(wanted) != stop - start:
        raise DownloadError(
            f"`{name}` of `{remote.repository}` ended early", hint="run the same command again"
        )
    return wanted
