"""Loss and agreement against transformers itself, and costs against real decoding."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import models
from retinue import PRESETS
from retinue.config import Config
from retinue.engine import reserve as reserve_module
from retinue.engine.assembly import Assembly, assemble
from retinue.engine.evaluate import Evaluation, evaluate, passes
from retinue.engine.forced import run_forced
from retinue.engine.profiling import make_profile
from retinue.engine.reserve import reserve
from retinue.engine.residents import Residents
from retinue.engine.tasks import TaskIds
from retinue.errors import Cancelled
from retinue.memory import attendance, payback
from retinue.memory.attendance import Turn
from retinue.model.arrival import Arrival
from retinue.model.kv import Segment
from retinue.model.profiles import read_profile, write_profile
from retinue.policy.measured import Damage, Sensitivity
from retinue.policy.preset import Given
from retinue.policy.systems import baselines

EXACT = [name for name, row in PRESETS.items() if row.exact and not (row.learned or row.replayed)]
# The replay asks the next layer's router alone.
PUBLISHED = [
    name
    for name, row in PRESETS.items()
    if row.exact and not row.replayed and row not in baselines.PRESETS and name != "hybrimoe"
]
RESTRICTED = [name for name, row in PRESETS.items() if row.fixed]
TEXTS = [
    TaskIds("a", models.prompt_of(30, seed=1), 12),
    TaskIds("b", models.prompt_of(24, seed=2), 23),
    TaskIds("a", models.prompt_of(17, seed=3), 5),
]


def opened(folder: Path, **settings: Any) -> Assembly:
    fixed: dict[str, Any] = {"memory": models.MEMORY, "threads": 1, "context": 64}
    return assemble(reserve(folder, Config(**(fixed | settings))))


def run(folder: Path, **settings: Any) -> Evaluation:
    assembly = opened(folder, **settings)
    count = []
    try:
        result = evaluate(assembly, TEXTS, lambda: count.append(1))
        assert len(count) == len(TEXTS) * passes(assembly)
        assembly.engine.idle()
        return result
    finally:
        assembly.close()


@pytest.fixture(scope="module")
def profile(olmoe: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Made of the texts themselves."""
    file = tmp_path_factory.mktemp("profile") / "profile.json"
    assembly = opened(olmoe, experts="50%")
    write_profile(make_profile(assembly, TEXTS, lambda: None), file)
    assembly.close()
    return str(file)


def settings_of(preset: str, profile: str) -> dict[str, Any]:
    needs = PRESETS[preset].profiled
    return {"preset": preset, "profile": profile if needs else None}


@torch.inference_mode()
def by_transformers(folder: Path) -> dict[str, float]:
    """Loss a token by task."""
    model, losses = models.stock(folder), {}
    for text in TEXTS:
        ids = torch.tensor([text.ids])
        logits = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        found = [-float(logits[i - 1, text.ids[i]]) for i in range(len(text.ids))[-text.scored :]]
        losses.setdefault(text.task, []).extend(found)
    return {task: float(np.mean(found)) for task, found in losses.items()}


@pytest.mark.parametrize("preset", EXACT)
def test_exact_presets_lose_nothing(preset: str, olmoe: Path, profile: str) -> None:
    result = run(olmoe, experts="50%", **settings_of(preset, profile))
    wanted = by_transformers(olmoe)
    assert list(result.tasks) == ["a", "b"]
    for name, score in result.tasks.items():
        assert score.nll_plain == pytest.approx(wanted[name], abs=1e-4)
        assert score.nll == score.nll_plain
        assert score.agreement == 1
    assert [score.tokens for score in result.tasks.values()] == [17, 23]
    assert result.total.tokens == 40
    mean = (17 * result.tasks["a"].nll + 23 * result.tasks["b"].nll) / 40
    assert result.total.nll == pytest.approx(mean)
    assert result.degraded_share == 0
    assert result.fetched >= result.misses > 0


@pytest.mark.parametrize("preset", RESTRICTED)
def test_everything_at_hand_loses_nothing(preset: str, olmoe: Path, profile: str) -> None:
    result = run(olmoe, experts="100%", **settings_of(preset, profile))
    assert result.total.agreement == 1
    assert result.total.nll == result.total.nll_plain
    assert (result.degraded_share, result.misses, result.fetched) == (0, 0, 0)
    assert result.bytes_read == 0


@pytest.mark.parametrize("preset", RESTRICTED)
def test_approximate_presets_say_what_they_cost(preset: str, olmoe: Path, profile: str) -> None:
    result = run(olmoe, experts="50%", **settings_of(preset, profile))
    plain = by_transformers(olmoe)
    for name, score in result.tasks.items():
        assert score.nll_plain == pytest.approx(plain[name], abs=1e-4)
        assert score.nll != score.nll_plain
    assert 0 < result.total.agreement < 1
    assert 0 < result.degraded_share < 1
    pairs = sum(len(text.ids) for text in TEXTS) * models.LAYERS * models.TOP_K
    assert 0 < result.misses < pairs
    assert (result.fetched == 0) == (PRESETS[preset].build(Given()).fetch_above >= 1)
    by_task = PRESETS[preset].build(Given()).placement.by_task
    assert (result.bytes_read > 0) == by_task  # a, b, a: two switches


def test_the_degraded_share_is_what_is_missing(olmoe: Path) -> None:
    """By hand for one text: run it restricted, and ask each plain router about its inputs."""
    assembly = opened(olmoe, preset="random", experts="50%")
    try:
        lost = whole = missing = 0.0
        seen: list[tuple[int, torch.Tensor]] = []
        assembly.host.watch = lambda layer, hidden, *_: seen.append((layer, hidden.clone()))
        result = evaluate(assembly, TEXTS[:1], lambda: None)
        assert assembly.host.changes.restriction is not None
        assembly.host.changes.restriction.active = False
        modules = {found.layer: found for found in assembly.network.experts.modules}
        for layer, hidden in seen[models.LAYERS :]:
            block = modules[layer].name.rpartition(".")[0]
            with torch.inference_mode():
                router = assembly.network.model.get_submodule(block).gate
                _, weights, ids = router(hidden)
            absent = assembly.cache.slot_of[layer, ids.numpy()] < 0
            missing += absent.sum()
            lost += float(weights.numpy()[absent].sum())
            whole += float(weights.sum())
    finally:
        assembly.close()
    assert result.misses == missing
    assert result.degraded_share == pytest.approx(lost / whole, rel=1e-4)


@pytest.mark.parametrize("forecaster", ["running-mean", "own-prefill"])
def test_forecasters_are_told_what_a_server_tells_them(
    forecaster: str, olmoe: Path, profile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each text the prompt alone, and the same sets: as when the prompts are served."""
    told: list[tuple[str | None, np.ndarray]] = []
    placed: list[np.ndarray] = []
    plain_observe, plain_place = Residents.observe, Arrival.place

    def observe(self: Residents, task: str | None, used: np.ndarray) -> None:
        told.append((task, used.copy()))
        plain_observe(self, task, used)

    def place(self: Arrival, wanted: np.ndarray, popularity: np.ndarray) -> int:
        placed.append(wanted.copy())
        return plain_place(self, wanted, popularity)

    monkeypatch.setattr(Residents, "observe", observe)
    monkeypatch.setattr(Arrival, "place", place)
    settings = {"preset": "emoe", "experts": "50%", "profile": profile, "period": None}
    seen = []
    for serve in (False, True):
        told.clear()
        assembly = opened(olmoe, forecaster=forecaster, **settings)
        placed.clear()
        try:
            if serve:
                for text in TEXTS:
                    run_forced(assembly, text)
            else:
                evaluate(assembly, TEXTS, lambda: None)
        finally:
            assembly.close()
        seen.append(([*told], [*placed]))
    (evaluated, sets), (served, sets_served) = seen
    assert [task for task, _ in evaluated] == [task for task, _ in served] == ["a", "b", "a"]
    for text, (_, mine), (_, theirs) in zip(TEXTS, evaluated, served, strict=True):
        prompt = len(text.ids) - text.scored
        assert mine.sum() == pytest.approx(theirs.sum(), rel=1e-4)
        assert 0 < mine.sum() <= prompt * models.LAYERS * 1.001  # and nothing of the rest
        np.testing.assert_allclose(mine, theirs, atol=1e-3)
    assert len(sets) >= len(sets_served) >= 2
    assert all((a == b).all() for a, b in zip(sets[::-1], sets_served[::-1], strict=False))


def test_what_the_plain_pass_left_does_not_stay(olmoe: Path, profile: str, tmp_path: Path) -> None:
    """A layer that matters to no task keeps its set: the preset's, not the plain pass's."""
    known = read_profile(Path(profile))
    harmless = Sensitivity(0.85, last={models.LAYERS - 1: Damage(1, 1.0, 0.0)})
    tasks = {name: replace(task, sensitivity=harmless) for name, task in known.tasks.items()}
    write_profile(replace(known, tasks=tasks), tmp_path / "profile.json")
    settings = {"preset": "emoe", "experts": "25%", "profile": str(tmp_path / "profile.json")}
    assembly = opened(olmoe, **settings)
    try:
        before = assembly.cache.slot_of >= 0
        evaluate(assembly, TEXTS, lambda: None)
        after = assembly.cache.slot_of >= 0
    finally:
        assembly.close()
    assert (after[1:] == before[1:]).all()


def test_a_profile_counts_choices_and_weight(olmoe: Path) -> None:
    assembly = opened(olmoe, experts="50%")
    try:
        profile = make_profile(assembly, TEXTS, lambda: None)
    finally:
        assembly.close()
    assert list(profile.tasks) == ["a", "b"]
    assert (profile.tasks["a"].texts, profile.tasks["a"].tokens) == (2, 47)
    wanted = np.zeros((models.LAYERS, models.EXPERTS), dtype=np.int64)
    model = models.stock(olmoe)
    with torch.inference_mode():
        logits = model(torch.tensor([TEXTS[1].ids]), output_router_logits=True).router_logits
    for layer, values in enumerate(logits):
        chosen = values.topk(models.TOP_K).indices.flatten().numpy()
        np.add.at(wanted[layer], chosen, 1)
    assert (profile.tasks["b"].choices == wanted).all()
    assert (profile.tasks["b"].weight.sum(axis=1) < 24).all()  # olmoe does not normalise
    assert ((profile.tasks["b"].weight > 0) == (wanted > 0)).all()


# --- what an exact preset reads, against real decoding


def decoded(
    folder: Path, share: str, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> tuple[int, int, int]:
    """Misses, reads and bytes of decoding every text token by token, each read awaited."""
    with models.open_llm(folder, experts=share, self_check=False, **settings) as llm:
        assembly = llm.assembly
        assembly.tier.finish()  # then slots are taken in order, as in the replay
        cache, runner = assembly.cache, assembly.engine._runner
        look_ahead, submit, reads = Turn._look_ahead, assembly.mover.submit, []

        def patient(turn: Turn) -> None:
            look_ahead(turn)
            while cache.reads.loading:
                cache.wait(1.0)

        monkeypatch.setattr(Turn, "_look_ahead", patient)
        monkeypatch.setattr(assembly.mover, "submit", lambda *a: (reads.append(1), submit(*a))[1])
        for text in TEXTS:
            sequence = runner.new_sequence(list(range(4)))
            assembly.host.enter(sequence.number, text.task, text.ids[: -text.scored])
            for token in text.ids:
                runner.run([Segment(sequence, [token])], "decode")
            assembly.host.leave(sequence.number)
        counters = assembly.metrics.total.decode
        return counters.misses + counters.pending, len(reads), assembly.mover.bytes_read


@pytest.mark.parametrize(
    ("preset", "share"),
    [
        *((row.name, share) for row in baselines.PRESETS for share in ("7%", "30%", "60%", "100%")),
        *((name, share) for name in PUBLISHED for share in ("7%", "30%")),
    ],
)
def test_the_replay_is_real_decoding(
    preset: str, share: str, olmoe: Path, profile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Trials of doing without look-ahead, and how busy the link is, go by measured times, of which
    # a replay has none.
    monkeypatch.setattr(payback, "FIRST", sys.maxsize)
    monkeypatch.setattr(attendance, "LATELY", 0.0)
    if PRESETS[preset].learned:
        known = reserve_module.given_of
        monkeypatch.setattr(
            reserve_module, "given_of", lambda *a: models.learnt(known(*a), 64, models.VOCABULARY)
        )
    settings = settings_of(preset, profile)
    misses, reads, _ = decoded(olmoe, share, monkeypatch, **settings)
    result = run(olmoe, experts=share, **settings)
    assert (result.misses, result.fetched) == (misses, reads)


def test_the_replay_counts_the_bytes_of_its_reads(olmoe: Path) -> None:
    result = run(olmoe, preset="on-demand", experts="100%")
    assembly = opened(olmoe)
    layouts = assembly.network.experts.layouts
    each = {layout.read_bytes for row in layouts for layout in row}
    assembly.close()
    assert min(each) * result.fetched <= result.bytes_read <= max(each) * result.fetched
    assert result.fetched == result.misses <= 32  # each expert once


def test_stop_ends_the_evaluation(olmoe: Path) -> None:
    assembly = opened(olmoe, preset="random", experts="50%")
    try:
        done: list[int] = []
        assembly.host.stop = lambda: len(done) >= 4
        with pytest.raises(Cancelled):
            evaluate(assembly, TEXTS, lambda: done.append(1))
        assert len(done) == 4
        assembly.cache.check()
    finally:
        assembly.close()
