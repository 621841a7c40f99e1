"""What `eval` and `profile` share: task texts, a model that is large enough for them, a bar."""

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from signal import SIGINT, SIGTERM, Signals
from threading import Event
from typing import Any

from retinue.cli.interrupts import cancel_on
from retinue.cli.terminal import bar as bar
from retinue.cli.terminal import note
from retinue.config import Config
from retinue.engine.assembly import Assembly, assemble
from retinue.engine.reserve import reserve
from retinue.engine.tasks import TaskIds, TaskText, as_ids, cut_to, read_texts
from retinue.errors import Cancelled, UsageError
from retinue.memory.home import locate, sample_tasks
from retinue.model.load import load_tokenizer
from retinue.model.survey import survey


@contextmanager
def measured(
    options: Namespace, config: Config, beside: int = 0
) -> Iterator[tuple[Assembly, list[TaskIds]]]:
    """The loaded model and the texts of `--data` as ids, none longer than the context.

    beside: bytes of the budget that the caller needs for itself. A signal raises Cancelled out of
    what runs within. Raises UsageError for data that is none.
    """
    data = Path(options.data) if options.data else sample_tasks()
    texts = read_texts(data, options.per_task)
    folder = locate(options.model, note)
    facts = survey(folder, config.precision)
    ids = as_ids(texts, encoder(folder, texts), facts.vocab_size)
    if config.context is None:
        longest = max(len(text.ids) for text in ids)
        config = replace(config, context=min(longest, facts.max_context, config.chunk))
    assembly = assemble(reserve(folder, config, beside))
    try:
        for text in assembly.notes:
            note(f"note: {text}", "yellow")
        # One pass a text: what a chunk has room for.
        limit = max(2, min(assembly.split.context, assembly.split.chunk))
        ids = cut_to(ids, limit)
        if cut := sum(text.cut for text in ids):
            note(
                f"note: {cut} of {len(ids)} texts are cut from the left to {limit} tokens", "yellow"
            )
        stop = Event()
        assembly.host.stop = stop.is_set
        with cancel_on(stop.set, SIGINT, SIGTERM) as came:
            try:
                yield assembly, ids
            except Cancelled as error:
                raise Cancelled(f"stopped by {Signals(came[0]).name}, nothing is kept") from error
    finally:
        assembly.close()


def output(out: str, *, folder: bool = False) -> Path:
    """The file, or `folder`, that `--out` names: seen before the work whether it can be one.

    Raises UsageError where another kind of thing is there, or above it.
    """
    place = Path(os.path.expanduser(out))  # noqa: PTH111  pathlib raises for `~nobody`
    if place.exists() and place.is_dir() != folder:
        is_there = "a file" if folder else "a folder"
        raise UsageError(f"`{out}` is {is_there}", hint="name another place with `--out`")
    above = next(each for each in (place, *place.absolute().parents) if each.exists())
    if not os.access(above, os.W_OK) or (above != place and not above.is_dir()):
        raise UsageError(
            f"nothing can be written at `{out}`, since `{above}` does not allow it",
            hint="name another place with `--out`",
        )
    return place


@contextmanager
def byte_bar() -> Iterator[Callable[[int, int], Any]]:
    """A progress bar over bytes on stderr; yields what is told of new ones, and of all.

    It appears with the first of them: what is refused before has none.
    """
    from tqdm import tqdm

    settings = {"unit": "B", "unit_scale": True, "unit_divisor": 1024, "dynamic_ncols": True}
    with ExitStack() as stack:
        shown: list[Any] = []

        def advance(count: int, whole: int) -> None:
            if not shown:
                bar = tqdm(total=whole, file=sys.stderr, **settings)
                shown.append(stack.enter_context(bar))
            shown[0].update(count)

        yield advance


def encoder(folder: Path, texts: list[TaskText]) -> Callable[[str, bool], list[int]]:
    """What turns texts into ids: the tokenizer in `folder`; its own tokens only where asked for.

    Raises UsageError where there is none and `texts` are not ids already.
    """
    tokenizer = load_tokenizer(folder)
    words = any(
        isinstance(part, str) for text in texts for part in (text.prompt, text.continuation)
    )
    if tokenizer is None and words:
        raise UsageError(
            "the checkpoint has no tokenizer",
            hint="give prompts and continuations as lists of token ids",
        )

    def encode(text: str, first: bool) -> list[int]:
        assert tokenizer is not None
        return list(tokenizer(text, add_special_tokens=first)["input_ids"])

    return encode
