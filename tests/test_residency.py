"""What is in memory never changes a bit: logits are compared, not only tokens."""

import functools
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import models
from retinue import LLM
from retinue.memory.files import Reader
from retinue.policy.presets import PRESETS
from retinue.policy.systems import baselines

EXPERTS, TOP_K = 16, 4
PROMPT, FORCED = models.prompt_of(40), models.prompt_of(10, seed=9)
# Those that need to know nothing; the others run on the sample model, `test_systems_live.py`.
PUBLISHED = [
    name
    for name, row in PRESETS.items()
    if row.exact and not (row.profiled or row.learned or row.replayed)
    if row not in baselines.PRESETS
]
SHARES = ("100%", "50%", "25%", "13%", "least")


class Restless(Reader):
    """A disk that answers late, and in another order than it was asked."""

    def read(self, file: Path, offset: int, into: memoryview, *, direct: bool) -> int:
        got = super().read(file, offset, into, direct=direct)
        time.sleep(random.choice((0, 0, 0, 0.0001, 0.001)))
        return got


def open_llm(model: str | Path, chunk: int = 16, **settings: Any) -> LLM:
    """A model whose prompts take several prefill passes."""
    return models.open_llm(model, chunk=chunk, **settings)


@pytest.fixture
def restless(monkeypatch: pytest.MonkeyPatch) -> None:
    random.seed(0)
    monkeypatch.setattr("retinue.engine.assembly.Reader", Restless)


def make(checkpoints: Path, kind: str) -> Path:
    fields = {"num_experts_per_tok": TOP_K}
    folder = checkpoints / f"residency-{kind}"
    if kind == "mixtral fused":
        whole = models.make(
            checkpoints / "residency-whole",
            "mixtral",
            torch.bfloat16,
            num_local_experts=EXPERTS,
            **fields,
        )
        return models.fuse(whole, folder)
    fields["num_experts"] = EXPERTS
    if kind == "qwen3_moe with holes":
        return models.make(folder, "qwen3_moe", torch.bfloat16, **fields, **models.HOLES)
    return models.make(folder, "olmoe", torch.bfloat16, **fields)


KINDS = ("olmoe", "qwen3_moe with holes", "mixtral fused")


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request: pytest.FixtureRequest, checkpoints: Path) -> Path:
    return make(checkpoints, request.param)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> torch.Tensor:
    return everything_resident(checkpoint)


@functools.cache
def everything_resident(checkpoint: Path) -> torch.Tensor:
    """The logits with everything resident before the first step."""
    with open_llm(checkpoint, preset="on-demand") as llm:
        cache = llm.assembly.cache
        for layer in llm.assembly.network.experts.modules:
            cache.fetch(layer.layer, np.arange(EXPERTS))
        while cache.resident < cache.total:
            cache.wait(1.0)
        return models.run_logits(llm, PROMPT, FORCED)


def experts_setting(checkpoint: Path, share: str) -> str | int:
    """`share` as a setting; the least that works is one token's experts of one layer."""
    if share != "least":
        return share
    with open_llm(checkpoint, self_check=False) as llm:
        return TOP_K * int(llm.assembly.facts.slot_bytes)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("preset", [row.name for row in baselines.PRESETS])
@pytest.mark.usefixtures("restless")
def test_logits_are_bit_equal(
    checkpoint: Path, expected: torch.Tensor, preset: str, share: str
) -> None:
    experts = experts_setting(checkpoint, share)
    with open_llm(checkpoint, preset=preset, experts=experts) as llm:
        logits = models.run_logits(llm, PROMPT, FORCED)
        cache, decode = llm.assembly.cache, llm.assembly.metrics.total.decode
        llm.assembly.engine.idle()
        assert cache.slots == max(TOP_K, int(cache.total * {"least": 0}.get(share, _part(share))))
        assert cache.resident <= cache.slots
        assert decode.misses + decode.pending > 0 or share in ("50%", "100%")
    # Three passes of the prompt and a pass for each forced id but the last.
    assert logits.shape == (3 + len(FORCED) - 1, models.VOCABULARY)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("share", ["25%", "least"])
@pytest.mark.parametrize("preset", PUBLISHED)
@pytest.mark.usefixtures("restless")
def test_published_systems_change_no_bit(checkpoints: Path, preset: str, share: str) -> None:
    folder = make(checkpoints, "olmoe")
    experts = experts_setting(folder, share)
    with open_llm(folder, preset=preset, experts=experts) as llm:
        logits = models.run_logits(llm, PROMPT, FORCED)
        llm.assembly.engine.idle()
    assert torch.equal(logits, everything_resident(folder))


def _part(share: str) -> float:
    return float(share.rstrip("%")) / 100 if "%" in share else 0.0


@pytest.mark.usefixtures("restless")
def test_what_ran_before_changes_no_bit(checkpoint: Path, expected: torch.Tensor) -> None:
    with open_llm(checkpoint, experts="25%") as llm:
        for seed in range(2):
            models.run_logits(llm, models.prompt_of(7 + 20 * seed, seed), FORCED[:4])
            assert torch.equal(models.run_logits(llm, PROMPT, FORCED), expected)


def test_the_room_for_context_changes_no_bit(checkpoint: Path, expected: torch.Tensor) -> None:
    context = len(PROMPT) + len(FORCED)
    with open_llm(checkpoint, context=context) as llm:
        assert torch.equal(models.run_logits(llm, PROMPT, FORCED), expected)


def test_the_self_check_changes_no_bit(checkpoint: Path, expected: torch.Tensor) -> None:
    with open_llm(checkpoint, experts="25%", self_check=False) as llm:
        assert torch.equal(models.run_logits(llm, PROMPT, FORCED), expected)


@pytest.mark.parametrize("experts", ["25%", "2%"])
@pytest.mark.usefixtures("restless")
def test_the_sample_model(experts: str) -> None:
    """Trained routers, 32 experts a layer, and a prompt that uses nearly all of them."""
    prompt = models.prompt_of(100, vocabulary=4096)
    with open_llm("sample", chunk=64) as llm:
        expected = models.run_logits(llm, prompt, FORCED)
    with open_llm("sample", chunk=64, experts=experts) as llm:
        assert llm.assembly.cache.slots < llm.assembly.cache.total
        assert torch.equal(models.run_logits(llm, prompt, FORCED), expected)
