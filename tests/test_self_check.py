"""At load, one token goes through a few experts both ways."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from retinue.errors import NotFinite, SelfCheckFailed
from retinue.memory.link import DiskLink, Views
from retinue.model import work

PLAIN = DiskLink.views
Corruption = Callable[[DiskLink, int, int, int], Views]


def corrupt(monkeypatch: pytest.MonkeyPatch, change: Corruption) -> None:
    """Let the link hand out something else than what was read."""

    monkeypatch.setattr(DiskLink, "views", change)


def neighbour(link: DiskLink, layer: int, expert: int, slot: int) -> Views:
    """Another resident expert of the same layer, as soon as there is one."""
    others = [(e, s) for s, ((of, e), _) in link._views.items() if of == layer and e != expert]
    views = PLAIN(link, layer, expert, slot)
    return PLAIN(link, layer, *others[0]) if others else views


def halves(link: DiskLink, layer: int, expert: int, slot: int) -> Views:
    """Gate and up in the wrong order."""
    views = PLAIN(link, layer, expert, slot)
    joined = torch.cat(views["gate_up_proj"])
    return views | {"gate_up_proj": tuple(reversed(joined.chunk(2)))}


def last_layer(link: DiskLink, layer: int, expert: int, slot: int) -> Views:
    """Zeros in the last layer alone."""
    views = PLAIN(link, layer, expert, slot)
    if layer < models.LAYERS - 1:
        return views
    return {name: tuple(torch.zeros_like(b) for b in blocks) for name, blocks in views.items()}


@pytest.mark.parametrize("change", [neighbour, halves, last_layer])
def test_a_wrong_path_is_noticed(
    olmoe: Path, monkeypatch: pytest.MonkeyPatch, change: Corruption
) -> None:
    corrupt(monkeypatch, change)
    with pytest.raises(SelfCheckFailed, match="differ from the reference") as caught:
        models.open_llm(olmoe)
    assert caught.value.hint


def test_a_wrong_order_of_weights_is_noticed(olmoe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = work.weighted_sum
    monkeypatch.setattr(work, "weighted_sum", lambda rows, w: plain(rows, w.flip(-1)))
    with pytest.raises(SelfCheckFailed):
        models.open_llm(olmoe)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_the_right_path_passes(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    with models.open_llm(models.make(tmp_path / "model", family, dtype)) as llm:
        assert llm.assembly.cache.step == 1
        llm.assembly.engine.idle()


def test_the_least_slots_are_enough(tmp_path: Path) -> None:
    """One slot for two experts: the check runs in waves."""
    folder = models.make(tmp_path / "one", num_experts_per_tok=1)
    with models.open_llm(folder, experts="3.2%") as llm:
        assert llm.assembly.cache.slots == 1
        assert llm.generate([5, 6, 7], models.greedy(3))[0].finish_reason == "length"


def test_it_can_be_skipped(olmoe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corrupt(monkeypatch, neighbour)
    with models.open_llm(olmoe, self_check=False) as llm:
        assert llm.assembly.cache.step == 0
        assert llm.assembly.mover.bytes_read == 0


def test_a_failed_check_leaves_no_thread_and_no_file(
    olmoe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corrupt(monkeypatch, neighbour)
    before = models.threads_and_files()
    with pytest.raises(SelfCheckFailed):
        models.open_llm(olmoe)
    assert models.threads_and_files() == before


def test_weights_that_are_no_numbers_are_named(olmoe: Path, tmp_path: Path) -> None:
    """Not reported as a fault of ours."""

    def poison(tensors: models.Tensors) -> models.Tensors:
        return {
            name: tensor.fill_(torch.nan) if "layers.0.mlp.experts" in name else tensor
            for name, tensor in tensors.items()
        }

    folder = models.rewrite(olmoe, tmp_path / "nan", poison)
    with pytest.raises(NotFinite, match=r"expert \d of layer 0 .*model\.safetensors") as caught:
        models.open_llm(folder)
    assert "download" in caught.value.hint


def test_it_runs_without_the_cache_of_facts(
    olmoe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A cache folder that cannot be written to is no reason to fail."""
    blocked: Any = tmp_path / "file"
    blocked.write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    with models.open_llm(olmoe) as llm:
        assert llm.assembly.facts.total_experts == models.EXPERTS * models.LAYERS
