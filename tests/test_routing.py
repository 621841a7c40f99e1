"""Between routers and policies: every family's own router, told what to choose."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    MixtralConfig,
    OlmoeConfig,
    PhimoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from retinue.errors import Unsupported
from retinue.model.expert_map import ExpertsModule
from retinue.model.restriction import Rerouted, Restriction, probe
from retinue.model.routing import Router, find_routers, probabilities
from retinue.policy.base import Choice
from retinue.policy.route.next_resident import NextResident

EXPERTS, TOP_K, HIDDEN, TOKENS, LAYER = 16, 4, 32, 40, 5
_COUNTS = {"hidden_size": HIDDEN, "num_experts_per_tok": TOP_K}
_GROUPS = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
ROUTERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "olmoe": (OlmoeTopKRouter, OlmoeConfig, {"num_experts": EXPERTS}),
    "olmoe-normalised": (
        OlmoeTopKRouter,
        OlmoeConfig,
        {"num_experts": EXPERTS, "norm_topk_prob": True},
    ),
    "qwen3_moe": (
        Qwen3MoeTopKRouter,
        Qwen3MoeConfig,
        {"num_experts": EXPERTS, "norm_topk_prob": True},
    ),
    "mixtral": (MixtralTopKRouter, MixtralConfig, {"num_local_experts": EXPERTS}),
    "gpt_oss": (GptOssTopKRouter, GptOssConfig, {"num_local_experts": EXPERTS}),
    "granitemoe": (GraniteMoeTopKRouter, GraniteMoeConfig, {"num_local_experts": EXPERTS}),
    "deepseek_v3": (
        DeepseekV3TopkRouter,
        DeepseekV3Config,
        {"n_routed_experts": EXPERTS, **_GROUPS},
    ),
    "glm4_moe": (Glm4MoeTopkRouter, Glm4MoeConfig, {"n_routed_experts": EXPERTS, **_GROUPS}),
}
# Whose weights add up to this, whoever is chosen.
SUMS = {"olmoe-normalised": 1, "qwen3_moe": 1, "mixtral": 1, "gpt_oss": 1, "deepseek_v3": 2.5}


def make_router(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    kind, config, fields = ROUTERS[name]
    router = kind(config(**_COUNTS, **fields)).eval()
    random = torch.Generator().manual_seed(1)
    for tensor in [*router.parameters(), *router.buffers()]:
        tensor.data = torch.randn(tensor.shape, generator=random) * 0.5
    return router.to(dtype).requires_grad_(False)


def found(router: nn.Module) -> ExpertsModule:
    return ExpertsModule(LAYER, "experts", router, EXPERTS)


def inputs(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(2)).to(dtype)


def some(count: int, seed: int = 3) -> np.ndarray:
    """Another set of `count` experts for each token."""
    random = np.random.default_rng(seed).random((TOKENS, EXPERTS))
    return random.argsort(axis=1).argsort(axis=1) < count


def outside(router: nn.Module) -> Router:
    """`router` as the look-ahead asks it, with nothing else in its block."""
    return Router(router, nn.Module())


def restrict(router: nn.Module, resident: np.ndarray) -> Restriction:
    made = Restriction(
        [outside(router)],
        [found(router)],
        NextResident(),
        lambda choice: resident,
    )
    made.active = True
    return made


def choice(output: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights: every family returns logits, weights, ids."""
    return output[2], output[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ROUTERS)
def test_every_chosen_expert_is_allowed(name: str, dtype: torch.dtype) -> None:
    router, hidden = make_router(name, dtype), inputs(dtype)
    for count in (TOP_K, 8, EXPERTS - 1):
        resident = some(count)
        restriction = restrict(router, resident)
        with torch.inference_mode():
            ids, weights = choice(router(hidden))
        restriction.close()
        assert ids.shape == (TOKENS, TOP_K)
        assert np.take_along_axis(resident, ids.numpy(), axis=1).all()
        assert all(len(set(row)) == TOP_K for row in ids.tolist())
        assert torch.isfinite(weights).all()
        if name in SUMS:
            sums = weights.float().sum(-1)
            assert torch.allclose(sums, torch.full_like(sums, SUMS[name]), rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ROUTERS)
def test_a_token_whose_experts_are_allowed_is_not_touched(name: str, dtype: torch.dtype) -> None:
    router, hidden = make_router(name, dtype), inputs(dtype)
    with torch.inference_mode():
        own_ids, own_weights = choice(router(hidden))
        resident = some(8)
        resident[::2] = True
        np.put_along_axis(resident[1::4], own_ids[1::4].numpy(), values=True, axis=1)
        restriction = restrict(router, resident)
        ids, weights = choice(router(hidden))
    kept = np.take_along_axis(resident, own_ids.numpy(), axis=1).all(axis=1)
    assert 0 < kept.sum() < TOKENS
    assert torch.equal(ids[kept], own_ids[kept])
    assert torch.equal(weights[kept], own_weights[kept])
    assert not torch.equal(ids[~kept], own_ids[~kept])
    restriction.close()


@pytest.mark.parametrize("name", ROUTERS)
def test_all_allowed_is_the_plain_router(name: str) -> None:
    router, hidden = make_router(name), inputs()
    plain = router(hidden)
    restriction = restrict(router, some(EXPERTS))
    for restricted, own in zip(router(hidden), plain, strict=True):
        assert torch.equal(restricted, own)
    cost = restriction.take(LAYER)
    assert cost is not None
    assert not cost.replaced.any()
    restriction.close()


@pytest.mark.parametrize("name", ["olmoe", "mixtral", "gpt_oss", "granitemoe"])
def test_the_next_in_the_tokens_own_ranking_serves(name: str) -> None:
    router, hidden, resident = make_router(name), inputs(), some(7)
    restriction = restrict(router, resident)
    logits, _, ids = router(hidden)
    restriction.close()
    masked = logits.masked_fill(torch.from_numpy(~resident), -torch.inf)
    assert torch.equal(ids.sort().values, masked.topk(TOP_K).indices.sort().values)


def test_the_weights_are_the_familys_own() -> None:
    """olmoe without normalisation: the softmax over all experts, at whoever is chosen."""
    router, hidden = make_router("olmoe"), inputs()
    restriction = restrict(router, some(7))
    logits, weights, ids = router(hidden)
    restriction.close()
    assert torch.equal(weights, logits.softmax(-1).gather(-1, ids))


def test_groups_rank_before_residents_of_others() -> None:
    """deepseek_v3: a resident of a chosen group comes before every resident of another."""
    router, hidden, resident = make_router("deepseek_v3"), inputs(), some(6)
    scores = router(hidden)[0].sigmoid() + router.e_score_correction_bias
    groups = scores.view(TOKENS, 4, 4).topk(2).values.sum(-1).topk(2).indices
    restriction = restrict(router, resident)
    ids = router(hidden)[2]
    restriction.close()
    for token in range(TOKENS):
        inside = {e for e in np.flatnonzero(resident[token]) if e // 4 in groups[token]}
        taken = set(ids[token].tolist())
        assert inside <= taken or taken <= inside


def test_cost_by_hand() -> None:
    router, hidden, resident = make_router("olmoe"), inputs(), some(6)
    _, own_weights, own_ids = router(hidden)
    restriction = restrict(router, resident)
    router(hidden)
    cost = restriction.take(LAYER)
    assert isinstance(cost, Rerouted)
    assert restriction.take(LAYER) is None  # once
    assert cost.replaced.tolist() == [
        [not resident[t, own_ids[t, k]] for k in range(TOP_K)] for t in range(TOKENS)
    ]
    assert np.array_equal(cost.weights, own_weights.numpy())
    assert np.array_equal(cost.chosen, own_ids.numpy())
    restriction.close()


def test_a_router_is_as_before_when_inactive_and_after_close() -> None:
    router, hidden = make_router("mixtral"), inputs()
    plain = router(hidden)[2]
    restriction = restrict(router, some(TOP_K))
    assert not torch.equal(router(hidden)[2], plain)
    restriction.active = False
    assert torch.equal(router(hidden)[2], plain)
    restriction.active = True
    restriction.close()
    assert torch.equal(router(hidden)[2], plain)
    assert "forward" not in vars(router)


def test_policies_see_scores_ids_and_weights() -> None:
    seen: list[Choice] = []

    class Watching(NextResident):
        def rank(self, choice: Choice, resident: np.ndarray) -> None:
            seen.append(choice)

    router, hidden = make_router("olmoe"), inputs()
    logits, weights, ids = router(hidden)
    made = Restriction([outside(router)], [found(router)], Watching(), lambda choice: some(8))
    made.active = True
    router(hidden)
    made.close()
    (choice,) = seen
    assert choice.layer == LAYER
    assert choice.scores == pytest.approx(logits.softmax(-1).detach().numpy())
    assert (choice.experts == ids.numpy()).all()
    assert (choice.weights == weights.detach().numpy()).all()


# --- routers that do not obey


class Stubborn(nn.Module):
    """A router that goes wrong in one way."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN))
        self.way = way

    def forward(self, hidden: torch.Tensor) -> Any:
        logits = hidden @ self.weight.T
        if self.way == "sorts":
            values, ids = (part[:, :TOP_K] for part in logits.sort(descending=True))
        else:
            values, ids = torch.topk(logits, TOP_K)
        if self.way == "chooses twice":
            ids = torch.topk(logits, TOP_K).indices
        if self.way == "overrules":
            ids = ids // 2
        if self.way == "returns ids only":
            return logits, ids
        if self.way == "rolls dice":
            values = values * torch.rand_like(values)
        return logits, values, ids


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("sorts", "it chooses 0 times"),
        ("chooses twice", "it chooses 2 times"),
        ("overrules", "does not keep to"),
        ("returns ids only", "does not return ids and weights"),
        ("rolls dice", "does not repeat its own choice"),
    ],
)
def test_a_router_that_does_not_obey_is_refused(way: str, reason: str) -> None:
    router = Stubborn(way)
    with pytest.raises(Unsupported, match=f"router of layer {LAYER} .*{reason}") as caught:
        restrict(router, some(8))
    assert "exact preset" in caught.value.hint
    assert "forward" not in vars(router)


def test_a_router_of_its_own_kind_is_refused() -> None:
    """phimoe chooses by two maxima, not by topk."""
    config = PhimoeConfig(hidden_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=2)
    with pytest.raises(Unsupported, match="0 times"):
        probe(Router(PhimoeTopKRouter(config).eval(), nn.Module()), found(nn.Identity()))


def test_a_missing_router_is_refused() -> None:
    with pytest.raises(Unsupported, match="cannot be asked"):
        Restriction([None], [found(nn.Identity())], NextResident(), lambda *_: some(8))


@pytest.mark.parametrize("name", ROUTERS)
def test_the_probe_leaves_no_trace(name: str) -> None:
    router, hidden = make_router(name), inputs()
    plain = router(hidden)[2]
    probe(outside(router), found(router))
    assert torch.equal(router(hidden)[2], plain)
    assert "forward" not in vars(router)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ROUTERS)
def test_what_a_look_ahead_hears_is_what_the_router_says(name: str, dtype: torch.dtype) -> None:
    """Where a router is but a matrix, its product is asked for; a bias or a scale is not lost."""
    network = nn.Module()
    network.block = nn.Module()
    network.block.gate = make_router(name, dtype)
    (router,) = find_routers(network, [ExpertsModule(LAYER, "block.experts", nn.Module(), EXPERTS)])
    assert router is not None
    plain = name in {"olmoe", "olmoe-normalised", "qwen3_moe", "mixtral"}
    assert (router.weight is not None) == plain or dtype == torch.float32
    hidden = inputs(dtype)[:1]
    with torch.inference_mode():
        logits = router.module(hidden)[0].float()
        heard = probabilities(router, hidden)
    assert heard.dtype == np.float32
    assert np.allclose(heard, logits.softmax(-1), atol=2e-2 if dtype == torch.bfloat16 else 1e-6)
    assert heard.sum() == pytest.approx(1, abs=1e-5)
