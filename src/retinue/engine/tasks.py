"""Task texts: JSON lines with a task, a prompt and how it goes on; as ids, cut to the context."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retinue.errors import UsageError

FORM = '`{"task": "...", "prompt": "...", "continuation": "..."}`, one object a line'


@dataclass(frozen=True, slots=True)
class TaskText:
    """One text of a task. Prompt and continuation are texts, or lists of token ids."""

    task: str
    prompt: str | list[int]
    continuation: str | list[int]


@dataclass(frozen=True, slots=True)
class TaskIds:
    """One text as ids; the last `scored` are the continuation; `cut` says it was longer."""

    task: str
    ids: list[int]
    scored: int
    cut: bool = False


def read_texts(file: Path, per_task: int | None = None) -> list[TaskText]:
    """The texts in `file` in its order, at most `per_task` of each task.

    Raises UsageError with the line number for a line that is none, and for a file without texts.
    """
    if per_task is not None and per_task < 1:
        raise UsageError(f"per-task is out of range: `{per_task}`", hint="1 or more")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read `{file}`: {error}", hint=f"write {FORM}") from error
    seen: Counter[str] = Counter()
    texts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        text = _text(line, f"{file}, line {number}")
        seen[text.task] += 1
        if per_task is None or seen[text.task] <= per_task:
            texts.append(text)
    if not texts:
        raise UsageError(f"no texts in `{file}`", hint=f"write {FORM}")
    return texts


def _text(line: str, where: str) -> TaskText:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{where}: not JSON: {error}", hint=f"write {FORM}") from error
    if not isinstance(row, dict):
        raise UsageError(f"{where}: not an object", hint=f"write {FORM}")
    task = row.get("task")
    if not isinstance(task, str) or not task:
        raise UsageError(f"{where}: `task` is not a name", hint=f"write {FORM}")
    for key in ("prompt", "continuation"):
        if not _is_text(row.get(key)):
            raise UsageError(f"{where}: `{key}` is missing, empty or no text", hint=f"write {FORM}")
    return TaskText(task, row["prompt"], row["continuation"])


def _is_text(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(type(item) is int for item in value)
    return isinstance(value, str) and bool(value)


def as_ids(
    texts: Sequence[TaskText], encode: Callable[[str, bool], list[int]], vocabulary: int
) -> list[TaskIds]:
    """The texts as ids. `encode(text, first)` adds special tokens only where `first`.

    Raises UsageError for ids that the model does not have and for texts without a token.
    """
    found = []
    for number, text in enumerate(texts, 1):
        prompt = text.prompt if isinstance(text.prompt, list) else encode(text.prompt, True)
        rest = text.continuation
        rest = rest if isinstance(rest, list) else encode(rest, False)
        wrong = [token for token in [*prompt, *rest] if not 0 <= token < vocabulary]
        if wrong:
            raise UsageError(
                f"text {number}: token id out of range: `{wrong[0]}`",
                hint=f"from 0 to {vocabulary - 1}",
            )
        if not prompt or not rest:
            raise UsageError(f"text {number} has a part without any token")
        found.append(TaskIds(text.task, [*prompt, *rest], len(rest)))
    return found


def cut_to(texts: Sequence[TaskIds], context: int) -> list[TaskIds]:
    """The texts without what is too long, taken from the left; at least one id is no target."""
    return [
        TaskIds(text.task, text.ids[-context:], min(text.scored, context - 1), cut=True)
        if len(text.ids) > context
        else text
        for text in texts
    ]
