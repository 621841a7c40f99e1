"""Open files for reading past the page cache, with a buffered fallback that is said aloud.

Direct reads (`O_DIRECT`) need offsets, lengths and addresses that are multiples of
`ALIGNMENT`. Where the system or the file system refuses them, `Reader.note` says so.
"""

import errno
import os
import threading
from contextlib import suppress
from pathlib import Path

from retinue.errors import ReadError

ALIGNMENT = 4096
O_DIRECT: int = getattr(os, "O_DIRECT", 0)  # Linux only
_NO_DIRECT_READS = (errno.EINVAL, errno.ENOTSUP)


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
        try:
            if direct and self._direct:
                try:
                    return self._fill(file, offset, into, direct=True)
                except OSError as error:
                    if error.errno not in _NO_DIRECT_READS:
                        raise
                    self._direct = False
                    self.note = f"the file system of `{file.parent}` refuses direct reads"
            return self._fill(file, offset, into, direct=False)
        except OSError as error:
            raise ReadError(
                f"cannot read `{file}` at byte {offset}: {error.strerror}",
                hint="check the disk and the file, then start again",
            ) from error

    def expect(self, file: Path, offset: int, count: int) -> None:
        """Tell the system that a buffered read of so many bytes comes; it may begin with it."""
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):  # nobody depends on it
                handle = self._handle(file, direct=False)
                os.posix_fadvise(handle, offset, count, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close every file. The caller makes sure that no read is running."""
        with self._lock:
            self._closed = True
            handles, self._handles = list(self._handles.values()), {}
        for handle in handles:
            os.close(handle)

    def _fill(self, file: Path, offset: int, into: memoryview, *, direct: bool) -> int:
        handle, done = self._handle(file, direct=direct), 0
        while done < len(into):
            got = _pread(handle, into[done:], offset + done)
            done += got
            # Only the end of a file is short, and what follows it would not be aligned.
            if got == 0 or (direct and done % 512):
                break
        return done

    def _handle(self, file: Path, *, direct: bool) -> int:
        with self._lock:
            assert not self._closed, "read after close"
            key = (file, direct)
            if key not in self._handles:
                flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
                self._handles[key] = os.open(file, flags | (O_DIRECT if direct else 0))
            return self._handles[key]


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
