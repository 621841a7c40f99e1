"""One chat as it runs: the model, the settings, what was said, and how a turn is taken."""

import signal
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from retinue.cli.conversation import Conversation, fit
from retinue.cli.interrupts import cancel_on
from retinue.cli.terminal import fail, note
from retinue.engine.llm import LLM
from retinue.engine.template import THINKING, Rendered, render
from retinue.errors import RetinueError, UsageError
from retinue.types import Output, SamplingParams

END_OF_THINKING = "</think>"
SETTINGS = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("max_new_tokens", "seed", "stop"),
)
_WHOLE = ("top_k", "max_new_tokens", "seed")
# When the context is full, this much of it is made free at once: each time that the beginning
# changes, all that follows has to be computed again.
_KEPT_SHARE = 0.75


@dataclass(slots=True)
class Session:
    """The state of a chat. The commands change it."""

    llm: LLM
    params: SamplingParams
    conversation: Conversation = field(default_factory=Conversation)
    speed: bool = False
    thinking: bool = True
    last: Output | None = None
    leaving: bool = False
    system_moved: bool = False

    def say(self, text: str) -> bool:
        """Ask `text` and print the answer. Both join the conversation, or neither: then False."""
        before = self.conversation.copy()
        self.conversation.ask(text)
        try:
            rendered = self._rendered()
            output = self._print_answer(rendered)
        except RetinueError as error:
            self.conversation = before
            fail(str(error), error.hint)
            return False
        said = output.text.strip() if output else ""
        if output is None or not (said or output.finish_reason != "cancelled"):
            self.conversation = before
            note("(stopped before the first word: the question is forgotten)")
            return False
        # The template has opened the thoughts itself; in the history they must not stand open.
        self.conversation.answer(f"{THINKING}\n{said}" if rendered.thinking else said)
        self.last = output
        _remark(output)
        if self.speed:
            note(speed(output))
        return True

    def retry(self) -> None:
        """Ask the last question again. The answer that was there goes only if another comes."""
        before = self.conversation.copy()
        question = self.conversation.undo()
        if question is None:
            raise UsageError("nothing was asked yet")
        if self.params.temperature == 0:
            note("(at temperature 0 the answer is the same again: `/set temperature 0.7`)")
        if not self.say(question):
            self.conversation = before

    def set(self, name: str, value: str) -> None:
        """Change a sampling setting. Raises UsageError for an unknown name or a wrong value."""
        name = name.replace("-", "_")
        if name not in SETTINGS:
            raise UsageError(f"unknown setting: `{name}`", hint=f"known: {', '.join(SETTINGS)}")
        self.params = replace(self.params, **{name: _value(name, value)})

    def settings(self) -> dict[str, Any]:
        """The sampling settings, as JSON takes them."""
        found = {name: getattr(self.params, name) for name in SETTINGS}
        return found | {"stop": list(self.params.stop)}

    def restore(self, settings: dict[str, Any]) -> None:
        """Take over settings that were saved. Raises UsageError for those that cannot be."""
        known = {name: _saved(name, settings[name]) for name in SETTINGS if name in settings}
        self.params = replace(self.params, **known)

    def _rendered(self) -> Rendered:
        """The conversation as ids, without the turns that no longer fit."""
        conversation = self.conversation

        def render_all() -> Rendered:
            return render(self.llm.tokenizer, conversation.system, conversation.shown())

        limits = self.llm.assembly.engine.limits
        answer = min(self.params.max_new_tokens, limits.context // 4)
        longest, kept = limits.context - answer, int(limits.context * _KEPT_SHARE) - answer
        what = f"the context of {limits.context} tokens is full"
        if limits.whole_prompts and limits.chunk < longest:
            longest, kept = limits.chunk, min(kept, int(limits.chunk * _KEPT_SHARE))
            what = f"a prompt of this family has {limits.chunk} tokens at most (`--chunk`)"
        rendered = render_all()
        if len(rendered.ids) > longest:
            rendered, dropped = fit(conversation, render_all, kept)
            if dropped and len(rendered.ids) <= longest + answer:  # else it is refused anyway
                turns = "turn is" if dropped == 1 else f"{dropped} turns are"
                note(f"({what}: the oldest {turns} left out)", "yellow")
        if rendered.system_moved and not self.system_moved:
            note("(this model knows no system prompt: it stands before the first question)")
        self.system_moved = rendered.system_moved
        return rendered

    def _print_answer(self, rendered: Rendered) -> Output | None:
        """Stream the answer to stdout; what was said so far, if ctrl-C stopped it."""
        output: Output | None = None
        shown = Thoughts(rendered.thinking) if not self.thinking else None
        try:
            with cancel_on(self.llm.cancel, signal.SIGINT) as came:
                for output in self._stream(rendered, came):
                    text = shown.without(output.delta) if shown else output.delta
                    print(text, end="", flush=True)
            print(shown.rest() if shown else "", end="")
        finally:
            print(flush=True)
        return output

    def _stream(self, rendered: Rendered, came: list[int]) -> Iterator[Output]:
        if not came:  # ctrl-C may come before there is anything to cancel
            yield from self.llm.stream(rendered.ids, self.params, reuse=True)


class Thoughts:
    """Keeps what stands between `<think>` and `</think>` off the screen, piece by piece."""

    def __init__(self, inside: bool) -> None:
        self._inside, self._held = inside, ""

    def without(self, delta: str) -> str:
        """The part of `delta` that is to be shown; part of a mark is held back."""
        text, shown = self._held + delta, ""
        while text:
            mark = END_OF_THINKING if self._inside else THINKING
            before, found, after = text.partition(mark)
            if not found:
                break
            shown += "" if self._inside else before
            self._inside, text = not self._inside, after.lstrip() if self._inside else after
        mark = END_OF_THINKING if self._inside else THINKING
        keep = next((n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n])), 0)
        self._held = text[len(text) - keep :]
        return shown + ("" if self._inside else text[: len(text) - keep])

    def rest(self) -> str:
        """What was held back and is no mark after all."""
        held, self._held = self._held, ""
        return "" if self._inside else held


def speed(output: Output) -> str:
    """How fast an answer came, in one line."""
    stats = output.stats
    return (
        f"({len(output.token_ids)} tokens, {stats.decode_tokens_per_s:.1f} tokens/s,"
        f" first after {stats.ttft_s:.2f} s)"
    )


def _remark(output: Output) -> None:
    if output.finish_reason == "cancelled":
        note("(stopped)")
    elif output.finish_reason == "length":
        note("(the answer was cut: --max-new-tokens or --context is reached)")


def _value(name: str, text: str) -> Any:
    """`text` as the setting's own type."""
    try:
        if name == "stop":
            return (text,) if text not in ("", "off") else ()
        if name == "seed" and text in ("", "off"):
            return None
        return int(text) if name in _WHOLE else float(text)
    except ValueError as error:
        raise UsageError(f"{name} has the wrong type: `{text}`", hint="a number") from error


def _saved(name: str, value: Any) -> Any:
    """A setting from a file: JSON has types, but anyone may have written it."""
    if name == "stop" and isinstance(value, list):
        return tuple(str(text) for text in value)
    return _value(name, "" if value is None else str(value))
