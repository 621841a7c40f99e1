"""What `reproduce` and `compare` share: texts as ids, names of what was measured, files written."""

import json
import logging
import shlex
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from retinue.cli.measure import encoder
from retinue.cli.terminal import note
from retinue.config import Config
from retinue.engine.tasks import TaskIds, as_ids, cut_to, read_texts
from retinue.errors import UsageError
from retinue.lab.setting import machine, today, versions
from retinue.memory.home import sample_tasks
from retinue.memory.whole_file import write_whole
from retinue.types import Facts


def texts_for(
    options: Namespace, config: Config, facts: Facts, folder: Path, *, per_task: int, answer: int
) -> tuple[Config, list[TaskIds]]:
    """The texts as ids, and a configuration whose context holds them and `answer` tokens more.

    Raises UsageError for data that is none, and for a context without room.
    """
    texts = read_texts(_data(options), per_task)
    ids = as_ids(texts, encoder(folder, texts), facts.vocab_size)
    if config.context is None:
        longest = max(len(text.ids) for text in ids) + answer
        config = replace(config, context=min(longest, facts.max_context, config.chunk))
    room = min(config.context or facts.max_context, config.chunk) - answer
    if room < 2:
        raise UsageError(
            f"a context of {config.context} has no room for answers of {answer} tokens",
            hint="use a larger `--context`",
        )
    ids = cut_to(ids, room)
    if cut := sum(text.cut for text in ids):
        note(f"note: {cut} of {len(ids)} texts are cut from the left to {room} tokens", "yellow")
    return config, ids


@contextmanager
def said_once() -> Iterator[None]:
    """Within, what models warn of is said once, however many are opened one after the other."""
    logger, said = logging.getLogger("retinue"), set[str]()

    def is_new(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        known = text in said
        said.add(text)
        return not known

    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)


def unusual(config: Config, names: Sequence[str]) -> dict[str, Any]:
    """Settings that measurements depend on; None where nobody changed the default."""
    usual = Config()
    given = {name: getattr(config, name) for name in names}
    return {name: None if value == getattr(usual, name) else value for name, value in given.items()}


def digest(content: Any) -> str:
    """A short name for what is JSON-shaped."""
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def digest_of_texts(texts: Sequence[TaskIds]) -> str:
    """A short name for texts."""
    return digest([[each.task, each.ids, each.scored] for each in texts])


def described(
    options: Namespace, facts: Facts, texts: Sequence[TaskIds], **more: Any
) -> dict[str, Any]:
    """Where and with what something was measured, for people; `more` comes in the middle."""
    tasks = len({text.task for text in texts})
    shape = f"{facts.moe_layers} layers of {facts.experts_per_layer} experts, top {facts.top_k}"
    scored = sum(text.scored for text in texts)
    source = f"{tasks} tasks from {_data(options).name}"
    return {
        "model": f"{options.model} ({facts.family}, {shape})",
        "texts": f"{len(texts)} of {source}, {scored} scored tokens",
        **more,
        "machine": machine(),
        "versions": versions(),
        "date": today(),
        "command": shlex.join(["retinue", *sys.argv[1:]]),
    }


def write_files(folder: Path, files: Mapping[str, str]) -> None:
    """Write each text under its name. Raises WriteError where that is not possible."""
    for name, text in files.items():
        write_whole(folder / name, text.encode())


def _data(options: Namespace) -> Path:
    return Path(options.data) if options.data else sample_tasks()
