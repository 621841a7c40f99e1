"""What a person sees: notes on stderr, tables, colours on a terminal only. stdout is data."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from retinue.config import format_size
from retinue.types import Output

_CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}


def styled(text: str, style: str, stream: TextIO | None = None) -> str:
    """`text` in a colour, where `stream` (stderr) is a terminal that wants colours."""
    stream = stream or sys.stderr
    if not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{_CODES[style]}m{text}\x1b[0m"


def audience(json: bool) -> TextIO:
    """Where the findings of a verb go, for a person: stdout, unless that is for JSON."""
    return sys.stderr if json else sys.stdout


def note(text: str, style: str = "dim") -> None:
    """One line for a person, on stderr."""
    print(styled(text, style), file=sys.stderr, flush=True)


def fail(message: str, hint: str = "") -> None:
    """An error and what to do about it, on stderr."""
    print(f"{styled('error:', 'red')} {message}", file=sys.stderr)
    if hint:
        print(f"\n{styled('hint:', 'cyan')} {hint}", file=sys.stderr)


def emit_json(document: dict[str, Any]) -> None:
    """The one JSON document of `--json`: the last line of stdout."""
    print(json.dumps(document, ensure_ascii=False), flush=True)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as their contents; numbers to the right."""
    cells = [list(header), *[[str(cell) for cell in row] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    numeric = [all(_is_number(line[i]) for line in cells[1:]) for i in range(len(header))]
    lines = []
    for line in cells:
        parts = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


@contextmanager
def bar(total: int, unit: str = "text") -> Iterator[Callable[[], Any]]:
    """A progress bar on stderr; yields what advances it by one."""
    from tqdm import tqdm

    with tqdm(total=total, unit=unit, dynamic_ncols=True, file=sys.stderr) as shown:
        yield lambda: shown.update()


def summary(output: Output) -> str:
    """What an answer cost, in one line."""
    stats = output.stats
    degraded = f", {stats.degraded_share:.1%} degraded" if stats.degraded_share else ""
    return (
        f"{len(output.token_ids)} tokens, {stats.decode_tokens_per_s:.1f} tokens/s, first after"
        f" {stats.ttft_s:.2f} s, hit rate {stats.hit_rate:.0%},"
        f" {format_size(stats.bytes_read_per_token)} read a token,"
        f" peak {format_size(stats.peak_rss_bytes)} of {format_size(stats.budget_bytes)}{degraded}"
    )


def _is_number(text: str) -> bool:
    return text[:1].isdigit() or text[:1] in "-+."
