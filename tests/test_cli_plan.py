"""`plan`, `doctor` and `presets`: what they say, as text and as JSON, and how they end."""

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from command import ESCAPE, MEMORY, Call, Done, caller, imported, refused
from retinue.memory.machine import Speeds
from retinue.policy.presets import PRESETS

PLAN_KEYS = {
    *("fits", "budget_bytes", "smallest_budget_bytes", "placement", "resident_experts"),
    *("total_experts", "decode_tokens_per_s", "prefill_tokens_per_s", "reasons"),
}
GB = 10**9


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    return caller(capsys)


# --- plan


def planned(call: Call, *arguments: object) -> Done:
    return call("plan", *arguments, "--json")


def test_plan_of_the_sample(call: Call) -> None:
    done = planned(call, "sample", *MEMORY)
    assert done.code == 0
    document = done.document
    assert set(document) >= PLAN_KEYS
    assert document["fits"] is True
    assert set(document["placement"]) == {"fixed", "kv", "workspace", "experts"}
    assert sum(document["placement"].values()) <= document["budget_bytes"] == 2 << 30
    assert document["resident_experts"] == document["total_experts"] == 256
    assert document["context"] == 2048
    for speed in ("decode_tokens_per_s", "prefill_tokens_per_s"):
        assert 0 < document[speed]["low"] < document[speed]["high"]
    assert document["reasons"] == ["every expert stays in memory"]
    assert len(done.out.splitlines()) == 1
    assert "256 of 256 resident" in done.err
    text = call("plan", "sample", *MEMORY)
    assert (text.out, text.err) == (done.err, "")


@pytest.mark.parametrize("spare", [0, 5 << 20, 20 << 20])
def test_placement_never_exceeds_the_budget(call: Call, spare: int) -> None:
    memory = planned(call, "sample", *MEMORY).document["smallest_budget_bytes"] + spare
    document = planned(call, "sample", "--memory", memory).document
    assert document["budget_bytes"] == memory
    assert sum(document["placement"].values()) <= memory
    assert 4 <= document["resident_experts"] < 256


def test_plan_of_what_does_not_fit(call: Call) -> None:
    done = planned(call, "sample", "--memory", "100MiB")
    assert done.code == 3
    document = done.document
    assert set(document) >= PLAN_KEYS
    assert document["fits"] is False
    assert document["budget_bytes"] == 100 << 20
    assert document["placement"] == {}
    assert document["resident_experts"] == 0
    smallest = planned(call, "sample", *MEMORY).document["smallest_budget_bytes"]
    assert document["smallest_budget_bytes"] == smallest
    assert done.err.count("does not fit") >= 1
    text = call("plan", "sample", "--memory", "100MiB")
    assert text.code == 3
    assert f"`--memory {smallest}`" in text.out
    assert "hint: " in text.err


@pytest.mark.parametrize("context", [64, 2048])
def test_the_smallest_budget_is_the_smallest(call: Call, context: int) -> None:
    options = ("--context", context)
    found = planned(call, "sample", "--memory", "100MiB", *options).document
    smallest = found["smallest_budget_bytes"]
    prompt = ("5 6 7", "--token-ids", "--ignore-eos", "--max-new-tokens", 3, "--json", *options)
    done = call("run", "sample", *prompt, "--memory", smallest)
    assert done.code == 0, done.err
    assert done.document["new_tokens"] == 3
    assert done.document["stats"]["resident_experts"] == 4
    refused(call("run", "sample", *prompt, "--memory", smallest - 1), 3, "does not fit")
    refused(call("run", "sample", *prompt, "--memory", smallest * 9 // 10), 3, "does not fit")


def test_a_plan_without_experts_enough(call: Call) -> None:
    done = planned(call, "sample", *MEMORY, "--experts", "1%")
    assert done.code == 3
    smallest = planned(call, "sample", *MEMORY).document["smallest_budget_bytes"]
    assert done.document["smallest_budget_bytes"] == smallest
    assert "hint: use `--experts " in done.err


def test_the_second_plan_needs_no_torch(call: Call) -> None:
    first = planned(call, "sample", *MEMORY)
    done, packages = imported("plan", "sample", *MEMORY, "--json")
    assert done.code == 0, done.err
    assert "numpy" in packages
    assert not {"torch", "transformers", "tokenizers", "safetensors"} & packages
    assert done.document == first.document


# --- presets


def test_presets(call: Call) -> None:
    done = call("presets", "--json")
    assert (done.code, done.err) == (0, "")
    rows = done.document["presets"]
    assert [row["name"] for row in rows] == list(PRESETS)
    for row in rows:
        assert set(row) >= {"name", "exact", "paper", "parts", "deviations"}
    assert {row["name"] for row in rows if row["exact"]} >= {"auto", "on-demand", "layer-stream"}
    text = call("presets").out
    for row in rows:
        assert row["paper"] in text
        assert row["deviations"] in text


# --- doctor


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without problems, whatever the one below is like."""
    doctor = "retinue.cli.doctor"
    monkeypatch.setattr(f"{doctor}.known_speeds", lambda folder, fresh: Speeds(2 * GB, 9 * GB))
    monkeypatch.setattr(f"{doctor}.available_bytes", lambda: 8 * GB)
    monkeypatch.setattr(f"{doctor}._direct_note", lambda folder: "")
    monkeypatch.setattr(f"{doctor}.fast_paths", lambda *_: [])


def findings(done: Done) -> dict[str, dict[str, object]]:
    return {row["name"]: row for row in done.document["findings"]}


@pytest.mark.usefixtures("healthy")
def test_doctor_finds_nothing_wrong(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETINUE_THREADS", "1")
    done = call("doctor", "--json")
    assert done.code == 0, done.err
    assert done.document["ok"] is True
    found = findings(done)
    assert {"retinue", "torch", "processor", "memory", "disk", "direct reads"} <= set(found)
    assert found["environment"]["value"] == "RETINUE_THREADS=1"
    assert "self-check" not in found
    assert len(done.out.splitlines()) == 1
    text = call("doctor")
    assert text.code == 0
    assert text.out.endswith("everything is as it should be\n")
    assert (text.out, text.err) == (done.err, "")
    assert ESCAPE not in text.out


@pytest.mark.usefixtures("healthy")
@pytest.mark.parametrize("arguments", [["sample", "--json"], ["--json", "sample"]])
def test_doctor_of_a_model(call: Call, arguments: list[str]) -> None:
    done = call("doctor", *MEMORY, *arguments)
    assert done.code == 0, done.err
    found = findings(done)
    assert found["self-check"]["value"] == "passed"
    assert found["fits"]["value"] == "256 of 256 experts resident"


@pytest.mark.usefixtures("healthy")
def test_doctor_of_a_model_that_does_not_fit(call: Call) -> None:
    done = call("doctor", "sample", "--memory", "100MiB", "--json")
    assert done.code == 1
    row = findings(done)["model"]
    assert row["ok"] is False
    assert "does not fit" in str(row["value"])
    assert "--memory" in str(row["fix"])


@pytest.mark.usefixtures("healthy")
def test_doctor_of_too_many_threads(call: Call) -> None:
    done = call("doctor", "--threads", "999", "--json")
    assert done.code == 1
    assert findings(done)["threads"]["ok"] is False


@pytest.mark.usefixtures("healthy")
def test_doctor_of_a_package_that_is_missing(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr("retinue.cli.doctor.version", version)
    done = call("doctor", "--json")
    assert done.code == 1
    assert findings(done)["torch"]["fix"] == "pip install torch"


def test_doctor_of_a_slow_disk(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # the speed must not be remembered
    machine = "retinue.memory.machine"
    monkeypatch.setattr(f"{machine}.measure_disk", lambda files: 0.08 * GB)
    monkeypatch.setattr(f"{machine}.measure_memory", lambda **options: 9.0 * GB)
    monkeypatch.setattr("retinue.cli.doctor.fast_paths", lambda *_: [])
    done = call("doctor", "--json")
    assert done.code == 1
    assert done.document["ok"] is False
    row = findings(done)["disk"]
    assert row == {
        "name": "disk",
        "value": "0.08 GB/s",
        "ok": False,
        "fix": "put the checkpoint on a local solid-state disk",
    }
    assert "hint: put the checkpoint on a local" in done.err
