"""Open files for reading past the page cache, with a buffered fallback that is said aloud.

Direct reads (`O_DIRECT`) need offsets, lengths and addresses that are multiples of
`ALIGNMENT`. Where the system or the file system refuses them, `Reader.note` says so.
"""

import os
import threading
from pathlib import Path

from retinue.errors import ReadError

ALIGNMENT = 4096
O_DIRECT: int = getattr(os, "O_DIRECT", 0)  # Linux only


class Reader:
    """Positioned reads from any thread; files are opened at their first read and kept open.

    `note` is empty while reads are direct, and the reason once one had to be buffered.
    """

    def __init__(self, *, direct: bool = True) -> None:
        self._direct = direct and bool(O_DIRECT)
        self.note = "" if self._direct else "direct reads are not available on this system"
        self._lock = threading.Lock()
        self._handles: dict[tuple[Path, bool], int] = {}
        self._closed = False

    def read(self, file: Path, offset: int, into: memoryview, *, direct: bool) -> int:
        """Fill `into` from `file` at `offset`; fewer bytes only at the end of the file.

        Raises ReadError when the system reports an error.
        """
        direct = direct and self._direct
        done = 0
        try:
            while done < len(into):
                handle = self._handle(file, direct)
                got = _pread(handle, into[done:], offset + done)
                done += got
                # After a short read the rest may be unaligned: only the end of a file is short.
                if got == 0 or (direct and done % 512):
                    break
        except OSError as error:
            raise ReadError(
                f"cannot read `{file}` at byte {offset + done}: {error.strerror}",
                hint="check the disk and the file, then start again",
            ) from error
        return done

    def close(self) -> None:
        """Close every file. The caller makes sure that no read is running."""
        with self._lock:
            self._closed = True
            handles, self._handles = list(self._handles.values()), {}
        for handle in handles:
            os.close(handle)

    def _handle(self, file: Path, direct: bool) -> int:
        with self._lock:
            assert not self._closed, "read after close"
            key = (file, direct and self._direct)
            if key not in self._handles:
                self._handles[key] = self._open(file, key[1])
            return self._handles[key]

    def _open(self, file: Path, direct: bool) -> int:
        flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        if direct:
            try:
                return os.open(file, flags | O_DIRECT)
            except OSError as error:
                if isinstance(error, (FileNotFoundError, PermissionError)):
                    raise
                self._direct = False
                self.note = f"the file system of `{file.parent}` refuses direct reads"
        return os.open(file, flags)


if hasattr(os, "preadv"):

    def _pread(handle: int, into: memoryview, offset: int) -> int:
        return os.preadv(handle, [into], offset)

else:  # Windows: one file position per handle, so reads take turns
    _seek_lock = threading.Lock()

    def _pread(handle: int, into: memoryview, offset: int) -> int:
        with _seek_lock:
            os.lseek(handle, offset, os.SEEK_SET)
            data = os.read(handle, len(into))
        into[: len(data)] = data
        return len(data)
