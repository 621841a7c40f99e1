"""What the hub or the disk refuses, and what the user is told."""

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import file_download

from hub_fixtures import NAME, failing, hub, repositories, shards
from hub_server import Hub
from retinue.errors import CheckpointError, Refused, Unsupported
from retinue.memory import hub_cache
from retinue.memory.home import locate

__all__ = ["hub", "repositories"]


def test_weights_without_an_index(hub: Hub, tmp_path: Path) -> None:
    hub.root = Path(shutil.copytree(hub.root, tmp_path / "single"))
    folder = hub.root / NAME
    names = set(shards(hub.root))
    (folder / "model.safetensors.index.json").unlink()
    locate(NAME)
    assert {name for name in hub.fetched() if name.endswith(".safetensors")} == names
    # Where there is the usual one, the others are copies.
    (folder / "model.safetensors").write_bytes(b"another")
    hub.commit = "d" * 40
    hub.forget()
    locate(NAME)
    assert hub.fetched() == {"model.safetensors"}


def test_no_safetensors(hub: Hub) -> None:
    error = failing("acme/pickles", Unsupported)
    assert "has no safetensors files, only ['.bin']" in str(error)
    assert hub.fetched() == set()


def test_too_small_a_disk(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    error = failing(NAME, Refused)
    assert "more on disk, and 1 MiB are free" in str(error)
    assert error.exit_code == 3
    assert not hub.fetched() & set(shards(hub.root))


def test_a_disk_that_fills_up(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(file_download, "http_get", full)
    error = failing(NAME)
    assert "the disk is full" in str(error)
    assert "retinue list" in error.hint


def test_a_shard_that_the_repository_lacks(hub: Hub, tmp_path: Path) -> None:
    hub.root = Path(shutil.copytree(hub.root, tmp_path / "lacking"))
    name = shards(hub.root)[0]
    (hub.root / NAME / name).unlink()
    assert f"lacks `{name}`" in str(failing(NAME))


@pytest.mark.parametrize(
    ("model", "what", "hint"),
    [
        ("acme/tiny-mo", "no such repository", "spelling"),
        (f"{NAME}@v9", "has no revision `v9`", "branches and tags"),
    ],
)
def test_what_is_not_there(hub: Hub, model: str, what: str, hint: str) -> None:
    error = failing(model)
    assert what in str(error)
    assert hint in error.hint
    assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("setting", "what", "hint"),
    [
        ({"gated": True}, "is gated", "accept its licence"),
        ({"private": True}, "no such repository", "HF_TOKEN"),
        ({"status": 401, "reason": "Invalid credentials in Authorization header"}, "token", "new"),
        ({"status": 403}, "forbidden", "HF_TOKEN"),
        ({"status": 429}, "more requests", "wait"),
        ({"status": 404}, "no such repository", "spelling"),
        ({"status": 418}, "answered 418", "again"),
    ],
)
def test_what_the_hub_refuses(hub: Hub, setting: dict[str, Any], what: str, hint: str) -> None:
    for key, value in setting.items():
        setattr(hub, key, value)
    error = failing(NAME)
    assert what in str(error)
    assert hint in error.hint


@pytest.mark.parametrize(
    "model",
    [
        "nothing",
        "./a/b",
        "/a/b",
        "a/b/c",
        "a//b",
        "a/b@",
        "../b",
        "a/b..c",
        "a b/c",
        "~nobody/b",
        "a" * 300,
    ],
)
def test_what_is_no_repository_is_a_folder_that_lacks(hub: Hub, model: str) -> None:
    assert "no such folder" in str(failing(model, CheckpointError))
    assert hub.asked == []


def test_ids() -> None:
    parsed = hub_cache.parse_id("acme/tiny.moe-1@refs/pr/2")
    assert (parsed.name, parsed.revision) == ("acme/tiny.moe-1", "refs/pr/2")
    assert str(parsed) == "acme/tiny.moe-1@refs/pr/2"
    assert str(hub_cache.parse_id("a/b@main")) == "a/b"
