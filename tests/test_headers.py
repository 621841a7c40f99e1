"""Headers of a repository without its weights: what they say, and how little is fetched."""

from typing import Any

import pytest

from hub_fixtures import NAME, hub, repositories, shards
from hub_server import Hub
from retinue.errors import CheckpointError, DownloadError
from retinue.memory import hub_cache
from retinue.memory.checkpoint import open_checkpoint
from retinue.memory.home import locate, locate_headers, sample_folder, weights_near

__all__ = ["hub", "repositories"]


def test_headers_of_a_repository(hub: Hub) -> None:
    folder = locate_headers(NAME)
    weights = sum((hub.root / NAME / name).stat().st_size for name in shards(hub.root))
    ours, whole = open_checkpoint(folder), open_checkpoint(locate(NAME))
    assert [(e.name, e.shape, e.start, e.stop) for e in ours.tensors.values()] == [
        (e.name, e.shape, e.start, e.stop) for e in whole.tensors.values()
    ]
    assert hub_cache.name_of(folder) == NAME
    assert hub_cache.used_bytes(folder) < weights


def test_headers_fetch_nothing_else_and_only_once(hub: Hub, monkeypatch: Any) -> None:
    monkeypatch.setattr("retinue.memory.headers._FIRST_BYTES", 64)
    locate_headers(NAME)
    for name in shards(hub.root):
        assert hub.sent[name] < (hub.root / NAME / name).stat().st_size / 4
    hub.forget()
    locate_headers(NAME)
    assert hub.fetched() == set()


def test_headers_from_a_server_without_ranges(hub: Hub, monkeypatch: Any) -> None:
    monkeypatch.setattr("retinue.memory.headers._FIRST_BYTES", 64)
    hub.ranges = False
    assert open_checkpoint(locate_headers(NAME)).tensors


def test_headers_of_what_is_here_are_its_own(hub: Hub) -> None:
    folder = locate(NAME)
    hub.forget()
    assert locate_headers(NAME) == folder
    assert hub.fetched() == set()
    assert weights_near(folder) == folder


def test_the_disk_is_measured_with_real_weights(hub: Hub) -> None:
    stand_in = locate_headers(NAME)
    assert weights_near(stand_in) == sample_folder()
    whole = locate(NAME)
    assert weights_near(stand_in) == whole


def test_headers_of_a_gated_repository(hub: Hub) -> None:
    hub.gated = True
    with pytest.raises(DownloadError, match="is gated"):
        locate_headers(NAME)


def test_headers_that_are_damaged(hub: Hub) -> None:
    hub.damaged.add(shards(hub.root)[0])
    with pytest.raises(CheckpointError, match="is damaged"):
        open_checkpoint(locate_headers(NAME))
