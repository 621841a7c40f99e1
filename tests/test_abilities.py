"""Twins are tiny and of the same make; abilities are tried on them, once for a checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

import models
import tiny
from retinue.errors import Unsupported
from retinue.memory.checkpoint import open_checkpoint
from retinue.model import abilities
from retinue.model.abilities import Abilities, probe
from retinue.model.load import build
from retinue.model.state_size import state_size
from retinue.model.survey import survey_abilities
from retinue.model.twin import shrink, twin

MAX_TWIN_PARAMETERS = 1_000_000


@pytest.mark.parametrize("name", ["mixtral", "qwen3_5_moe_text", "gpt_oss", "deepseek_v3", "jamba"])
def test_a_twin_is_tiny_and_keeps_the_kinds_of_layers(name: str) -> None:
    config = tiny.config_of(name)
    model = twin(config)
    assert sum(p.numel() for p in model.parameters()) < MAX_TWIN_PARAMETERS
    kinds = getattr(config, "layer_types", None) or []
    assert set(getattr(model.config, "layer_types", None) or []) == set(kinds)


def test_a_twin_has_the_same_weights_each_time_and_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two = (twin(tiny.config_of("olmoe")) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[name])


def test_shrinking_leaves_the_configuration_alone() -> None:
    config = tiny.config_of("qwen3_moe")
    before = config.to_dict()
    assert shrink(config).hidden_size < config.hidden_size
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("name", "chunked"),
    [("mixtral", True), ("qwen3_next", True), ("lfm2_moe", True), ("jamba", False)],
)
def test_chunked_prefill_is_tried_not_assumed(name: str, chunked: bool) -> None:
    found = probe(tiny.config_of(name))
    assert found.chunked_prefill is chunked
    assert any("prompts run whole" in note for note in found.notes) is not chunked


def test_a_family_that_cannot_be_tried_is_run_the_safe_way_aloud(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(config: Any) -> Any:
        raise Unsupported("no tiny one")

    monkeypatch.setattr(abilities, "twin", fails)
    found = probe(tiny.config_of("mixtral"))
    assert found == Abilities(notes=found.notes)
    assert "could not be tried out" in found.notes[0]
    assert "no tiny one" in found.notes[0]


def test_a_family_without_experts_has_no_abilities() -> None:
    assert not probe(LlamaConfig()).look_ahead


def test_the_probe_runs_once_for_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = build(open_checkpoint(models.make(tmp_path / "model")))
    first = survey_abilities(network)
    assert first.chunked_prefill
    monkeypatch.setattr(abilities, "twin", lambda _: pytest.fail("tried again"))
    assert survey_abilities(network) == first


def test_the_size_of_a_sequence_is_measured_without_memory(olmoe: Path) -> None:
    network = build(open_checkpoint(olmoe))
    size = state_size(network.model)
    config = network.text_config
    keys = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    assert size.per_token == 2 * keys * config.num_hidden_layers * 4
    assert size.fixed == 0
    assert all(parameter.is_meta for parameter in network.model.parameters())
    assert not any(buffer.is_meta for buffer in network.model.buffers())
