"""Repositories to serve, and a process that believes our server to be the hub."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

import models
from hub_server import Hub, serving
from retinue.errors import DownloadError, RetinueError
from retinue.memory.home import locate

NAME = "acme/tiny-moe"
# What lies beside the weights in real repositories, and is never needed.
CLUTTER = (
    "README.md",
    "pytorch_model.bin",
    "model-q4.gguf",
    "consolidated.safetensors",
    "original/consolidated.00.pth",
    "onnx/model.onnx",
    "training_args.bin",
    "modeling_tiny.py",
)


@pytest.fixture(scope="session")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`acme/tiny-moe` in shards, and `acme/pickles` without safetensors. Nobody changes them."""
    root = tmp_path_factory.mktemp("repositories")
    folder = models.make(root / NAME, shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    (folder / "tokenizer_config.json").write_text("{}")
    for name in CLUTTER:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"clutter")
    pickles = root / "acme" / "pickles"
    pickles.mkdir()
    (pickles / "config.json").write_text("{}")
    (pickles / "pytorch_model.bin").write_bytes(b"pickle")
    return root


@pytest.fixture
def hub(repositories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The server, and an empty cache."""
    with serving(repositories) as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path / "harnesses"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # What has arrived of a chunk is lost when a transfer is cut.
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield running


def shards(root: Path) -> list[str]:
    index = json.loads((root / NAME / "model.safetensors.index.json").read_text())
    return sorted(set(index["weight_map"].values()))


def failing(model: str, kind: type[RetinueError] = DownloadError) -> RetinueError:
    with pytest.raises(kind) as caught:
        locate(model)
    assert caught.value.hint
    return caught.value
