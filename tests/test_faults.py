"""Damaged checkpoints and failing disks, end to end: a clear error, balanced books, a way on."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import models
from retinue import LLM, Output
from retinue.errors import (
    CheckpointError,
    DoesNotFit,
    DownloadError,
    NotFinite,
    ReadError,
    RetinueError,
    Unsupported,
)
from retinue.memory.files import Reader
from retinue.types import Want

PROMPT = models.prompt_of(20)


def rewrite(olmoe: Path, target: Path, **changes: Callable[[torch.Tensor], Any]) -> Path:
    """Replace the tensors whose name contains the key (dots as `_DOT_`); None leaves one out."""

    def change(tensors: models.Tensors) -> models.Tensors:
        for part, edit in changes.items():
            found = [name for name in tensors if part.replace("_DOT_", ".") in name]
            assert found, part
            tensors |= {name: edit(tensors[name].clone()) for name in found}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    return models.rewrite(olmoe, target, change)


def one_expert(layer: int, expert: int, matrix: str = "down_proj") -> str:
    return f"layers.{layer}.mlp.experts.{expert}.{matrix}".replace(".", "_DOT_")


def refused(folder: Path | str, kind: type[RetinueError], what: str, **settings: Any) -> None:
    """Opening raises an error of this kind with a hint, and leaves nothing open."""
    before = models.threads_and_files()
    with pytest.raises(kind, match=what) as caught:
        models.open_llm(folder, **settings)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert models.threads_and_files() == before


def answers(llm: LLM, prompt: list[int] = PROMPT, count: int = 4) -> Output:
    output = llm.generate(prompt, models.greedy(count))[0]
    llm.assembly.engine.idle()
    return output


# --- before anything runs


def test_a_truncated_shard(olmoe: Path, tmp_path: Path) -> None:
    folder = models.copy(olmoe, tmp_path / "short")
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    refused(folder, CheckpointError, r"model\.safetensors` is damaged or truncated")


def test_a_missing_shard(tmp_path: Path) -> None:
    folder = models.make(tmp_path / "sharded", shard_size="100KB")
    (folder / "model-00003-of-00017.safetensors").unlink()
    refused(folder, CheckpointError, "shard is missing: `model-00003-of")


def test_an_expert_of_another_shape(olmoe: Path, tmp_path: Path) -> None:
    folder = rewrite(olmoe, tmp_path / "m", **{one_expert(1, 3): lambda t: t[:, :-8].contiguous()})
    refused(folder, CheckpointError, r"layers\.1\.mlp\.experts\.3\.down_proj.*shape \[64, 40\]")


def test_a_missing_expert_tensor(olmoe: Path, tmp_path: Path) -> None:
    folder = rewrite(olmoe, tmp_path / "m", **{one_expert(2, 7, "up_proj"): lambda _: None})
    refused(folder, CheckpointError, r"layers\.2\..*7 experts in the checkpoint, not 8")


def test_a_layer_without_one_of_its_matrices(olmoe: Path, tmp_path: Path) -> None:
    edits = {one_expert(2, e, "up_proj"): lambda _: None for e in range(models.EXPERTS)}
    refused(rewrite(olmoe, tmp_path / "m", **edits), CheckpointError, "incomplete")


def test_a_layer_without_experts_that_should_have_some(olmoe: Path, tmp_path: Path) -> None:
    folder = rewrite(olmoe, tmp_path / "m", layers_DOT_2_DOT_mlp_DOT_experts=lambda _: None)
    refused(folder, CheckpointError, r"layers\.2\.mlp\.experts\.\w+` are missing")


def test_a_missing_dense_weight(olmoe: Path, tmp_path: Path) -> None:
    folder = rewrite(olmoe, tmp_path / "m", layers_DOT_1_DOT_self_attn_DOT_o_proj=lambda _: None)
    refused(folder, CheckpointError, r"layers\.1\.self_attn\.o_proj\.weight` is missing")


def test_a_dense_weight_of_another_shape(olmoe: Path, tmp_path: Path) -> None:
    folder = rewrite(olmoe, tmp_path / "m", model_DOT_norm=lambda t: t[:-1].contiguous())
    refused(folder, CheckpointError, r"model\.norm\.weight` has the shape \[63\], not \[64\]")


def test_experts_of_a_type_that_is_not_served(olmoe: Path, tmp_path: Path) -> None:
    folder = rewrite(olmoe, tmp_path / "m", **{one_expert(1, 3): lambda t: t.to(torch.int8)})
    refused(folder, Unsupported, r"experts\.3\.down_proj.*type `I8`")


def test_damaged_generation_configuration(olmoe: Path, tmp_path: Path) -> None:
    folder = models.copy(olmoe, tmp_path / "m")
    (folder / "generation_config.json").write_text("[1, 2")
    refused(folder, CheckpointError, "generation_config")


def test_a_family_without_experts(tmp_path: Path) -> None:
    refused(models.make_dense(tmp_path / "llama"), Unsupported, "`llama`")


def test_an_unknown_family(olmoe: Path, tmp_path: Path) -> None:
    folder = models.edit_config(models.copy(olmoe, tmp_path / "m"), model_type="nonesuch")
    refused(folder, Unsupported, "nonesuch")


def test_a_repository_id_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused("allenai/OLMoE-1B-7B-0924", DownloadError, "no such folder: `allenai/OLMoE")
    refused("./nothing", CheckpointError, "no such folder")


def test_too_little_memory_is_refused_with_what_would_do(olmoe: Path) -> None:
    refused(olmoe, DoesNotFit, "needs at least", memory="100MiB")
    with pytest.raises(DoesNotFit) as caught:
        models.open_llm(olmoe, memory="100MiB")
    with models.open_llm(olmoe, memory=caught.value.smallest_bytes) as llm:
        assert llm.assembly.cache.slots == models.TOP_K
        assert len(answers(llm).token_ids) == 4


# --- numbers that are none


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("experts", ["100%", "6.25%"], ids=["resident", "evicted"])
def test_an_expert_that_is_no_number_is_named(
    olmoe: Path, tmp_path: Path, value: float, experts: str
) -> None:
    """Even if it has left memory by the time the logits show it."""
    folder = rewrite(olmoe, tmp_path / "m", **{one_expert(1, 3): lambda t: t.fill_(value)})
    settings = {"experts": experts, "preset": "on-demand"}
    with models.open_llm(folder, **settings) as llm:
        with pytest.raises(NotFinite, match=r"expert 3 of layer 1 .*`down_proj` in `model"):
            llm.generate(models.prompt_of(60), models.greedy(2))
        llm.assembly.engine.idle()
        assert not llm.assembly.engine.busy


def test_a_dense_weight_that_is_no_number_is_named(olmoe: Path, tmp_path: Path) -> None:
    folder = rewrite(
        olmoe, tmp_path / "m", layers_DOT_2_DOT_self_attn_DOT_q_proj=lambda t: t.fill_(torch.nan)
    )
    with models.open_llm(folder) as llm:
        with pytest.raises(NotFinite, match=r"layers\.2\.self_attn\.q_proj\.weight"):
            llm.generate(PROMPT, models.greedy(2))
        llm.assembly.engine.idle()


def test_an_embedding_that_is_no_number_hurts_only_its_token(olmoe: Path, tmp_path: Path) -> None:
    def poison(table: torch.Tensor) -> torch.Tensor:
        table[77] = torch.nan
        return table

    folder = rewrite(olmoe, tmp_path / "m", embed_tokens=poison)
    prompt = [token for token in PROMPT if token != 77]
    with models.open_llm(folder) as llm, models.open_llm(olmoe) as whole:
        expected = answers(whole, prompt)
        assert 77 not in expected.token_ids
        with pytest.raises(NotFinite, match="embed_tokens"):
            llm.generate([*prompt, 77], models.greedy(2))
        assert answers(llm, prompt).token_ids == expected.token_ids


# --- while it runs


def test_a_file_that_shrinks_in_mid_run(olmoe: Path, tmp_path: Path) -> None:
    """What is resident still answers; what is not gives a clear error; the file comes back."""
    folder = models.copy(olmoe, tmp_path / "m")
    file = folder / "model.safetensors"
    content = file.read_bytes()
    with models.open_llm(folder, preset="on-demand", self_check=False) as llm:
        expected = answers(llm).token_ids
        # All that this prompt needs is resident now: there are slots for everything.
        os.truncate(file, 20_000)
        assert answers(llm).token_ids == expected
        with pytest.raises(RetinueError, match="truncated") as caught:
            llm.generate([models.prompt_of(20, seed) for seed in range(1, 9)], progress=False)
        assert isinstance(caught.value, (CheckpointError, ReadError))
        assert caught.value.hint
        llm.assembly.engine.idle()
        assert answers(llm).token_ids == expected
        file.write_bytes(content)
        with models.open_llm(olmoe) as whole:
            for seed in range(1, 9):
                prompt = models.prompt_of(20, seed)
                assert answers(llm, prompt).token_ids == answers(whole, prompt).token_ids


class Failing(Reader):
    """A disk that fails for chosen bytes while `broken` says so."""

    broken: Callable[[int], bool] = staticmethod(lambda offset: False)

    def read(self, file: Path, offset: int, into: memoryview, *, direct: bool) -> int:
        if self.broken(offset):
            raise ReadError(f"cannot read `{file}`: Input/output error", hint="check the disk")
        return super().read(file, offset, into, direct=direct)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Failing]]:
    monkeypatch.setattr("retinue.engine.assembly.Reader", Failing)
    yield Failing
    Failing.broken = staticmethod(lambda offset: False)


@pytest.mark.parametrize("preset", ["auto", "on-demand", "layer-stream"])
@pytest.mark.parametrize("after", [0, 40], ids=["prefill", "decode"])
def test_a_disk_that_fails_and_recovers(
    olmoe: Path, failing: type[Failing], preset: str, after: int
) -> None:
    with models.open_llm(olmoe) as whole:
        expected = answers(whole, count=30).token_ids
    with models.open_llm(olmoe, preset=preset, experts="25%") as llm:
        reads = iter(range(10**6))
        failing.broken = staticmethod(lambda offset: next(reads) >= after)
        with pytest.raises(ReadError, match="Input/output error") as caught:
            answers(llm, count=30)
        assert caught.value.hint
        llm.assembly.engine.idle()
        failing.broken = staticmethod(lambda offset: False)
        assert answers(llm, count=30).token_ids == expected


def test_a_forecast_that_cannot_be_read_hurts_nobody(olmoe: Path, failing: type[Failing]) -> None:
    """Whole layers are read ahead, and every expert that no token chooses is broken."""
    prompt = PROMPT[:3]
    with models.open_llm(olmoe, preset="on-demand", self_check=False) as llm:
        expected = answers(llm, prompt, 1).token_ids
        unused = np.argwhere(llm.assembly.cache.last_used < 0).tolist()
    failed = []

    def broken(offset: int) -> bool:
        if offset in starts:
            failed.append(offset)
            return True
        time.sleep(0.003)  # so that layers wait for what they need
        return False

    with models.open_llm(olmoe, preset="layer-stream", experts="50%", self_check=False) as llm:
        layouts = llm.assembly.network.experts.layouts
        starts = {layouts[layer][expert].extents[0].start for layer, expert in unused}
        failing.broken = staticmethod(broken)
        assert answers(llm, prompt, 1).token_ids == expected
        assert failed


def test_a_failed_forecast_is_tried_again_on_demand(olmoe: Path, failing: type[Failing]) -> None:
    with models.open_llm(olmoe, preset="on-demand", self_check=False) as llm:
        expected = answers(llm).token_ids
    with models.open_llm(olmoe, preset="on-demand", self_check=False) as llm:
        cache = llm.assembly.cache
        failing.broken = staticmethod(lambda offset: True)
        cache.begin_step("prefill")
        for layer in range(models.LAYERS):
            cache.want(Want(layer, np.arange(models.EXPERTS), np.ones(8, np.float32)), limit=99)
        while cache.reads.loading:
            cache.wait(1.0)
        failing.broken = staticmethod(lambda offset: False)
        assert answers(llm).token_ids == expected


def test_a_disk_a_hundred_times_slower_finishes(olmoe: Path) -> None:
    with models.open_llm(olmoe) as whole:
        expected = answers(whole).token_ids
    with models.open_llm(olmoe, experts="13%", read_limit="8MB", self_check=False) as llm:
        output = answers(llm)
    assert output.token_ids == expected
    # 40 KB an expert, 5 ms each, and four slots of 32. How much of that is waited for depends on
    # how long computing takes; that it takes no less does not.
    stats = output.stats
    read_s = (stats.prefill_bytes_read + stats.bytes_read) / 8e6
    assert stats.prefill_s + stats.decode_s > 0.9 * read_s > 0.1


@pytest.mark.parametrize("preset", ["auto", "layer-stream"])
def test_cancel_in_the_middle_of_a_read(olmoe: Path, preset: str) -> None:
    """One expert takes a fifth of a second; the whole prompt would take many."""
    settings = {"preset": preset, "experts": "13%", "chunk": 4, "self_check": False}
    with models.open_llm(olmoe, read_limit="200KB", **settings) as llm:
        outputs: list[Output] = []
        thread = threading.Thread(
            target=lambda: outputs.extend(llm.stream(models.prompt_of(60), models.greedy(9)))
        )
        thread.start()
        while not llm.assembly.mover.bytes_read:
            time.sleep(0.02)
        assert llm.assembly.engine.busy
        started = time.perf_counter()
        llm.cancel()
        thread.join(10)
        assert time.perf_counter() - started < 2
        assert outputs[-1].finish_reason == "cancelled"
        assert outputs[-1].token_ids == []
        llm.assembly.engine.idle()
        # Reads that were under way still hold their slots, and give them back.
        deadline = time.perf_counter() + 5
        while llm.assembly.cache.reads.draining and time.perf_counter() < deadline:
            time.sleep(0.02)
            llm.assembly.cache.poll()
        assert llm.assembly.tier.free + llm.assembly.cache.resident == llm.assembly.cache.slots


def test_five_failures_leave_no_thread_and_no_file(olmoe: Path, failing: type[Failing]) -> None:
    before = models.threads_and_files()
    for _ in range(5):
        with models.open_llm(olmoe, experts="25%", self_check=False) as llm:
            failing.broken = staticmethod(lambda offset: True)
            with pytest.raises(ReadError):
                llm.generate(PROMPT, models.greedy(2))
        failing.broken = staticmethod(lambda offset: False)
    assert models.threads_and_files() == before
