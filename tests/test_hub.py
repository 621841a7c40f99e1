"""Downloads from a hub of our own: which files, resuming, fallbacks, and what errors say."""

import errno
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, file_download, hf_hub_download

import models
from hub_fixtures import CLUTTER, NAME, failing, hub, repositories, shards
from hub_server import COMMIT, Hub
from retinue.memory import hub as hub_module
from retinue.memory import hub_cache
from retinue.memory.checkpoint import open_checkpoint
from retinue.memory.home import locate, locate_headers

__all__ = ["hub", "repositories"]
OFFLINE = "HF_HUB_OFFLINE"


@pytest.fixture
def said() -> list[str]:
    return []


def requests(hub: Hub) -> list[str]:
    """The paths asked for, without what huggingface_hub asks on its own account."""
    return [path for _, path, _ in hub.asked if "agent-harnesses" not in path]


# --- what is downloaded


def test_only_the_needed_files(hub: Hub, said: list[str]) -> None:
    folder = locate(NAME, said.append)
    wanted = {"config.json", "generation_config.json", "tokenizer_config.json"}
    wanted |= {"model.safetensors.index.json", *shards(hub.root)}
    assert {file.name for file in folder.iterdir()} == wanted
    assert hub.fetched() == wanted
    assert not hub.fetched() & {Path(name).name for name in CLUTTER}
    assert len(said) == 1
    assert said[0].startswith("downloading ")
    assert open_checkpoint(folder).tensors
    for name in shards(hub.root):
        assert (folder / name).read_bytes() == (hub.root / NAME / name).read_bytes()


def test_a_model_from_the_hub_answers_like_its_folder(hub: Hub) -> None:
    prompt, params = models.prompt_of(6), models.greedy(4)
    with models.open_llm(NAME) as llm:
        (ours,) = llm.generate([prompt], params)
        assert llm.assembly.facts.name == NAME
        assert llm.assembly.notes[0].startswith("downloading ")
    with models.open_llm(str(hub.root / NAME)) as llm:
        (plain,) = llm.generate([prompt], params)
    assert ours.token_ids == plain.token_ids


def test_the_second_time_is_one_question(hub: Hub, said: list[str]) -> None:
    first = locate(NAME)
    hub.forget()
    assert locate(NAME, said.append) == first
    assert requests(hub) == [f"/api/models/{NAME}/revision/main"]
    assert said == []


def test_a_commit_that_is_here_asks_nothing(hub: Hub) -> None:
    first = locate(f"{NAME}@{COMMIT}")
    hub.forget()
    assert locate(f"{NAME}@{COMMIT}") == first
    assert requests(hub) == []


def test_a_new_commit_fetches_what_changed(hub: Hub, tmp_path: Path) -> None:
    hub.root = Path(shutil.copytree(hub.root, tmp_path / "changing"))
    first = locate(NAME)
    models.edit_config(hub.root / NAME, rope_theta=20000.0)
    hub.commit = "d" * 40
    hub.forget()
    second = locate(NAME)
    assert (first.name, second.name) == (COMMIT, "d" * 40)
    assert hub.fetched() == {"config.json"}
    assert (second.parents[1] / "refs" / "main").read_text() == "d" * 40


def test_what_another_tool_has_downloaded_is_used(hub: Hub) -> None:
    name = shards(hub.root)[0]
    hf_hub_download(NAME, name)
    hf_hub_download(NAME, "config.json")
    hub.forget()
    locate(NAME)
    assert not hub.fetched() & {name, "config.json"}
    assert set(shards(hub.root)[1:]) < hub.fetched()


def test_a_local_folder_wins(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(NAME).mkdir(parents=True)
    assert locate(NAME) == Path(NAME)
    assert hub.asked == []


def test_the_token_is_sent(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.private = True
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    locate(NAME)
    assert "Bearer hf_secret" in hub.tokens


# --- resuming


def cut(hub: Hub, monkeypatch: pytest.MonkeyPatch, after: int) -> str:
    """Let the second shard end after some bytes, and the network stay away after that."""
    name = shards(hub.root)[1]
    hub.cut_after[name] = after

    def no_retry(seconds: float) -> None:
        raise ConnectionResetError("the network is gone")

    monkeypatch.setattr(file_download.time, "sleep", no_retry)
    return name


def test_a_cut_transfer_goes_on_where_it_ended(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    with monkeypatch.context() as patch:
        name = cut(hub, patch, 1000)
        assert "the network is gone" in str(failing(NAME))
    done = shards(hub.root)[0]
    assert hub.sent[name] == 1000
    hub.forget()
    folder = locate(NAME, said.append)
    size = (hub.root / NAME / name).stat().st_size
    assert hub.sent[name] == size - 1000
    assert ("GET", f"/{NAME}/resolve/{COMMIT}/{name}", "bytes=1000-") in hub.asked
    assert done not in hub.fetched()
    assert "1000 B of them are here" in said[0]
    assert (folder / name).read_bytes() == (hub.root / NAME / name).read_bytes()
    assert not list(folder.parents[1].glob("blobs/*incomplete"))


def test_a_server_without_ranges_starts_again(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        name = cut(hub, patch, 1000)
        failing(NAME)
    hub.ranges = False
    folder = locate(NAME)
    assert (folder / name).read_bytes() == (hub.root / NAME / name).read_bytes()


def test_a_damaged_part_is_found_and_dropped(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        name = cut(hub, patch, 1000)
        failing(NAME)
    (part,) = hub_cache.parse_id(NAME).folder.glob("blobs/*.incomplete")
    part.write_bytes(bytes(1000))
    error = failing(NAME)
    assert "checksum" in str(error)
    assert "again" in error.hint
    assert not part.exists()
    folder = locate(NAME)
    assert (folder / name).read_bytes() == (hub.root / NAME / name).read_bytes()


def test_a_part_that_is_too_long_is_dropped(hub: Hub) -> None:
    repository = hub_cache.parse_id(NAME)
    remote = hub_module.ask(repository)
    file = remote.files[shards(hub.root)[0]]
    remote.part(file).parent.mkdir(parents=True)
    remote.part(file).write_bytes(bytes(file.size + 1))
    folder = locate(NAME)
    assert (folder / file.name).read_bytes() == (hub.root / NAME / file.name).read_bytes()


def test_a_file_of_another_size_is_replaced(hub: Hub) -> None:
    folder = locate(NAME)
    name = shards(hub.root)[0]
    for damaged in (name, "config.json"):
        os.truncate(folder / damaged, 100)
    hub.forget()
    assert locate(NAME) == folder
    assert hub.fetched() == {name, "config.json"}
    for damaged in (name, "config.json"):
        assert (folder / damaged).read_bytes() == (hub.root / NAME / damaged).read_bytes()


def test_interrupt_keeps_what_has_arrived(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    name = shards(hub.root)[1]
    hub.cut_after[name] = 1000
    monkeypatch.setattr(
        file_download.time, "sleep", lambda seconds: signal.raise_signal(signal.SIGINT)
    )
    with pytest.raises(KeyboardInterrupt):
        locate(NAME, said.append)
    assert "run the same command again" in said[-1]
    (part,) = hub_cache.parse_id(NAME).folder.glob("blobs/*.incomplete")
    assert part.stat().st_size == 1000


def test_two_at_once_download_once(hub: Hub) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(locate(NAME))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(set(found)) == 1
    for name in shards(hub.root):
        assert hub.sent[name] == (hub.root / NAME / name).stat().st_size


# --- without the hub


def test_offline_with_a_complete_cache(hub: Hub, monkeypatch: Any, said: list[str]) -> None:
    first = locate(NAME)
    hub.forget()
    monkeypatch.setattr(constants, OFFLINE, True)
    assert locate(NAME, said.append) == first
    assert locate_headers(NAME, said.append) == first
    assert (hub.asked, said) == ([], [])


def test_offline_with_nothing(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, OFFLINE, True)
    assert "no complete copy in the cache" in str(failing(NAME))
    assert hub.asked == []


def test_offline_with_a_part(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = locate(NAME)
    (folder / shards(hub.root)[0]).unlink()
    monkeypatch.setattr(constants, OFFLINE, True)
    assert "no complete copy" in str(failing(NAME))


def test_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    first = locate(NAME)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert locate(NAME, said.append) == first
    assert "cannot get" in said[0]
    assert f"using the copy of {COMMIT[:12]}" in said[0]
    shutil.rmtree(first)
    error = failing(NAME)
    assert "http://127.0.0.1:9" in str(error)
    assert "HF_ENDPOINT" in error.hint


def test_an_older_copy_serves_when_the_new_one_cannot_come(hub: Hub, said: list[str]) -> None:
    first = locate(NAME)
    hub.commit, hub.gated = "d" * 40, True
    assert locate(NAME, said.append) == first
    assert "is gated; using the copy" in said[0]
    # A revision that was asked for by name is not replaced by another.
    failing(f"{NAME}@v2")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written_really(hub: Hub) -> None:
    Path(constants.HF_HUB_CACHE).mkdir()
    Path(constants.HF_HUB_CACHE).chmod(0o500)
    assert "cannot write" in str(failing(NAME))


def test_a_complete_cache_is_not_written(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = locate(NAME)

    def refuse(*arguments: Any, **options: Any) -> None:
        raise PermissionError(errno.EROFS, "Read-only file system")

    for name in ("mkdir", "write_text", "replace", "touch", "unlink"):
        monkeypatch.setattr(Path, name, refuse)
    monkeypatch.setattr(os, "makedirs", refuse)
    assert locate(NAME) == first
