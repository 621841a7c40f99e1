"""What fits where, how fast it will be, and how near a run came: by hand, with round numbers."""

import dataclasses
from dataclasses import replace

import pytest

from command import BOUND_KEYS
from retinue.config import Config
from retinue.engine import bands, plan
from retinue.engine.bands import Machine
from retinue.engine.bound import TokenCost, with_bound
from retinue.engine.plan import make_plan
from retinue.memory import budget
from retinue.memory.machine import Rate, Speeds
from retinue.types import Facts, Stats

MB, GB = 10**6, 10**9
FACTS = Facts(
    name="by-hand",
    family="olmoe",
    dtype="bfloat16",
    layers=10,
    moe_layers=10,
    experts_per_layer=10,
    total_experts=100,
    top_k=2,
    expert_bytes=1 * MB,
    slot_bytes=1 * MB,
    dense_bytes=50 * MB,
    dense_bytes_per_token=40 * MB,
    kv_bytes_per_token=1000,
    max_context=1000,
    vocab_size=100,
    workspace_bytes=8_900_000,
    workspace_bytes_per_context=0,
    workspace_bytes_per_token=0,
    workspace_bytes_per_pair=0,
    flops_per_token=120 * MB,
)
# Everything but experts: runtime, 50 MB of weights, 1 MB for 1000 tokens, 9 MB of workspace,
# a tenth of a MB of which is for one layer's keys and values.
NEEDED = budget.RUNTIME_BYTES + budget.RESERVE_BYTES + 60 * MB
SPEEDS = Speeds(disk_bytes_per_s=1 * GB, memory_bytes_per_s=10 * GB)
RATES = {"bfloat16": Rate(row_bytes_per_s=10 * GB, flops_per_s=1e12)}
MACHINE = Machine(SPEEDS, RATES, threads=2)


@pytest.fixture
def round_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """At worst half of the speeds, and 1 ms a layer of a step, 3 ms of a prompt."""
    for name in ("DISK", "ROWS", "FLOPS"):
        monkeypatch.setattr(bands, name, (0.5, 1.0))
    monkeypatch.setattr(bands, "STEP_LAYER_S", (1e-3, 0.0))
    monkeypatch.setattr(bands, "PROMPT_LAYER_S", (3e-3, 0.0))
    monkeypatch.setattr(plan, "REPETITION", 4)
    monkeypatch.setattr(budget, "available_bytes", lambda: 64 * GB)


def test_the_bound_is_the_slower_of_disk_and_memory() -> None:
    assert TokenCost(read_bytes=20 * MB, weight_bytes=60 * MB).tokens_per_s(SPEEDS) == 50
    assert TokenCost(read_bytes=0, weight_bytes=50 * MB).tokens_per_s(SPEEDS) == 200


def test_the_bound_of_a_run() -> None:
    stats = Stats(
        decode_s=2.5,
        decode_tokens_per_s=4.0,
        hits=150,
        pending=20,
        misses=30,
        used_bytes_read=40 * MB,
    )
    # Ten tokens: 4 MB read for each; 40 MB of dense weights and 20 experts used.
    slow = with_bound(stats, FACTS, Speeds(0.1 * GB, 10 * GB))
    assert slow.bound_tokens_per_s == pytest.approx(25)
    assert slow.share_of_bound == pytest.approx(0.16)
    fast = with_bound(stats, FACTS, Speeds(8 * GB, 6 * GB))
    assert fast.bound_tokens_per_s == pytest.approx(100)
    assert (fast.disk_bytes_per_s, fast.memory_bytes_per_s) == (8 * GB, 6 * GB)
    assert dataclasses.replace(fast, **dict.fromkeys(BOUND_KEYS)) == stats


def test_nothing_decoded_has_no_bound() -> None:
    stats = with_bound(Stats(), FACTS, SPEEDS)
    assert stats.bound_tokens_per_s is None
    assert stats.share_of_bound is None
    assert stats.disk_bytes_per_s == 1 * GB


@pytest.mark.usefixtures("round_numbers")
def test_half_of_the_experts() -> None:
    found = make_plan(FACTS, Config(memory=NEEDED + 50 * MB), MACHINE)
    assert found.split is not None
    assert found.split.slots == 50
    assert found.smallest == NEEDED + 2 * MB
    # 20 experts a token. Uniform routing misses 10: 20 ms at half the disk's speed, then 12 ms
    # for 60 MB of weights and 10 ms of the layers' own.
    assert found.decode.low == pytest.approx(1000 / 42)
    # Routing that repeats itself misses 1.25: then reading 60 MB of weights takes longer, 6 ms.
    assert found.decode.high == pytest.approx(1000 / 6)
    # 512 tokens touch every expert. Reading all, 200 ms, then 61.44 GFLOP at half speed, 30 ms.
    assert found.prefill.low == pytest.approx(512 / (0.2 + 0.12288 + 0.03))
    # Computing takes longer than reading the 50 that are not there beside it.
    assert found.prefill.high == pytest.approx(512 / 0.06144)
    assert found.reasons == [
        "50% of the experts stay in memory; the others are read when they are needed",
        "48 MiB more would hold every expert",
    ]


@pytest.mark.usefixtures("round_numbers")
def test_every_expert() -> None:
    found = make_plan(FACTS, Config(memory=NEEDED + 999 * MB), MACHINE)
    assert found.split is not None
    assert found.split.slots == 100
    assert found.decode.low == pytest.approx(1000 / (12 + 10))
    assert found.decode.high == pytest.approx(1000 / 6)
    assert found.prefill.high == pytest.approx(512 / 0.06144)
    assert found.reasons == ["every expert stays in memory"]


@pytest.mark.usefixtures("round_numbers")
def test_a_plan_where_the_embedding_stays_in_its_file() -> None:
    facts = replace(FACTS, embedding_bytes=10 * MB)
    whole = NEEDED + FACTS.total_experts * FACTS.slot_bytes
    short, all_of_it = (make_plan(facts, Config(memory=n), MACHINE) for n in (whole - 1, whole))
    assert short.reasons == [
        "the embedding's 10 MiB stay in their file: of each token a row is read",
        "every expert stays in memory",
    ]
    assert all_of_it.reasons == ["every expert stays in memory"]
    assert short.smallest == all_of_it.smallest == NEEDED - 10 * MB + 2 * MB


@pytest.mark.usefixtures("round_numbers")
def test_few_slots_and_a_short_context() -> None:
    config = Config(memory=NEEDED + 38 * MB, context=10)
    found = make_plan(FACTS, config, MACHINE)
    assert found.split is not None
    assert found.split.slots == 39  # one of them from the 1.089 MB that 990 tokens do not take
    assert "fewer slots than two tokens use" in found.reasons[-1]
    # Ten tokens touch 1 - 0.8 ** 10 of the experts. To multiply so few takes no longer than to
    # read the weights from memory: 40 MB and the experts'.
    cold = 100 * (1 - 0.8**10)
    compute_s = 2 * (40 + cold) / 10_000 + 0.03
    assert found.prefill.low == pytest.approx(10 / (cold / 500 + compute_s))
    assert found.prefill.high == pytest.approx(10 / ((cold - 39) / 1000))


@pytest.mark.usefixtures("round_numbers")
def test_what_does_not_fit() -> None:
    found = make_plan(FACTS, Config(memory=NEEDED + 1 * MB), MACHINE)
    assert found.split is None
    assert found.budget == NEEDED + 1 * MB
    assert found.smallest == NEEDED + 2 * MB
    assert (found.decode.high, found.prefill.high) == (0, 0)
    assert "`by-hand` does not fit" in found.reasons[0]
    assert f"`--memory {NEEDED + 2 * MB}`" in found.reasons[1]


@pytest.mark.usefixtures("round_numbers")
def test_too_few_experts_do_not_change_the_smallest_budget() -> None:
    config = Config(memory=NEEDED + 50 * MB, experts="1%")
    found = make_plan(FACTS, config, MACHINE)
    assert found.split is None
    assert found.smallest == NEEDED + 2 * MB
    assert "`--experts 1%` leaves room for 1 experts" in found.reasons[0]
    assert "`--experts 2000000`" in found.reasons[1]


@pytest.mark.usefixtures("round_numbers")
def test_experts_in_a_format_of_their_own_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 experts of 5 MB a token, by two cores: 0.1 s at worst and 0.025 s at best."""
    monkeypatch.setattr(bands, "CORE_DECODED_BYTES_PER_S", (0.5 * GB, 2 * GB))
    config = Config(memory=NEEDED + 200 * MB, context=1000)
    plain = make_plan(FACTS, config, MACHINE)
    facts = dataclasses.replace(FACTS, stored="mxfp4", decoded_bytes=5 * MB)
    packed = make_plan(facts, config, MACHINE)
    assert 1 / packed.decode.low == pytest.approx(1 / plain.decode.low + 0.1)
    assert 1 / packed.decode.high == pytest.approx(1 / plain.decode.high + 0.025)
    assert packed.reasons == [
        "the experts stay in mxfp4, decoded when they are used",
        *plain.reasons,
    ]


@pytest.mark.usefixtures("round_numbers")
def test_formats_with_a_kernel_have_a_rate_of_their_own() -> None:
    config = Config(memory=NEEDED + 200 * MB, context=1000)
    facts = dataclasses.replace(FACTS, stored="int4", decoded_bytes=5 * MB)
    rates = RATES | {"int4": Rate(row_bytes_per_s=5 * GB, flops_per_s=0.5e12)}
    plain = make_plan(FACTS, config, MACHINE)
    packed = make_plan(facts, config, Machine(SPEEDS, rates, threads=2))
    assert packed.decode.high == pytest.approx(plain.decode.high / 2)
    assert packed.prefill.high == pytest.approx(plain.prefill.high / 2)


def test_a_set_that_never_changes_reads_nothing(round_numbers: None) -> None:
    """Of 100 experts 50 stay: a token uses 40 MB of dense weights and 20 experts from memory."""
    config = Config(memory=NEEDED + 50 * MB, context=1000, preset="random")
    made = make_plan(FACTS, config, MACHINE)
    assert (made.decode.low, made.decode.high) == pytest.approx((1000 / 22, 1000 / 6))
    exact = make_plan(FACTS, dataclasses.replace(config, preset="auto"), MACHINE)
    assert exact.decode.low < made.decode.low
    assert exact.prefill.low < made.prefill.low == pytest.approx(512 / (0.12288 + 0.03))
    assert "50% of the experts stay in memory and serve for the others" in made.reasons
    assert not any("reads" in reason or "read when" in reason for reason in made.reasons)


@pytest.mark.parametrize("preset", ["random", "popular", "popular-by-task"])
def test_each_layer_needs_one_tokens_experts(preset: str, round_numbers: None) -> None:
    """Two of each of ten layers: 20 MB; an exact preset does with two experts in all."""
    config = Config(memory=NEEDED + 20 * MB, context=1000, preset=preset)
    made = make_plan(FACTS, config, MACHINE)
    assert made.split is not None
    assert made.split.slots == 20
    assert made.smallest == NEEDED + 20 * MB
    less = make_plan(FACTS, dataclasses.replace(config, memory=NEEDED + 19 * MB), MACHINE)
    assert less.split is None
    assert less.smallest == NEEDED + 20 * MB
    exact = dataclasses.replace(config, memory=NEEDED + 19 * MB, preset="auto")
    assert make_plan(FACTS, exact, MACHINE).smallest == NEEDED + 2 * MB
    few = make_plan(FACTS, dataclasses.replace(config, experts="19%"), MACHINE)
    assert few.split is None
    assert any("an exact preset" in reason for reason in few.reasons)
