"""Presets that fetch what weighs enough, in the real engine: exact at 0, the same in any pieces."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import models
from retinue import LLM, PRESETS, UsageError
from retinue.engine.evaluate import Evaluation, evaluate
from retinue.engine.request import Request, new_request
from retinue.engine.tasks import TaskIds
from retinue.errors import Cancelled, ReadError
from retinue.memory.files import Reader
from retinue.model.kv import Segment
from retinue.policy.base import Running

UNAIDED = [
    name
    for name, row in PRESETS.items()
    if row.exact and not (row.profiled or row.learned or row.replayed)
]
EXPERTS, TOP_K = 16, 4
PROMPT, FORCED = models.prompt_of(40), models.prompt_of(12, seed=9)


@pytest.fixture(scope="module")
def many(checkpoints: Path) -> Path:
    """Sixteen experts a layer, four a token."""
    fields = {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "norm_topk_prob": True}
    return models.make(checkpoints / "fetching", "olmoe", torch.float32, **fields)


def open_llm(folder: Path, above: float | None, **settings: Any) -> LLM:
    fixed: dict[str, Any] = {"preset": "random", "experts": "40%", "self_check": False}
    return models.open_llm(folder, fetch_above=above, **(fixed | settings))


def agree(llm: LLM) -> None:
    """The cache holds what the books say, and both balance."""
    llm.assembly.cache.check()
    books = llm.assembly.host.changes.books
    assert ((llm.assembly.cache.slot_of >= 0) == books.there()).all()
    assert not books.astray


@pytest.fixture(scope="module")
def plain(many: Path) -> torch.Tensor:
    with models.open_llm(many, eager=True) as llm:
        return models.run_logits(llm, PROMPT, FORCED)


@pytest.mark.parametrize("chunk", [7, 64])
@pytest.mark.parametrize("share", ["25%", "40%", "80%"])
def test_zero_is_the_plain_model(many: Path, plain: torch.Tensor, share: str, chunk: int) -> None:
    with open_llm(many, 0.0, experts=share, chunk=chunk) as llm:
        assert not any("approximate" in note for note in llm.assembly.notes)
        logits = models.run_logits(llm, PROMPT, FORCED)
        assert llm.assembly.metrics.total.decode.degraded_weight == 0
        assert llm.assembly.metrics.total.decode.fetched > 0
        agree(llm)
    assert torch.allclose(logits[-len(FORCED) :], plain[-len(FORCED) :], atol=1e-5)


@pytest.mark.parametrize("eager", [True, False])
def test_zero_in_bfloat16_to_the_bit(checkpoints: Path, eager: bool) -> None:
    """Of the network as it comes, and of prepared steps."""
    fields = {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K}
    folder = models.make(checkpoints / "fetching-bf16", "olmoe", torch.bfloat16, **fields)
    with models.open_llm(folder, eager=eager, chunk=16) as llm:
        wanted = models.run_logits(llm, PROMPT, FORCED)
    with open_llm(folder, 0.0, eager=eager, chunk=16) as llm:
        assert torch.equal(models.run_logits(llm, PROMPT, FORCED), wanted)


def test_one_is_the_default_and_reads_nothing(many: Path) -> None:
    found = []
    for above in (None, 1.0):
        with open_llm(many, above) as llm:
            read = llm.assembly.mover.bytes_read
            found.append(models.run_logits(llm, PROMPT, FORCED))
            assert llm.assembly.mover.bytes_read == read
    assert torch.equal(*found)


def test_the_knob_spans_the_curve(many: Path, plain: torch.Tensor) -> None:
    errors, reads = [], []
    for above in (1.0, 0.3, 0.2, 0.0):
        with open_llm(many, above) as llm:
            logits = models.run_logits(llm, PROMPT, FORCED)
            reads.append(llm.assembly.metrics.total.decode.fetched)
            errors.append(float((logits[-len(FORCED) :] - plain[-len(FORCED) :]).norm()))
            agree(llm)
    assert errors == sorted(errors, reverse=True)
    assert reads == sorted(reads)
    assert 0 == reads[0] < reads[1] < reads[3]


@pytest.mark.parametrize("preset", UNAIDED)
def test_exact_presets_refuse_it_by_name(many: Path, preset: str) -> None:
    with pytest.raises(UsageError, match=f"`{preset}` is exact.*fetch_above") as caught:
        models.open_llm(many, preset=preset, fetch_above=0.3)
    assert "popular" in caught.value.hint


@pytest.mark.parametrize("above", [-0.1, 1.5, float("nan")])
def test_a_share_is_between_none_and_all(many: Path, above: float) -> None:
    with pytest.raises(UsageError, match="fetch_above is out of range"):
        open_llm(many, above)


# --- the same in any pieces


def counts(llm: LLM) -> tuple[int, int, int]:
    total = llm.assembly.metrics.total
    both = total.prefill, total.decode
    return (
        sum(part.missed for part in both),
        sum(part.fetched for part in both),
        sum(part.fetched_bytes for part in both),
    )


@pytest.mark.parametrize("above", [0.0, 0.25, 0.3])
def test_pieces_are_the_whole(many: Path, above: float) -> None:
    """One prefill, chunks of it, token by token, and a whole text without a cache."""
    ids, found, there = models.prompt_of(60, seed=4), [], []
    for sizes in ([60], [16, 16, 16, 12], [1] * 60, [50, *[1] * 10]):
        with open_llm(many, above, chunk=64) as llm:
            runner = llm.assembly.engine._runner
            sequence, start = runner.new_sequence(list(range(4)), 0), 0
            for size in sizes:
                phase = "decode" if size == 1 else "prefill"
                runner.run([Segment(sequence, ids[start : start + size])], phase)
                start += size
            found.append(counts(llm))
            there.append(llm.assembly.host.changes.books.there())
            agree(llm)
            assert llm.assembly.cache.resident == llm.assembly.cache.slots
    with open_llm(many, above) as llm:
        result = evaluated(llm, [TaskIds("a", ids, 20)])
        found.append((result.misses, result.fetched, result.bytes_read))
        there.append(llm.assembly.host.changes.books.there())
        agree(llm)
    assert all(each == found[0] for each in found), found
    assert all((each == there[0]).all() for each in there)
    assert found[0][1] > 20


def evaluated(llm: LLM, texts: list[TaskIds]) -> Evaluation:
    """`texts` scored; the plain pass comes first and leaves the placement as it was."""
    return evaluate(llm.assembly, texts, lambda: None)


def test_a_chunk_reads_an_expert_once(many: Path) -> None:
    with open_llm(many, 0.0, chunk=64) as llm:
        before = llm.assembly.mover.bytes_read
        models.run_logits(llm, PROMPT, FORCED[:1])
        prefill = llm.assembly.metrics.total.prefill
        layouts = llm.assembly.network.experts.layouts
        everything = sum(layout.read_bytes for row in layouts for layout in row)
        assert prefill.bytes_read == llm.assembly.mover.bytes_read - before <= everything
        assert prefill.fetched_bytes > 2 * everything


def test_stalls_and_reads_are_counted(many: Path) -> None:
    with open_llm(many, 0.2, read_limit="1MB") as llm:
        output = llm.generate([PROMPT], models.greedy(6))[0]
        stats = output.stats
        assert stats.stall_s > 0
        decode = llm.assembly.metrics.total.decode
        assert decode.fetched_bytes == stats.bytes_read >= stats.used_bytes_read > 0
        assert 0 < stats.degraded_share < 0.5
        assert stats.misses > 0


def test_eval_says_what_was_degraded_where(many: Path) -> None:
    texts = [TaskIds("a", PROMPT, 20), TaskIds("b", models.prompt_of(30, seed=5), 9)]
    with open_llm(many, 0.25) as llm:
        result = evaluated(llm, texts)
        layers = result.cost.degraded_by_layer
    shares = [score.degraded_share for score in result.tasks.values()]
    assert min(shares) < result.degraded_share < max(shares)
    assert min(layers) < result.degraded_share < max(layers)
    assert len(layers) == models.LAYERS
    assert 0 < result.fetched < result.misses


# --- whose it was


def test_each_request_has_its_own_account(many: Path) -> None:
    """Two requests in the same passes, against each alone."""
    prompts, found = (PROMPT, models.prompt_of(17, seed=3)), []
    for together in (True, False):
        with open_llm(many, 1.0, batch=2, kv_tokens=256) as llm:
            requests = [
                new_request(p, models.greedy(5), None, task=t)
                for p, t in zip(prompts, "ab", strict=True)
            ]
            for group in [requests] if together else [[request] for request in requests]:
                for _ in llm.serve(group):
                    pass
            found.append([request.usage for request in requests])
            by_task = llm.assembly.metrics.tasks
            total = llm.assembly.metrics.total
        assert list(by_task) == ["a", "b"]
        degraded = sum(usage.degraded.sum() for usage in by_task.values())
        weight = total.prefill.degraded_weight + total.decode.degraded_weight
        assert degraded == pytest.approx(weight, rel=1e-4)
        missed = total.prefill.missed + total.decode.missed
        assert sum(usage.missed for usage in by_task.values()) == missed
    for one, other, prompt in zip(*found, prompts, strict=True):
        assert one.used.sum(axis=1) == pytest.approx(len(prompt), rel=1e-4)  # normalised
        assert one.routed.sum() == pytest.approx((len(prompt) + 4) * models.LAYERS, rel=1e-4)
        assert np.allclose(one.used, other.used, atol=1e-3)
        assert np.allclose(one.degraded, other.degraded, atol=1e-3)
        assert one.missed == other.missed
        assert 0 < one.degraded_share < 1


def test_exact_presets_keep_accounts_when_they_are_told(many: Path) -> None:
    with models.open_llm(many, experts="50%") as llm:
        request = run(llm)
        assert request.usage is None
        llm.assembly.host.changes.accounts.on = True
        usage = run(llm).usage
    assert usage is not None
    assert usage.used.sum(axis=1) == pytest.approx(len(PROMPT), rel=1e-4)
    assert usage.degraded_share == usage.missed == 0


def run(llm: LLM, count: int = 4) -> Request:
    request = new_request(PROMPT, models.greedy(count), None)
    for _ in llm.run(request):
        pass
    return request


# --- what goes wrong


@pytest.fixture
def opened(many: Path) -> Iterator[LLM]:
    with open_llm(many, 0.2, chunk=16) as llm:
        yield llm


def test_a_failed_read_leaves_no_trace(
    many: Path, opened: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever read fails, in prefill or decoding: then the same answer as without it."""
    with open_llm(many, 0.2, chunk=16) as other:
        wanted = run(other, 8).token_ids
    real, failures, allowed = Reader.read, 0, 0
    for allowed in (0, 1, 5, 17, 40, 80, 120):
        count = 0

        def faulty(*arguments: Any, allowed: int = allowed, **named: Any) -> int:
            nonlocal count
            count += 1
            if count > allowed:
                raise ReadError("the disk is gone")
            return real(*arguments, **named)

        with monkeypatch.context() as patch:
            patch.setattr(Reader, "read", faulty)
            try:
                run(opened, 8)
            except ReadError:
                failures += 1
        opened.assembly.cache.check()
        reset(opened)
    assert failures >= 5
    assert run(opened, 8).token_ids == wanted
    agree(opened)


def reset(llm: LLM) -> None:
    """As after loading."""
    residents = llm.assembly.residents
    assert residents is not None
    with residents.away():
        pass
    residents.begin([Running(None)])
    llm.assembly.host.arrival.settle()
    agree(llm)


def test_a_failed_pass_is_run_again_as_if_it_were_the_first(
    opened: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, host = opened.assembly.engine._runner, opened.assembly.host
    sequence = runner.new_sequence(list(range(4)), 0)
    runner.run([Segment(sequence, PROMPT[:16])], "prefill")
    before, read = host.changes.books.there(), Reader.read
    with monkeypatch.context() as patch:
        patch.setattr(Reader, "read", lambda *_, **__: 1 / 0)
        for segment in (PROMPT[16:32], PROMPT[16:17]):
            with pytest.raises(Exception, match="division"):
                runner.run([Segment(sequence, segment)], "prefill")
        assert (host.changes.books.there() == before).all()
        assert host.changes.books.astray
    assert Reader.read is read
    logits, counters = runner.run([Segment(sequence, PROMPT[16:32])], "prefill")
    agree(opened)
    reset(opened)
    fresh = runner.new_sequence(list(range(4, 8)), 0)
    runner.run([Segment(fresh, PROMPT[:16])], "prefill")
    wanted, other = runner.run([Segment(fresh, PROMPT[16:32])], "prefill")
    assert torch.equal(logits, wanted)
    assert (counters.missed, counters.fetched) == (other.missed, other.fetched)


@pytest.mark.parametrize("tokens", [16, 1])
def test_a_cancelled_pass_leaves_no_trace(opened: LLM, tokens: int) -> None:
    """Stopped in each layer in turn, also while it waits for a read, and in a prepared step."""
    runner, host = opened.assembly.engine._runner, opened.assembly.host
    sequence = runner.new_sequence(list(range(4)), 0)
    if tokens == 1:
        runner.run([Segment(sequence, PROMPT[16:32])], "prefill")
    before = host.changes.books.there()
    for allowed in range(1, 3 * models.LAYERS):
        asked = 0

        def stop(allowed: int = allowed) -> bool:
            nonlocal asked
            asked += 1
            return asked > allowed

        host.stop = stop
        try:
            runner.run([Segment(sequence, PROMPT[:tokens])], "prefill" if tokens > 1 else "decode")
        except Cancelled:
            assert (host.changes.books.there() == before).all()
            opened.assembly.cache.check()
        else:
            break
    else:
        pytest.fail("it never ran to its end")
    agree(opened)
    assert not (host.changes.books.there() == before).all()
