"""Checkpoints that many tests share, and an environment that is ours alone."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

import models
import quantised
from retinue.config import ENVIRONMENT_KEYS, ENVIRONMENT_PREFIX


@pytest.fixture(scope="session", autouse=True)
def own_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No settings from outside, no facts or speeds that another run remembered."""
    with pytest.MonkeyPatch.context() as patch:
        for key in ENVIRONMENT_KEYS:
            patch.delenv(ENVIRONMENT_PREFIX + key.upper(), raising=False)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
        # transformers has imported this before, and it has looked at the environment then.
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub-cache")))
        patch.setenv("TOKENIZERS_PARALLELISM", os.environ.get("TOKENIZERS_PARALLELISM", "false"))
        yield


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of every shared checkpoint. Nobody changes what lies in it."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="session")
def olmoe(checkpoints: Path) -> Path:
    """float32, one tensor per expert and matrix, one file, no tokenizer."""
    return models.make(checkpoints / "olmoe")


@pytest.fixture(scope="session")
def olmoe_bf16(checkpoints: Path) -> Path:
    return models.make(checkpoints / "olmoe-bf16", dtype=torch.bfloat16)


@pytest.fixture(scope="session")
def qwen_holes(checkpoints: Path) -> Path:
    """qwen3_moe in bfloat16, whose layers 0 and 2 have no experts."""
    return models.make(checkpoints / "qwen-holes", "qwen3_moe", torch.bfloat16, **models.HOLES)


@pytest.fixture(scope="session")
def fp8(checkpoints: Path) -> Path:
    source = models.make(checkpoints / "odd-qwen", "qwen3_moe", **quantised.ODD)
    return quantised.to_fp8(source, checkpoints / "fp8")


@pytest.fixture(scope="session")
def mxfp4(checkpoints: Path) -> Path:
    source = models.make(checkpoints / "gpt-oss", "gpt_oss", num_hidden_layers=2)
    return quantised.to_mxfp4(source, checkpoints / "mxfp4")


@pytest.fixture(scope="session", params=("fp8", "mxfp4"))
def checkpoint(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)
