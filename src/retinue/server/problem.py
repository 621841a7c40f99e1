"""What went wrong, in the shape that clients of OpenAI's interface read. Knows no HTTP library."""

import math
from typing import Any

from retinue.errors import Overloaded, Refused, RetinueError, UsageError

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    429: "rate_limit_error",
}
STOPPING = "the server is stopping"


class Problem(Exception):
    """Ends a request with `status`. `param` names the field that is to blame."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(_sendable(message))
        self.status, self.code = status, code
        self.param = None if param is None else _sendable(param)
        self.retry_after_s = retry_after_s

    def as_dict(self) -> dict[str, Any]:
        """The body of the answer."""
        fallback = "server_error" if self.status >= 500 else KINDS[400]
        return {
            "error": {
                "message": str(self),
                "type": KINDS.get(self.status, fallback),
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        """What belongs into the head of the answer."""
        found = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        if self.retry_after_s is not None:
            found["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        return found


def _sendable(text: str) -> str:
    r"""`text` without half surrogate pairs, which JSON can bring (`"\ud800"`) and UTF-8 not."""
    return text.encode("utf-8", "backslashreplace").decode()


def problem_of(error: BaseException, *, param: str | None = None) -> Problem:
    """What a client is told about `error`: what it may know of it."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, RetinueError):
        text = f"{error}; {error.hint}" if error.hint else str(error)
        if isinstance(error, UsageError):
            return Problem(400, text, param=param)
        if isinstance(error, Overloaded):
            return Problem(429, text, code="overloaded", retry_after_s=error.retry_after_s)
        if isinstance(error, Refused):
            return Problem(400, text, code="refused")
        return Problem(500, text, code=type(error).__name__)
    return Problem(500, "the server failed; its log says why", code="internal_error")
