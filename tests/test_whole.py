"""A model whole and in fp32, its routers, and what it loses: against transformers' own."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import models
from retinue.config import Config
from retinue.engine.assembly import Assembly, assemble
from retinue.engine.reserve import reserve
from retinue.errors import Unsupported
from retinue.memory.checkpoint import open_checkpoint
from retinue.memory.nested import decode, encode, form_of
from retinue.model.gates import gates
from retinue.model.load import build
from retinue.model.routing import find_routers
from retinue.model.scoring import Scorer
from retinue.model.survey import survey
from retinue.model.whole import WholeModel, rounded, whole_bytes
from retinue.model.without_last import _leaving_out, without_last

TEXTS = [models.prompt_of(20, at) for at in range(2)]


@pytest.fixture
def whole(olmoe: Path) -> Iterator[WholeModel]:
    model = WholeModel(olmoe)
    yield model
    model.close()


@pytest.fixture
def assembly(olmoe: Path) -> Iterator[Assembly]:
    config = Config(preset="auto", memory=models.MEMORY, threads=1)
    found = assemble(reserve(olmoe, config))
    yield found
    found.close()


def scorer_of(assembly: Assembly) -> Scorer:
    return Scorer(assembly.network, assembly.host, assembly.mover, assembly.metrics)


def plain(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.set_experts_implementation("eager")
    return model.requires_grad_(False)


def test_loss_is_that_of_transformers(olmoe: Path, whole: WholeModel) -> None:
    model = plain(olmoe)
    with torch.no_grad():
        losses = [model(input_ids=(ids := torch.tensor([text])), labels=ids).loss for text in TEXTS]
    assert whole.loss(TEXTS) == pytest.approx(float(sum(losses)) / 2, abs=1e-4)


def test_gradients_are_those_of_transformers(olmoe: Path, whole: WholeModel) -> None:
    model, outputs = plain(olmoe), []

    def keep(module: object, inputs: object, output: torch.Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    for layer in model.model.layers:
        layer.mlp.experts.register_forward_hook(keep)
    embedded = model.get_input_embeddings()(torch.tensor([TEXTS[0]])).requires_grad_()
    logits = model(inputs_embeds=embedded).logits[0, :-1]
    targets = torch.tensor(TEXTS[0][1:])
    torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
    wanted = [float(output.grad.square().sum()) / len(TEXTS[0]) for output in outputs]
    found = whole.squared_gradients(TEXTS[:1])
    assert found == pytest.approx(wanted, rel=1e-3)
    assert found.min() > 0


def test_fewer_bits_cost_more(whole: WholeModel) -> None:
    shape, as_is = (models.LAYERS, models.EXPERTS), whole.loss(TEXTS)
    assert whole.loss(TEXTS, np.full(shape, 16)) == as_is
    lost = [abs(whole.loss(TEXTS, np.full(shape, bits)) - as_is) for bits in (8, 4, 2)]
    assert 0 < lost[0] < lost[2]
    assert 0 < lost[1] < lost[2]
    one = np.full(shape, 16)
    one[1, 2] = 2
    assert abs(whole.loss(TEXTS, one) - as_is) > 0
    assert whole.loss(TEXTS) == as_is


def test_distances_are_of_the_experts_that_ran(whole: WholeModel) -> None:
    same = whole.distances(TEXTS, (4, 4))
    assert not same.any()
    near, far = whole.distances(TEXTS, (8, 4)), whole.distances(TEXTS, (8, 2))
    assert near.shape == (models.LAYERS, models.EXPERTS)
    used = far > 0
    assert (near[used] < far[used]).all()
    few = whole.distances([TEXTS[0][:2]], (8, 2))
    assert (few > 0).sum(axis=1).max() <= 2 * models.TOP_K
    whole.loss(TEXTS)  # nothing is compared any more
    assert (whole.distances(TEXTS, (8, 2)) == far).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_is_that_of_the_nested_store(bits: int, olmoe: Path) -> None:
    layout = build(open_checkpoint(olmoe)).experts.layouts[0][0]
    form = form_of(layout)
    assert form is not None
    views, stored = (layout.views(torch.zeros(layout.slot_bytes, dtype=torch.uint8)) for _ in "ab")
    random = torch.Generator().manual_seed(0)
    for blocks in views.values():
        for block in blocks:
            assert isinstance(block, torch.Tensor)
            block.copy_(torch.randn(block.shape, generator=random))
    record = torch.empty(form.record_bytes, dtype=torch.uint8)
    encode(form, views, record)
    decode(form, record, bits, stored)
    for name, blocks in views.items():
        for block, wanted in zip(blocks, stored[name], strict=True):
            assert isinstance(block, torch.Tensor)
            assert isinstance(wanted, torch.Tensor)
            found = rounded(block.float(), bits).to(wanted.dtype)
            assert torch.allclose(found, wanted, rtol=1e-2, atol=1e-6)
            assert (found != block).any()
            assert rounded(block, 16) is block


def test_the_size_is_that_of_fp32(olmoe: Path) -> None:
    facts = survey(olmoe)
    parameters = sum(p.numel() for p in plain(olmoe).parameters())
    assert 4 * parameters < whole_bytes(facts) < 12 * parameters


def test_gates_say_what_routers_say(assembly: Assembly) -> None:
    found = gates(assembly.network, models.EXPERTS)
    routers = find_routers(assembly.network.model, assembly.network.experts.modules)
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    for router, (weights, bias) in zip(routers, found, strict=True):
        assert router is not None
        with torch.inference_mode():
            wanted = router(hidden.to(next(router.module.parameters()).dtype))[0].float().numpy()
        assert hidden.numpy() @ weights + bias == pytest.approx(wanted, abs=0.05)
    wider = gates(assembly.network, models.EXPERTS + 2)[0]
    assert wider[0].shape == (64, models.EXPERTS + 2)
    assert (wider[1][models.EXPERTS :] < -1e3).all()


def test_who_cannot_be_asked_has_no_gates(
    assembly: Assembly, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retinue.model.gates.find_routers", lambda *_: [None])
    with pytest.raises(Unsupported, match="cannot be asked"):
        gates(assembly.network, models.EXPERTS)


def test_the_last_expert_is_left_out(assembly: Assembly) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    found = assembly.network.experts.modules[1]
    run = found.module.retinue_run

    def watch(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        seen.append((index, weights))
        return hidden

    found.module.retinue_run = watch  # type: ignore[assignment]
    shares: list[float] = []
    with _leaving_out(found, shares):
        inner: Any = found.module.retinue_run
        inner(torch.zeros(1, 64), torch.tensor([[3, 5]]), torch.tensor([[0.1, 0.3]]))
    assert seen[0][0].tolist() == [[found.experts, 5]]
    assert seen[0][1][0].tolist() == pytest.approx([0, 0.4])
    assert shares == pytest.approx([0.25])
    found.module.retinue_run = run


def test_what_each_layer_adds_without_its_last(assembly: Assembly) -> None:
    scorer, modules = scorer_of(assembly), assembly.network.experts.modules
    before = scorer.score(TEXTS[0], 10).nll
    added = without_last(scorer, modules, TEXTS)
    assert added.shape == (models.LAYERS,)
    assert np.abs(added).min() > 0
    assert (scorer.score(TEXTS[0], 10).nll == before).all()
