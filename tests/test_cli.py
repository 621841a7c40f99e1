"""`retinue run` and what all verbs share: options, exit codes, streams. In this process."""

import io
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

from command import (
    BOUND_KEYS,
    ESCAPE,
    MEMORY,
    RUN_KEYS,
    STATS_KEYS,
    Call,
    Terminal,
    caller,
    refused,
)
from retinue.cli.main import main
from retinue.memory.machine import Speeds

HELLO = "A: Hello there!\nB:"
SHORT = (*MEMORY, "--max-new-tokens", "6", "--ignore-eos", "--no-self-check")


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    return caller(capsys)


@pytest.fixture(autouse=True)
def quick_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = Speeds(disk_bytes_per_s=2e9, memory_bytes_per_s=9e9)
    monkeypatch.setattr("retinue.cli.doctor.fast_paths", lambda *_: [])
    monkeypatch.setattr("retinue.cli.bench.known_rates", lambda *_, **__: {})
    for verb in ("doctor", "run"):
        monkeypatch.setattr(f"retinue.cli.{verb}.known_speeds", lambda folder, **options: speeds)


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that puts a text on stdin."""

    def give(text: str, stream: type[io.StringIO] = io.StringIO) -> None:
        monkeypatch.setattr(sys, "stdin", stream(text))

    return give


# --- the answer and where it goes


def test_text_on_stdout_and_everything_else_on_stderr(call: Call) -> None:
    done = call("run", "sample", HELLO, *SHORT)
    document = call("run", "sample", HELLO, *SHORT, "--json").document
    assert done.code == 0
    assert done.out == document["text"] + "\n"
    loaded, cost = done.err.splitlines()
    assert "experts in 2.00 GiB, loaded in" in loaded
    assert cost.startswith("6 tokens, ")
    assert ESCAPE not in done.out + done.err


def test_json_is_the_only_line_of_stdout_with_the_keys_of_the_contract(call: Call) -> None:
    done = call("run", "sample", HELLO, *SHORT, "--json")
    assert done.code == 0
    assert len(done.out.splitlines()) == 1
    document = done.document
    assert set(document) == RUN_KEYS
    assert len(document["token_ids"]) == document["new_tokens"] == 6
    assert document["prompt_tokens"] > 3
    assert document["finish_reason"] == "length"
    assert document["text"]
    stats = document["stats"]
    assert set(stats) >= STATS_KEYS
    assert set(stats) >= BOUND_KEYS
    assert all(isinstance(value, (int, float)) for value in stats.values())
    assert stats["budget_bytes"] == 2 << 30
    assert stats["total_experts"] == 256
    assert stats["hits"] + stats["pending"] + stats["misses"] == 5 * 8 * 4
    assert "6 tokens" in done.err


def test_token_ids_are_a_prompt(call: Call) -> None:
    text = call("run", "sample", "--token-ids", "5, 17 200,9", *SHORT, "--json").document
    assert text["prompt_tokens"] == 4
    again = call("run", "sample", "5 17 200 9", "--token-ids", *SHORT, "--json").document
    assert again["token_ids"] == text["token_ids"]


def test_token_ids_that_are_none(call: Call) -> None:
    refused(call("run", "sample", "5 x", "--token-ids"), 2, "not token ids: `5 x`")
    done = call("run", "sample", "5 99999", "--token-ids", *SHORT)
    assert done.code == 2
    assert "error: token id out of range: `99999`" in done.err


def test_a_checkpoint_without_tokenizer_takes_token_ids_only(call: Call, olmoe: Path) -> None:
    done = call("run", olmoe, "5 6 7", "--token-ids", *SHORT, "--json")
    assert done.code == 0
    assert done.document["text"] == ""
    assert done.document["new_tokens"] == 6
    done = call("run", olmoe, "hello", *SHORT)
    assert done.code == 2
    assert "no tokenizer" in done.err
    assert done.out == ""


def test_stop_ends_the_answer(call: Call) -> None:
    options = (*MEMORY, "--max-new-tokens", "20", "--ignore-eos", "--no-self-check")
    whole = call("run", "sample", HELLO, *options, "--json").document["text"]
    stop = whole[9:13]
    document = call(
        "run", "sample", HELLO, *options, "--stop", "never seen", "--stop", stop, "--json"
    ).document
    assert document["finish_reason"] == "stop"
    assert document["text"] == whole[: whole.index(stop)]


def test_seed_reproduces_a_sampled_answer(call: Call) -> None:
    def answer(seed: int) -> list[int]:
        options = (*SHORT, "--temperature", "1.2", "--seed", seed, "--json")
        return list(call("run", "sample", HELLO, *options).document["token_ids"])

    first = answer(1)
    assert answer(1) == first
    assert answer(2) != first


def test_logprobs(call: Call) -> None:
    document = call("run", "sample", HELLO, *SHORT, "--logprobs", "3", "--json").document
    assert set(document) == RUN_KEYS | {"logprobs"}
    assert [item["token_id"] for item in document["logprobs"]] == document["token_ids"]
    for item in document["logprobs"]:
        assert len(item["top"]) == 3
        assert item["top"][0] == [item["token_id"], item["logprob"]]


@pytest.mark.parametrize("checked", [True, False])
def test_self_check_can_be_skipped(
    call: Call, olmoe: Path, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    seen: list[object] = []
    monkeypatch.setattr("retinue.engine.assembly.self_check", lambda *parts: seen.append(parts))
    skip = () if checked else ("--no-self-check",)
    done = call("run", olmoe, "5 6", "--token-ids", *MEMORY, "--max-new-tokens", "1", *skip)
    assert done.code == 0
    assert bool(seen) is checked


def test_notes_about_the_model_go_to_stderr(
    call: Call, olmoe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retinue.engine.assembly.find_routers", lambda model, modules: [None] * 4)
    done = call("run", olmoe, "5 6", "--token-ids", *SHORT, "--json")
    assert done.code == 0
    assert done.err.startswith("note: no look-ahead")


# --- where the prompt comes from


def test_a_prompt_after_options(call: Call) -> None:
    done = call("run", "sample", *SHORT, "--json", "A: Hello")
    assert done.code == 0
    assert done.document["prompt_tokens"] == 6


@pytest.mark.parametrize(
    "arguments",
    [
        ["sample", "--json", "A: Hello"],
        ["--json", "sample", "A: Hello"],
        ["sample", "A: Hello", "--json"],
        ["--json", "sample", "--threads", "1", "A: Hello"],
        ["sample", "- a list"],
        ["sample", "--json", "- a list"],
        ["sample", "--", "--help"],
        ["sample", "--json", "--", "--help"],
    ],
    ids=" ".join,
)
def test_options_may_stand_anywhere_and_a_prompt_may_look_like_one(
    call: Call, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    seen: list[Namespace] = []
    monkeypatch.setattr("retinue.cli.run.execute", lambda options: seen.append(options) or 0)
    assert call("run", *arguments).code == 0
    assert seen[0].model == "sample"
    assert seen[0].prompt == next(word for word in arguments[::-1] if word != "--json")
    assert seen[0].json is ("--json" in arguments)


def test_a_pipe_is_the_prompt(call: Call, typed: Callable[..., None]) -> None:
    expected = call("run", "sample", HELLO, *SHORT)
    typed(HELLO)
    assert call("run", "sample", *SHORT).out == expected.out
    typed("never read")
    assert call("run", "sample", HELLO, *SHORT).out == expected.out
    assert sys.stdin.read() == "never read"


def test_an_empty_prompt(call: Call, typed: Callable[..., None]) -> None:
    refused(call("run", "sample", ""), 2, "the prompt is empty")
    typed("")
    refused(call("run", "sample"), 2, "the prompt is empty")


def test_no_stdin_at_all(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    refused(call("run", "sample"), 2, "the prompt is empty")


def test_bytes_that_are_no_text(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.TextIOWrapper(io.BytesIO(b"A: \xff\xfe"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", pipe)
    refused(call("run", "sample"), 2, "not a text")
    refused(call("run", "sample", "A: \udcff"), 2, "not a text")


@pytest.mark.parametrize("option", ["--json", "--token-ids"])
def test_a_chat_has_no_data(call: Call, typed: Callable[..., None], option: str) -> None:
    typed("", Terminal)
    refused(call("run", "sample", option), 2, "a chat has no --json")


# --- configuration


def test_defaults_then_file_then_environment_then_flags(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def context(*arguments: object) -> int:
        return int(call("plan", "sample", *MEMORY, "--json", *arguments).document["context"])

    file = tmp_path / "retinue.yaml"
    file.write_text("context: 100\nmax-new-tokens: 3\n")
    assert context() == 2048  # the model's own
    assert context("--config", file) == 100
    monkeypatch.setenv("RETINUE_CONTEXT", "200")
    assert context("--config", file) == 200
    assert context("--config", file, "--context", "300") == 300


def test_configuration_reaches_the_engine_and_the_sampling(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "retinue.yaml"
    file.write_text("max-new-tokens: 3\nexperts: 50%\nself-check: no\nmemory: 3GiB\n")
    monkeypatch.setenv("RETINUE_MEMORY", "2GiB")
    options = ("--config", file, "--ignore-eos", "--json")
    document = call("run", "sample", HELLO, *options).document
    assert document["new_tokens"] == 3
    assert document["stats"]["budget_bytes"] == 2 << 30
    assert 0 < document["stats"]["resident_experts"] <= 128
    document = call("run", "sample", HELLO, *options, "--max-new-tokens", "2").document
    assert document["new_tokens"] == 2


# --- refusals


@pytest.mark.parametrize("verb", ["run", "plan", "bench", "doctor"])
@pytest.mark.parametrize(
    ("option", "value", "what"),
    [
        ("--preset", "nonesuch", "unknown preset: `nonesuch`"),
        ("--precision", "int3", "unknown precision: `int3`"),
        ("--memory", "lots", "not a size: `lots`"),
        ("--experts", "lots", "not a size: `lots`"),
        ("--context", "0", "context is out of range: `0`"),
        ("--context", "2049", "context is out of range: `2049`"),
        ("--threads", "-1", "threads is out of range: `-1`"),
        ("--config", "gone.yaml", "cannot read the configuration `gone.yaml`"),
    ],
)
def test_wrong_values(call: Call, verb: str, option: str, value: str, what: str) -> None:
    prompt = [HELLO] if verb == "run" else []
    done = call(verb, "sample", *prompt, option, value)
    if option == "--config":  # there is nothing to advise
        assert done.code == 2
        assert f"error: {what}" in done.err
    else:
        refused(done, 2, what)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--temperature", "-1.0"),
        ("--top-p", "0.0"),
        ("--max-new-tokens", "0"),
        ("--logprobs", "-1"),
    ],
)
def test_wrong_sampling(call: Call, option: str, value: str) -> None:
    name = option[2:].replace("-", "_")
    refused(call("run", "sample", HELLO, option, value), 2, f"{name} is out of range: `{value}`")


@pytest.mark.parametrize("verb", ["run", "bench"])
def test_what_does_not_fit_is_refused(call: Call, verb: str) -> None:
    prompt = [HELLO] if verb == "run" else []
    refused(call(verb, "sample", *prompt, "--memory", "100MiB"), 3, "does not fit into 100 MiB")
    done = call(verb, "sample", *prompt, *MEMORY, "--experts", "1%")
    refused(done, 3, "`--experts 1%` leaves room for 2 experts")


@pytest.mark.parametrize("verb", ["run", "plan", "doctor", "bench"])
def test_models_that_are_not_there(
    call: Call, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    prompt = [HELLO] if verb == "run" else []
    refused(call(verb, "./nothing", *prompt), 1, "no such folder: `./nothing`")
    refused(call(verb, "some/model", *prompt), 1, "no such folder: `some/model`")
    done = call(verb, "empty", *prompt)
    assert done.code == 1
    assert done.err.startswith("error: ")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonesuch"],
        ["run"],
        ["run", "sample", HELLO, "--nonesuch"],
        ["run", "sample", "two", "words"],
        ["run", "sample", "--threads", "1", "two", "words"],
        ["run", "sample", HELLO, "--threads", "many"],
        ["presets", "sample"],
        ["plan", "sample", "--ignore-eos"],
    ],
    ids=lambda arguments: " ".join(arguments) or "nothing",
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: retinue")


@pytest.mark.parametrize("verb", ["run", "plan", "doctor", "bench", "presets"])
def test_every_verb_explains_itself(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "--json" in out
    assert f"example:\n  retinue {verb}" in out


@pytest.mark.parametrize(
    ("error", "said"),
    [(KeyboardInterrupt(), "interrupted"), (MemoryError(), "out of memory")],
    ids=["ctrl-C", "memory"],
)
def test_what_ends_a_program_has_no_traceback(
    call: Call, monkeypatch: pytest.MonkeyPatch, error: BaseException, said: str
) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr("retinue.cli.main.importlib.import_module", fail)
    done = call("presets")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(f"error: {said}")
