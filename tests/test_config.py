"""Sizes, the one loader and its precedence, and the ranges of sampling parameters."""

from pathlib import Path
from typing import Any

import pytest

from retinue.config import Config, format_size, load_config, parse_size
from retinue.errors import Unsupported, UsageError
from retinue.types import Deadline, SamplingParams


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("512", 512),
        (512, 512),
        ("512B", 512),
        ("1KB", 1000),
        ("1KiB", 1024),
        ("512MiB", 512 << 20),
        ("6GB", 6_000_000_000),
        ("6GiB", 6 << 30),
        ("2TiB", 2 << 40),
        ("1.5GiB", 3 << 29),
        ("6gib", 6 << 30),
        ("  6 GiB ", 6 << 30),
    ],
)
def test_size(text: str | int, count: int) -> None:
    assert parse_size(text) == count
    assert parse_size(text, whole=7) == count


@pytest.mark.parametrize(
    ("text", "whole", "count"),
    [("80%", 1000, 800), ("12.5 %", 1000, 125), ("0%", 1000, 0), ("100%", 0, 0), ("150%", 10, 15)],
)
def test_share(text: str, whole: int, count: int) -> None:
    assert parse_size(text, whole=whole) == count


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1", "6 XB", "6G", "1e9", "half", "6GiB 2", "%", "-5%"]
)
def test_not_a_size(text: str) -> None:
    with pytest.raises(UsageError, match="not a size") as caught:
        parse_size(text, whole=1000)
    assert f"`{text}`" in str(caught.value)
    assert "512MiB" in caught.value.hint
    assert "80%" in caught.value.hint


def test_share_of_nothing_is_refused_and_not_suggested() -> None:
    with pytest.raises(UsageError, match="not a size: `80%`") as caught:
        parse_size("80%")
    assert "%" not in caught.value.hint


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (5 << 20, "5 MiB"), (6 << 30, "6.00 GiB")],
)
def test_format_size(count: int, text: str) -> None:
    assert format_size(count) == text


def write(folder: Path, text: str) -> Path:
    file = folder / "retinue.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_defaults_alone() -> None:
    assert load_config({}, environ={}) == Config()


def test_each_source_overrides_the_one_before(tmp_path: Path) -> None:
    file = write(tmp_path, "memory: 1GiB\ncontext: 100\nthreads: 1\n")
    environ = {"RETINUE_CONTEXT": "200", "RETINUE_THREADS": "2", "OTHER": "x"}
    config = load_config({"threads": 3, "memory": None}, file, environ)
    assert config.memory == "1GiB"  # a flag that was not given leaves the file's value
    assert config.context == 200
    assert config.threads == 3
    assert config.preset == Config().preset


def test_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETINUE_MEMORY", "3GiB")
    assert load_config({}).memory == "3GiB"
    assert load_config({}, environ={}).memory == Config().memory


def test_the_task_comes_from_everywhere(tmp_path: Path) -> None:
    file = write(tmp_path, "task: dialogue\n")
    assert load_config({}, file, {}).task == "dialogue"
    assert load_config({}, file, {"RETINUE_TASK": "math_qa"}).task == "math_qa"
    assert load_config({"task": "code"}, file, {"RETINUE_TASK": "math_qa"}).task == "code"


@pytest.mark.parametrize("text", ["0.3", 0.3])
def test_fractions_come_from_everywhere(text: object, tmp_path: Path) -> None:
    assert load_config({}, write(tmp_path, f"fetch-above: {text}\n"), {}).fetch_above == 0.3
    assert load_config({}, environ={"RETINUE_FETCH_ABOVE": str(text)}).fetch_above == 0.3
    assert load_config({"fetch_above": text}, environ={}).fetch_above == 0.3
    with pytest.raises(UsageError, match="fetch_above has the wrong type"):
        load_config({"fetch_above": "some"}, environ={})


def test_a_limit_of_reads_is_a_size_a_second() -> None:
    assert load_config({}, environ={}).read_bytes_per_s is None
    assert load_config({}, environ={"RETINUE_READ_LIMIT": "300MB"}).read_bytes_per_s == 300 * 10**6
    for wrong in ("0", "10%", "fast"):
        with pytest.raises(UsageError):
            load_config({"read_limit": wrong}, environ={})


def test_file_may_write_dashes_numbers_and_lists(tmp_path: Path) -> None:
    text = "max-new-tokens: '7'\nmemory: 1073741824\nself-check: off\nstop: [a, 1]\ntop_p: 1\n"
    config = load_config({}, write(tmp_path, text), {})
    assert config.max_new_tokens == 7
    assert config.memory == 1 << 30
    assert config.self_check is False
    assert config.stop == ("a", "1")
    assert config.top_p == 1.0
    assert isinstance(config.top_p, float)


def test_empty_values_of_a_file_leave_the_defaults(tmp_path: Path) -> None:
    text = "temperature:\npreset:\nself_check:\nstop:\ncontext:\n"
    assert load_config({}, write(tmp_path, text), {}) == Config()
    assert load_config({}, write(tmp_path, ""), {}) == Config()


@pytest.mark.parametrize("text", ["yes", "1", "TRUE", "on"])
def test_true(text: str) -> None:
    assert load_config({"self_check": False}, environ={}).self_check is False
    assert load_config({}, environ={"RETINUE_SELF_CHECK": text}).self_check is True


def test_one_stop_text_is_not_taken_apart() -> None:
    assert load_config({"stop": "END"}, environ={}).stop == ("END",)


def test_unknown_keys_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown setting: `memroy`") as caught:
        load_config({}, write(tmp_path, "memroy: 1GiB\n"), {})
    assert "memory" in caught.value.hint
    with pytest.raises(UsageError, match="unknown setting: `speed`"):
        load_config({"speed": 1}, environ={})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("context", "many"),
        ("context", ""),
        ("context", [1]),
        ("context", 10.5),
        ("threads", True),
        ("temperature", "hot"),
        ("temperature", True),
        ("self_check", "maybe"),
        ("self_check", 2),
        ("stop", 5),
        ("memory", True),
        ("memory", [1]),
        ("preset", [1]),
        ("deadlines", {"a": {"first": 3}}),
        ("keys", 5),
    ],
)
def test_wrong_types_are_named(key: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{key} has the wrong type") as caught:
        load_config({key: value}, environ={})
    assert f"`{value}`" in str(caught.value)
    assert caught.value.hint.startswith("write ")


def test_what_yaml_takes_for_a_number_is_a_text_where_one_is_meant(tmp_path: Path) -> None:
    config = load_config({}, write(tmp_path, "api_key: 12345\ntask: 7\npreset: 5\n"), {})
    assert (config.api_key, config.task, config.preset) == ("12345", "7", "5")


def test_no_size_is_below_nothing() -> None:
    with pytest.raises(UsageError, match="not a size: `-5`"):
        parse_size(-5)


def test_a_gpu_is_refused_as_long_as_none_is_used() -> None:
    assert load_config({"gpu_memory": 0}, environ={}).gpu_memory == 0
    for size in ("1GiB", "80%", 1 << 30):
        with pytest.raises(Unsupported, match="uses no GPU") as caught:
            load_config({}, environ={"RETINUE_GPU_MEMORY": str(size)})
        assert "--gpu-memory" in caught.value.hint


def test_what_a_variable_can_hold_may_come_from_the_environment() -> None:
    environ = {"RETINUE_MAX_NEW_TOKENS": "7", "RETINUE_TEMPERATURE": "0.5", "RETINUE_STOP": "END"}
    config = load_config({}, environ=environ | {"RETINUE_PROFILE": "a.json"})
    assert (config.max_new_tokens, config.temperature) == (7, 0.5)
    assert (config.stop, config.profile) == (("END",), "a.json")


def test_the_port_does_not_since_kubernetes_sets_that_variable() -> None:
    environ = {"RETINUE_PORT": "tcp://10.0.0.1:8000"}
    assert load_config({}, environ=environ).port == Config().port


@pytest.mark.parametrize(
    ("key", "value"),
    [("context", 0), ("threads", -1), ("max_new_tokens", 0), ("temperature", "-0.1")],
)
def test_values_out_of_range(key: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{key} is out of range: `{value}`"):
        load_config({key: value}, environ={})


def test_unknown_precision() -> None:
    with pytest.raises(UsageError, match="unknown precision: `int3`") as caught:
        load_config({}, environ={"RETINUE_PRECISION": "int3"})
    assert "as-is" in caught.value.hint


@pytest.mark.parametrize("content", [b"- a\n- b\n", b"a: [", b"\xff\xfe\x00", b"just words"])
def test_bad_configuration_file(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=r"bad\.yaml"):
        load_config({}, file, {})


def test_missing_configuration_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read the configuration .*none\.yaml"):
        load_config({}, tmp_path / "none.yaml", {})


def test_configuration_carries_the_sampling_parameters() -> None:
    config = load_config({"temperature": 0.5, "stop": "x", "seed": 3}, environ={})
    assert config.sampling() == SamplingParams(temperature=0.5, stop=("x",), seed=3)


@pytest.mark.parametrize(
    "valid",
    [
        {"temperature": 0},
        {"temperature": 2.5},
        {"max_new_tokens": 1},
        {"top_p": 1},
        {"top_p": 1e-9},
        {"top_k": 0},
        {"min_p": 0},
        {"min_p": 1},
        {"repetition_penalty": 0.5},
        {"seed": 0},
        {"seed": 2**63 - 1},
        {"logprobs": 0},
        {"logprobs": 100},
        {"stop": ["a", "b"]},
    ],
)
def test_sampling_borders_are_served(valid: dict[str, Any]) -> None:
    SamplingParams(**valid)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.001),
        ("temperature", float("nan")),
        ("max_new_tokens", 0),
        ("top_p", 0),
        ("top_p", 1.001),
        ("top_p", float("nan")),
        ("top_k", -1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("seed", -1),
        ("seed", 2**63),
        ("logprobs", -1),
        ("logprobs", 101),
        ("stop", ["a", ""]),
        ("stop", ""),
    ],
)
def test_sampling_ranges(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{name} is out of range") as caught:
        SamplingParams(**{name: value})
    assert name in caught.value.hint


def test_one_stop_string_is_one_stop() -> None:
    assert SamplingParams(stop="END").stop == ("END",)


def test_deadlines_of_all_and_by_task(tmp_path: Path) -> None:
    text = "deadlines: {chat: {first_token_s: 2, between_tokens_s: '0.5'}, sum: {}}\n"
    config = load_config({"first_token_deadline": 9.0}, write(tmp_path, text), {})
    assert config.deadline("chat") == Deadline(2.0, 0.5)
    assert config.deadline("sum") == Deadline()
    assert config.deadline("other") == config.deadline(None) == Deadline(9.0)
    assert Config().deadline("chat") is None
    assert Config(token_deadline=0.5).deadline("chat") == Deadline(None, 0.5)


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ({"first_token_deadline": 0.0}, "first_token_s is out of range: `0.0`"),
        ({"token_deadline": -1.0}, "between_tokens_s is out of range: `-1.0`"),
        ({"deadlines": {"chat": {"first_token_s": 0}}}, "first_token_s is out of range"),
        ({"deadlines": {"chat": {"first": 2}}}, "deadlines has the wrong type"),
        ({"deadlines": {"chat": 2}}, "deadlines has the wrong type"),
        ({"deadlines": 2}, "deadlines has the wrong type"),
        ({"order": "lifo"}, "unknown order: `lifo`"),
        ({"queue": 0}, "queue is out of range: `0`"),
    ],
)
def test_deadlines_and_orders_that_are_none(flags: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        load_config(flags, environ={})
