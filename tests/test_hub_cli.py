"""The hub on the command line: run, plan, doctor, list and rm, with the settings of every tool."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

import models
from command import MEMORY, Call, Terminal, caller, environment, finish, imported, refused, start
from hub_fixtures import NAME, hub, repositories, shards
from hub_server import COMMIT, Hub
from retinue.memory import hub_cache
from retinue.memory.home import locate, locate_headers
from retinue.memory.machine import cache_folder

__all__ = ["hub", "repositories"]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    return caller(capsys)


def variables(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """The environment of a person whose hub is ours."""
    return environment(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="0")


def test_run_downloads_and_then_needs_no_network(hub: Hub, tmp_path: Path) -> None:
    words = ("run", NAME, "5 17 99", "--token-ids", "--max-new-tokens", "2", *MEMORY)
    env = variables(hub, tmp_path)
    done = finish(*words, env=env)
    assert done.code == 0, done.err
    assert f"of `{NAME}`" in done.err
    assert f"{NAME}: room for" in done.err
    assert (tmp_path / "home" / "hub" / "models--acme--tiny-moe").is_dir()
    hub.forget()
    assert finish(*words, env=env | {"HF_HUB_OFFLINE": "1"}).code == 0
    assert hub.asked == []


def test_plan_downloads_no_weights(hub: Hub, tmp_path: Path, call: Call) -> None:
    done = call("plan", NAME, *MEMORY, "--json")
    assert done.code == 0, done.err
    assert not hub_cache.parse_id(NAME).folder.exists()
    folder = models.copy(hub.root / NAME, tmp_path / "copy")
    (folder / "consolidated.safetensors").unlink()
    plain = call("plan", folder, *MEMORY, "--json")
    for key in ("smallest_budget_bytes", "resident_experts", "total_experts", "placement"):
        assert done.document[key] == plain.document[key]
    assert NAME in done.err


def test_doctor_of_a_repository_downloads_no_weights(hub: Hub, call: Call) -> None:
    done = call("doctor", NAME, *MEMORY, "--json")
    found = {item["name"]: item["value"] for item in done.document["findings"]}
    assert found["fits"] == "32 of 32 experts resident"
    assert "not downloaded yet" in found["weights"]
    assert not hub_cache.parse_id(NAME).folder.exists()


def test_doctor_of_a_repository_that_does_not_fit(hub: Hub, call: Call) -> None:
    done = call("doctor", NAME, "--memory", "300MiB", "--json")
    assert done.code == 1
    (problem,) = [item for item in done.document["findings"] if item["name"] == "model"]
    assert not problem["ok"]
    assert "--memory" in problem["fix"]


def test_interrupted_while_it_downloads(hub: Hub, tmp_path: Path) -> None:
    name = shards(hub.root)[1]
    hub.pause_at[name] = 1000
    with start("run", NAME, "5", "--token-ids", *MEMORY, env=variables(hub, tmp_path)) as process:
        deadline = time.monotonic() + 60
        while name not in hub.sent:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (1, b"")
    assert b"run the same command again to go on" in err
    assert b"Traceback" not in err


def test_errors_of_the_hub_on_the_command_line(hub: Hub, call: Call) -> None:
    refused(call("run", "acme/nothing", "Hello"), 1, "no such repository: `acme/nothing`")
    refused(call("plan", "acme/pickles"), 3, "has no safetensors files")
    hub.gated = True
    refused(call("bench", NAME), 1, "is gated")


def test_a_local_folder_does_not_import_the_hub() -> None:
    _, packages = imported("plan", "sample", *MEMORY)
    _, packages = imported("plan", "sample", *MEMORY)  # now its facts are known
    assert "huggingface_hub" not in packages


# --- list and rm


def test_list(hub: Hub, call: Call) -> None:
    empty = call("list")
    assert (empty.code, empty.out) == (0, "")
    assert "no models" in empty.err
    folder = locate(NAME)
    done = call("list")
    assert done.out.splitlines()[0].split() == ["name", "size", "revision", "last", "used", "state"]
    assert NAME in done.out
    assert f"main ({COMMIT[:12]})" in done.out
    (model,) = call("list", "--json").document["models"]
    weights = sum((folder / name).stat().st_size for name in shards(hub.root))
    assert model["name"] == NAME
    assert weights <= model["bytes"] < weights + (1 << 17)
    assert abs(model["last_used"] - time.time()) < 100
    assert model["state"] == "ready"


def make_cached(name: str, files: dict[str, bytes]) -> Path:
    snapshot = hub_cache.Repository(name).snapshot("e" * 40)
    snapshot.mkdir(parents=True)
    for file, content in files.items():
        (snapshot / file).write_bytes(content)
    return snapshot


def test_list_says_what_cannot_be_run(hub: Hub, call: Call) -> None:
    make_cached("a/pickles", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    make_cached("a/diffusion", {"model_index.json": b"{}"})
    make_cached("a/damaged", {"config.json": b"{}", "model.safetensors": b"x"})
    make_cached("a/empty", {})
    hub_cache.Repository("a/bare").folder.mkdir()
    models.make_dense(make_cached("a/dense", {}))
    cut = make_cached("a/cut", {"config.json": b"{}"}).parents[1] / "blobs"
    cut.mkdir()
    (cut / "abc.retinue.incomplete").write_bytes(b"x")
    broken = locate(NAME)
    (broken / shards(hub.root)[0]).unlink()
    rows = {model["name"]: model["state"] for model in call("list", "--json").document["models"]}
    assert rows == {
        "a/bare": "incomplete",
        "a/cut": "incomplete",
        "a/damaged": "damaged, or of a type that is not served",
        "a/dense": "no experts",
        "a/diffusion": "not a model of transformers",
        "a/empty": "incomplete",
        "a/pickles": "no safetensors",
        NAME: "incomplete",
    }
    assert call("list").code == 0


def test_rm(hub: Hub, call: Call) -> None:
    locate_headers(NAME)
    folder = locate(NAME).parents[1]
    # What was cut off counts too.
    (folder / "blobs" / "abc.retinue.incomplete").write_bytes(bytes(1 << 20))
    other = make_cached("a/other", {"config.json": b"{}"})
    (listed,) = [m for m in call("list", "--json").document["models"] if m["name"] == NAME]
    done = call("rm", NAME, "--yes", "--json")
    assert done.code == 0
    assert done.document["name"] == NAME
    assert done.document["freed_bytes"] >= listed["bytes"] > 2 << 20
    assert not folder.exists()
    assert other.exists()
    assert not list((cache_folder() / "headers").glob("*"))
    assert [m["name"] for m in call("list", "--json").document["models"]] == ["a/other"]
    locate(NAME)


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("yes\n", 0), ("\n", 1), ("", 1)])
def test_rm_asks(
    hub: Hub, call: Call, monkeypatch: pytest.MonkeyPatch, answer: str, code: int
) -> None:
    snapshot = make_cached("a/b", {"config.json": b"{}"})
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    done = call("rm", "a/b")
    assert done.code == code
    assert "delete `a/b`" in done.err
    assert snapshot.exists() == bool(code)
    assert ("freed 4096 bytes" in done.out) == (code == 0)


def test_rm_asks_nobody_who_cannot_answer(hub: Hub, call: Call, monkeypatch: object) -> None:
    make_cached("a/b", {"config.json": b"{}"})
    done = finish("rm", "a/b", env=environment(HF_HUB_CACHE=str(hub_cache.cache_root())))
    refused(done, 2, "needs a yes")
    assert hub_cache.Repository("a/b").folder.exists()


@pytest.mark.parametrize("name", ["a/c", "..", "a/b/../..", "", "a/b@main"])
def test_rm_of_what_is_not_there(hub: Hub, call: Call, name: str) -> None:
    snapshot = make_cached("a/b", {"config.json": b"{}"})
    done = call("rm", name, "--yes")
    refused(done, 2, f"not in the cache: `{name}`")
    assert "a/b" in done.err
    assert snapshot.exists()


def test_rm_of_what_retinue_remembers(hub: Hub, call: Call) -> None:
    call("plan", NAME, *MEMORY)
    assert call("list", "--json").document["cache_bytes"] > 0
    assert call("rm", "cache", "--yes").code == 0
    assert call("list", "--json").document["cache_bytes"] == 0
    assert call("rm", "cache", "--yes").code == 0
    assert call("plan", NAME, *MEMORY).code == 0


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may delete anything")
def test_rm_of_what_may_not_be_deleted(hub: Hub, call: Call) -> None:
    snapshot = make_cached("a/b", {"config.json": b"{}"})
    snapshot.chmod(0o500)
    refused(call("rm", "a/b", "--yes"), 1, "cannot delete")


def test_list_json_is_one_line(hub: Hub, call: Call) -> None:
    (line,) = call("list", "--json").out.splitlines()
    assert json.loads(line)["models"] == []
