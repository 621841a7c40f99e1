"""Token ids to text: characters over several ids, stop strings, what is held back."""

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retinue.engine.text import TextStream
from retinue.memory.home import sample_folder
from retinue.model.load import load_tokenizer


class Bytes:
    """One id a byte; 256 is a special token, which shows as nothing."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return bytes(token for token in ids if token < 256).decode(errors="replace")


class Words:
    """Ids are words; the first of a text has no space before it, as in SentencePiece."""

    words = ("the", "cat", "sat")

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return " ".join(self.words[token] for token in ids)


def pieces(text: str, *stop: str) -> list[str]:
    """What is shown after each byte of `text`, and at the end."""
    stream = TextStream(Bytes(), stop)
    shown = []
    for token in text.encode():
        shown.append(stream.push(token))
        if stream.stopped:
            break
    shown.append(stream.finish())
    assert "".join(shown) == stream.text
    return shown


def test_text_comes_as_it_grows() -> None:
    assert pieces("cat") == ["c", "a", "t", ""]


def test_a_character_waits_for_its_last_byte() -> None:
    assert pieces("aß€😀") == ["a", "", "ß", "", "", "€", "", "", "", "😀", ""]


def test_words_keep_the_spaces_between_them() -> None:
    stream = TextStream(Words(), ())
    assert [stream.push(token) for token in (0, 1, 2, 2)] == ["the", " cat", " sat", " sat"]
    assert stream.text == "the cat sat sat"


def test_an_unfinished_character_is_shown_at_the_end() -> None:
    stream = TextStream(Bytes(), ())
    assert [stream.push(token) for token in "a€".encode()[:3]] == ["a", "", ""]
    assert stream.finish() == "\ufffd"
    assert stream.text == "a\ufffd"


def test_a_broken_byte_in_the_middle_is_shown() -> None:
    stream = TextStream(Bytes(), ())
    shown = [stream.push(token) for token in b"a\xffb"]
    assert "".join(shown) == stream.text == "a\ufffdb"


def test_special_tokens_show_as_nothing() -> None:
    stream = TextStream(Bytes(), ())
    assert [stream.push(token) for token in (97, 256, 98)] == ["a", "", "b"]


def test_the_stop_string_is_no_part_of_the_text() -> None:
    assert pieces("one END two", "END")[-2:] == ["", ""]
    assert "".join(pieces("one END two", "END")) == "one "


def test_a_stop_string_may_span_pieces_and_follow_a_false_start() -> None:
    """After `EN` came another `E`: the first one is shown, the second one waits."""
    assert pieces("aENEND", "END") == ["a", "", "", "EN", "", "", ""]


def test_what_might_become_a_stop_string_is_held_back_until_it_cannot() -> None:
    assert pieces("aEx", "END") == ["a", "", "Ex", ""]
    assert pieces("aEN", "END") == ["a", "", "", "EN"]


def test_the_first_of_several_stop_strings_ends_the_text() -> None:
    class Chunks:
        def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
            return "".join(("keep ", "xx STOP yy HALT")[token] for token in ids)

    stream = TextStream(Chunks(), ("HALT", "STOP"))
    assert stream.push(0) + stream.push(1) + stream.finish() == "keep xx "
    assert stream.stopped


def test_a_stop_string_at_the_start_leaves_nothing() -> None:
    assert "".join(pieces("END", "END")) == ""


def test_a_stop_string_of_many_bytes() -> None:
    assert "".join(pieces("a€b", "€")) == "a"


def test_a_stop_string_in_what_was_held_back_ends_the_text() -> None:
    """An unfinished character shows only at the end, and is a stop string here."""
    stream = TextStream(Bytes(), ("\ufffd",))
    stream.push(97)
    stream.push("€".encode()[0])
    assert stream.finish() == ""
    assert stream.text == "a"


def test_without_a_tokenizer_there_is_no_text() -> None:
    stream = TextStream(None, ("END",))
    assert [stream.push(5), stream.finish(), stream.text] == ["", "", ""]
    assert not stream.stopped


@settings(deadline=None)
@given(
    text=st.text(alphabet="abE€N", max_size=30),
    stop=st.lists(st.text(alphabet="abE€N", min_size=1, max_size=3), max_size=3),
)
def test_any_text_with_any_stop_strings(text: str, stop: list[str]) -> None:
    """Byte by byte the answer ends at the first stop string to be complete."""
    grown = ""
    expected = text
    for character in text:
        grown += character
        found = [grown.find(word) for word in stop if word in grown]
        if found:
            expected = grown[: min(found)]
            break
    assert "".join(pieces(text, *stop)) == expected


@pytest.mark.parametrize("text", ["Grüße, 世界! 👩‍👩‍👧 naïve", "a  b\n\n\tc", " leading"])
def test_a_real_tokenizer(text: str) -> None:
    tokenizer = load_tokenizer(sample_folder())
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer, ())
    shown = [stream.push(token) for token in ids]
    assert "".join([*shown, stream.finish()]) == stream.text == tokenizer.decode(ids)


def test_a_text_that_is_too_long_is_no_matter_of_the_tokenizer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """transformers would warn of what we refuse, on the server's log."""
    tokenizer = load_tokenizer(sample_folder())
    logger = logging.getLogger("transformers.tokenization_utils_base")
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.WARNING, logger.name):
        assert len(tokenizer("word " * 3000)["input_ids"]) > 2048
    logger.removeHandler(caplog.handler)
    assert not caplog.records
