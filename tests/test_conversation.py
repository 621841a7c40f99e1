"""Conversations: rendering under templates of every temper, files, and contexts that are full."""

import json
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from retinue.cli.conversation import Conversation, fit, load, save
from retinue.engine.template import Rendered, render
from retinue.errors import CheckpointError, RetinueError, UsageError

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
)
DROPS_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)
TRIMS_SYSTEM = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}"
THINKS = PLAIN + "<think>\n"


class Characters:
    """A tokenizer whose tokens are characters."""

    def __init__(self, template: str | None) -> None:
        self.chat_template = template

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        assert options == {"tokenize": False, "add_generation_prompt": True}

        def refuse(text: str) -> None:
            raise TemplateError(text)

        template = ImmutableSandboxedEnvironment().from_string(str(self.chat_template))
        return template.render(messages=messages, raise_exception=refuse)

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [ord(character) for character in text]
        return {"input_ids": [0, *ids] if add_special_tokens else ids}


def rendered(template: str | None, system: str, *texts: str) -> tuple[str, Rendered]:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    found = render(Characters(template), system, messages)
    return "".join(map(chr, found.ids)), found


def test_a_system_prompt_under_a_template_that_takes_it() -> None:
    text, found = rendered(PLAIN, "Be kind.", "Hello", "Hi", "And?")
    assert text == "<system>Be kind.<user>Hello<assistant>Hi<user>And?<assistant>"
    assert not found.system_moved


@pytest.mark.parametrize("template", [NO_SYSTEM, DROPS_SYSTEM])
def test_a_system_prompt_under_a_template_that_does_not(template: str) -> None:
    text, found = rendered(template, "Be kind.", "Hello", "Hi", "And?")
    assert text.startswith("<user>Be kind.\n\nHello<assistant>Hi<user>And?")
    assert "system" not in text
    assert found.system_moved
    assert not rendered(template, "", "Hello")[1].system_moved


def test_a_system_prompt_whose_ends_the_template_trims() -> None:
    text, found = rendered(TRIMS_SYSTEM, "Be kind. \n", "Hello")
    assert (text, found.system_moved) == ("<system>Be kind.<user>Hello", False)


def test_without_a_template() -> None:
    assert rendered(None, "Be kind.", "Hello")[0] == "\0Be kind.\nHello\n"
    assert rendered(None, "", "Hello", "Hi", "And?")[0] == "\0Hello\nHi\nAnd?\n"


def test_a_template_that_opens_the_thoughts() -> None:
    assert rendered(THINKS, "", "Hello")[1].thinking
    assert not rendered(PLAIN, "", "Hello")[1].thinking


@pytest.mark.parametrize("system", ["", "Be kind."])
def test_a_template_that_fails(system: str) -> None:
    with pytest.raises(CheckpointError, match="no roles") as caught:
        rendered("{{ raise_exception('no roles') }}", system, "Hello")
    assert caught.value.hint


# --- turns


def talk(*texts: str, system: str = "") -> Conversation:
    found = Conversation(system)
    for index, text in enumerate(texts):
        (found.answer if index % 2 else found.ask)(text)
    return found


def test_undo() -> None:
    conversation = talk("a", "b", "c", "d")
    assert conversation.undo() == "c"
    assert [m["content"] for m in conversation.messages] == ["a", "b"]
    assert conversation.undo() == "a"
    assert conversation.undo() is None
    assert conversation.shown() == []


def test_clear_keeps_the_system_prompt() -> None:
    conversation = talk("a", "b", system="s")
    conversation.left_out = 2
    conversation.clear()
    assert (conversation.system, conversation.messages, conversation.left_out) == ("s", [], 0)


@pytest.mark.parametrize(
    ("room", "shown", "dropped"),
    [(99, "aabbccdde", 0), (8, "ccdde", 1), (5, "ccdde", 1), (4, "e", 2), (0, "e", 2)],
)
def test_the_oldest_turns_leave(room: int, shown: str, dropped: int) -> None:
    conversation = talk("aa", "bb", "cc", "dd", "e")

    def render_all() -> Rendered:
        text = "".join(m["content"] for m in conversation.shown())
        return Rendered([ord(character) for character in text])

    found, count = fit(conversation, render_all, room)
    assert ("".join(map(chr, found.ids)), count) == (shown, dropped)
    # They are not forgotten: a file has them all.
    assert len(conversation.messages) == 5
    conversation.answer("f")
    conversation.undo()
    assert len(conversation.messages) == 4


# --- files


def test_save_and_load(tmp_path: Path) -> None:
    conversation, file = (
        talk("Grüße\n", "b\\n \u2028 \U0001f600", system="s"),
        tmp_path / "a b.json",
    )
    conversation.left_out = 2
    save(file, conversation, {"temperature": 0.5})
    found, settings = load(file)
    assert (found.system, found.messages) == (conversation.system, conversation.messages)
    assert settings == {"temperature": 0.5}
    assert [path.name for path in tmp_path.iterdir()] == ["a b.json"]


def test_save_does_not_overwrite_unasked(tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    file.write_text("precious")
    with pytest.raises(UsageError, match="exists") as caught:
        save(file, talk("a", "b"), {})
    assert f"/save! {file}" in caught.value.hint
    assert file.read_text() == "precious"
    save(file, talk("a", "b"), {}, overwrite=True)
    assert load(file)[0].messages == talk("a", "b").messages


@pytest.mark.parametrize("name", ["", "nowhere/chat.json", "file/chat.json", "n" * 300])
def test_save_where_it_cannot_be(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError) as caught:
        save(tmp_path / name, talk("a", "b"), {}, overwrite=True)
    assert caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_half_a_character_is_saved(tmp_path: Path) -> None:
    save(tmp_path / "chat.json", talk("\udce4", "b"), {})
    assert load(tmp_path / "chat.json")[0].messages[0]["content"] == "?"


GOOD: dict[str, Any] = {"format": "retinue-chat", "version": 1, "system": "", "messages": []}
ASKED = {"role": "user", "content": "a"}
ANSWERED = {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "not JSON"),
        ("[]", "does not say"),
        (json.dumps(GOOD | {"format": "other"}), "does not say"),
        (json.dumps(GOOD | {"version": 2}), "version is 2"),
        (json.dumps(GOOD | {"system": 1}), "damaged"),
        (json.dumps(GOOD | {"settings": []}), "damaged"),
        (json.dumps(GOOD | {"messages": None}), "damaged"),
        (json.dumps(GOOD | {"messages": [{"role": "tool", "content": ""}]}), "damaged"),
        (json.dumps(GOOD | {"messages": [{"role": "user"}]}), "damaged"),
        (json.dumps(GOOD | {"messages": [ASKED, ASKED]}), "take turns"),
        (json.dumps(GOOD | {"messages": [ASKED]}), "begin with a question"),
        (json.dumps(GOOD | {"messages": [ANSWERED]}), "begin with a question"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_load_of_what_is_no_chat(tmp_path: Path, content: str, why: str) -> None:
    file = tmp_path / "chat.json"
    file.write_text(content)
    with pytest.raises(UsageError, match=why):
        load(file)


def test_load_of_what_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(RetinueError, match="cannot read"):
            load(path)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not JSON"):
        load(tmp_path / "bytes")
