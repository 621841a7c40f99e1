"""The page at `/`: one file that asks `/v1/state` and draws it. It loads nothing from elsewhere."""

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from fastapi import FastAPI, Response


def add_page(app: FastAPI) -> None:
    """Serve the page. It needs no key: without one it shows nothing and asks for it."""

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(html(), media_type="text/html", headers=HEADERS)


@cache
def html() -> bytes:
    """The file as it ships."""
    return files("retinue.server").joinpath("page.html").read_bytes()


def policy() -> str:
    """What the page may do: run its own script, with its own style, and ask this server."""
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hash(b'script')}",
            f"style-src {_hash(b'style')}",
            "img-src data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )


def _hash(tag: bytes) -> str:
    """The content of the page's one `tag`, as a source that a policy can name."""
    (content,) = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), html(), flags=re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'"


HEADERS = {
    "content-security-policy": policy(),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
