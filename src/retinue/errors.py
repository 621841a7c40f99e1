"""Every error that retinue raises for the user's world; each carries a hint that says what to do.

    RetinueError
    ├── UsageError            a value that the caller gave is not valid               exit 2
    ├── Refused               the work cannot be done here, and nothing was started   exit 3
    │   ├── DoesNotFit        more memory is needed than the budget holds
    │   ├── Unsupported       a format, family or option that is not served
    │   └── Overloaded        the queue is full, or the deadline would be missed: later
    ├── CheckpointError       the files are missing, damaged or lie about themselves  exit 1
    │   └── NotFinite         a weight, or what was computed from it, is NaN or infinite
    ├── DownloadError         the hub did not deliver, or there is no place for it    exit 1
    ├── ReadError             the disk did not deliver                                exit 1
    ├── WriteError            the disk did not take what was to be kept               exit 1
    ├── SelfCheckFailed       the fast path and the reference disagree                exit 1
    └── Cancelled             the request was cancelled while it ran                  exit 1

Broken invariants of our own are assertions, not errors of this tree.
"""


class RetinueError(Exception):
    """Base of the tree. `str(error)` is one line; `error.hint` says what to do, or is empty."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(RetinueError):
    """A value that the caller gave is not valid."""

    exit_code = 2


class Refused(RetinueError):
    """The work cannot be done here; it was refused before anything was loaded."""

    exit_code = 3


class DoesNotFit(Refused):
    """More memory is needed than the budget holds; `smallest_bytes` is the least that works."""

    def __init__(self, message: str, *, smallest_bytes: int, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.smallest_bytes = smallest_bytes


class Unsupported(Refused):
    """A format, family or option that is not served."""


class Overloaded(Refused):
    """A request would wait too long. `retry_after_s`: when it may be worth another try."""

    def __init__(self, message: str, *, retry_after_s: float, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class CheckpointError(RetinueError):
    """The checkpoint's files are missing, damaged or lie about themselves."""


class NotFinite(CheckpointError):
    """A weight, or what was computed from it, is NaN or infinite."""


class DownloadError(RetinueError):
    """The hub did not deliver, or what it delivered cannot be stored."""


class ReadError(RetinueError):
    """The disk did not deliver bytes that a running request needs."""


class WriteError(RetinueError):
    """The disk did not take what was to be kept; it may be full."""


class SelfCheckFailed(RetinueError):
    """The fast path and the reference path disagree at load."""


class Cancelled(RetinueError):
    """The request was cancelled while it ran."""
