"""The benchmarks' own arithmetic, commands, shapes and groups; one smoke run on a tiny shape."""

import sys
from pathlib import Path

import pytest
import torch
from benchmarks import __main__ as command_line
from benchmarks import alone, child, group, ours, peer_accelerate, peer_transformers, shapes, versus
from benchmarks.checkpoint import Checkpoint, NoCheckpointError, inspect
from benchmarks.child import ChildFailedError, in_turn, run_child
from benchmarks.results import Document, Report, best, compare, noise, not_slower, show
from benchmarks.setting import Setting, fits_comfortably
from transformers import AutoModelForCausalLM

from retinue.cli.verbs import build_parser

TINY = shapes.Shape(64, 48, layers=2, heads=4, experts=8, top_k=2, vocabulary=512)
SMALL = Checkpoint(Path("small"), "olmoe", 1000, 800, experts=16, top_k=2)
GIB = 1 << 30


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("shapes") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shapes.SHAPES, "tiny", TINY)
        shapes.write("tiny", folder)
    return inspect(folder)


def setting(checkpoint: Checkpoint = SMALL, memory_bytes: int = 2 * GIB, runs: int = 3) -> Setting:
    return Setting(checkpoint, memory_bytes, runs, small=lambda: SMALL)


# --- results


def test_ratio_of_medians_with_single_rounds_beside_it() -> None:
    row = compare(("name", "decode", "tokens/s"), [10, 30, 20], "peer", [5, 4, 10])
    assert (row.ours, row.other, row.ratio) == (20, 5, 4)
    assert (row.lowest, row.highest) == (2, 7.5)
    assert row.ok is None


def test_less_is_better_turns_the_ratio_around() -> None:
    row = compare(("name", "prefill", "s"), [2, 2], "peer", [6, 4], less_is_better=True)
    assert (row.ratio, row.lowest, row.highest) == (2.5, 2, 3)


def test_nothing_measured_is_no_division_by_zero() -> None:
    assert compare(("name", "decode", "tokens/s"), [1.0], "peer", [0.0]).ratio == 0


def test_best_peer_of_each_number() -> None:
    engines = {
        "a": [{"speed": 1, "seconds": 9}, {"speed": 9, "seconds": 9}, {"speed": 2, "seconds": 9}],
        "b": [{"speed": 3, "seconds": 9}, {"speed": 3, "seconds": 8}, {"speed": 3, "seconds": 8}],
    }
    assert best(engines, "speed") == ("b", [3, 3, 3])
    assert best(engines, "seconds", less_is_better=True)[0] == "b"


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([10, 10, 10], [11, 11, 11], True),
        ([10, 10, 10], [9.6, 9.6, 9.6], True),  # within the floor
        ([10, 10, 10], [9, 9, 9], False),
        ([8, 10, 12], [9, 9, 9], True),  # within the spread
        ([8, 10, 12], [7, 7, 7], False),
    ],
)
def test_not_slower_beyond_noise(before: list[float], after: list[float], expected: bool) -> None:
    assert not_slower(before, after) is expected


def test_noise_has_a_floor() -> None:
    assert noise([10, 10, 10]) == 0.05
    assert noise([8, 10, 12]) == pytest.approx(0.2)


def test_the_table_names_units_and_verdicts() -> None:
    rows = [
        compare(("slots", "decode", "tokens/s"), [3], "fewer", [2], ok=False),
        compare(("offload", "peak memory", "bytes"), [GIB], "peer", [3 * GIB], less_is_better=True),
    ]
    head, first, second = show(rows).splitlines()
    assert head.split()[:2] == ["benchmark", "what"]
    assert "3.00 tokens/s" in first
    assert first.endswith("NOT OK")
    assert "1.00 GiB" in second
    assert second.endswith("3.00")


# --- children


def test_engines_run_in_turn() -> None:
    order: list[str] = []

    def engine(name: str) -> Document:
        order.append(name)
        return {"number": len(order)}

    turns = in_turn(2, {"ours": lambda: engine("ours"), "peer": lambda: engine("peer")})
    assert order == ["ours", "peer", "ours", "peer"]
    assert turns.runs["peer"] == [{"number": 2}, {"number": 4}]


def test_a_peer_that_fails_is_left_out_and_ours_is_not() -> None:
    def fail() -> Document:
        raise ChildFailedError(["peer"], 1, "no such thing")

    turns = in_turn(2, {"ours": dict, "peer": fail})
    assert turns.runs == {"ours": [{}, {}]}
    assert turns.notes == ["peer is left out: peer: exit 1: no such thing"]
    with pytest.raises(ChildFailedError):
        in_turn(1, {"ours": fail})


def test_the_last_line_of_a_child_is_its_result() -> None:
    code = "print('loading'); print('{\"speed\": 3}')"
    done = run_child([sys.executable, "-c", code])
    assert done.document == {"speed": 3}
    assert done.wall_s > 0


@pytest.mark.parametrize("code", ["raise SystemExit(3)", "print('not JSON')", "pass"])
def test_a_child_without_a_result(code: str) -> None:
    with pytest.raises(ChildFailedError) as caught:
        run_child([sys.executable, "-c", code])
    assert not caught.value.killed


def test_children_have_no_settings_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETINUE_EXPERTS", "25%")
    assert not [key for key in child.environment() if key.startswith("RETINUE_")]


# --- groups


def test_without_permission_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(group, "ROOT", tmp_path / "missing")
    with group.memory_group(GIB) as found:
        assert found.wrap(["a", "b"]) == ["a", "b"]
        assert found.peak_bytes() is None
    assert "page cache" in found.notes[0]


def test_a_group_without_its_control_file_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cgroup.controllers").touch()
    monkeypatch.setattr(group, "ROOT", tmp_path)
    with group.memory_group(GIB) as found:
        assert found.folder is None
    assert [file.name for file in tmp_path.iterdir()] == ["cgroup.controllers"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs control groups")
def test_a_child_in_a_group_may_not_outgrow_it() -> None:
    with group.memory_group(96 << 20, drop=False) as found:
        if found.folder is None:
            pytest.skip(found.notes[0])
        small = run_child([sys.executable, "-c", "print('{}')"], found)
        assert 0 < small.document["group_peak_bytes"] <= 96 << 20
        with pytest.raises(ChildFailedError) as caught:
            run_child([sys.executable, "-c", "x = b'1' * (400 << 20)"], found)
    assert caught.value.killed
    assert not found.folder.exists()


# --- commands


def test_our_commands_are_ones_that_retinue_knows() -> None:
    command = ours.bench_command(
        SMALL.folder, prompt_tokens=5, new_tokens=3, memory=2 * GIB, experts="25%"
    )
    options = build_parser().parse_args(command[3:])
    assert (options.verb, options.model, options.json) == ("bench", "small", True)
    assert (options.prompt_tokens, options.new_tokens) == (5, 3)
    assert (options.memory, options.experts) == (str(2 * GIB), "25%")

    options = build_parser().parse_args(ours.first_token_command(SMALL, [7, 8])[3:])
    assert (options.verb, options.prompt, options.token_ids) == ("run", "7 8", True)
    assert (options.max_new_tokens, options.memory) == (1, None)


def test_peer_commands() -> None:
    counts = {"prompt_tokens": 5, "new_tokens": 3}
    words = peer_transformers.command(Path("small"), "eager", **counts)
    assert words[1:6] == ["-m", "benchmarks.peer_transformers", "small", "--experts", "eager"]
    options = peer_transformers.new_parser("any").parse_args(["small", *words[6:]])
    assert (options.prompt_tokens, options.new_tokens) == (5, 3)
    words = peer_accelerate.command(Path("small"), 77, Path("there"), **counts)
    assert words[4:8] == ["--cpu-bytes", "77", "--offload-folder", "there"]


def test_peer_speeds() -> None:
    found = peer_transformers.speeds(10, 2.0, [0.5, 0.5, 2.0])
    assert found == {
        "prefill_tokens_per_s": 5,
        "decode_tokens_per_s": 1,
        "decode_median_tokens_per_s": 2,
    }


def test_the_help_shows_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command_line.build_parser().parse_args(["--help"])
    shown = capsys.readouterr().out
    assert "example:" in shown
    assert all(f"  {name} " in shown for name in command_line.BENCHMARKS)


def test_every_benchmark_is_documented() -> None:
    text = (child.ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in text for name in command_line.BENCHMARKS)


# --- benchmarks, with canned runs


def test_a_peer_that_is_killed_gets_less_and_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def once(peer: versus._Offloading) -> Document:
        tried.append(peer.cpu_bytes)
        if len(tried) < 2:
            raise ChildFailedError(["peer"], -9, "")
        return {"decode_tokens_per_s": 1}

    monkeypatch.setattr(versus._Offloading, "_once", once)
    peer = versus._Offloading(setting())
    assert peer.run() == {"decode_tokens_per_s": 1}
    assert tried == [2 * GIB - reserve for reserve in peer_accelerate.RESERVES_BYTES[:2]]
    assert len(peer.notes) == 1


def test_what_cannot_be_compared_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    huge = Checkpoint(Path("huge"), "olmoe", 1 << 60, 1 << 59, experts=16, top_k=2)
    assert not fits_comfortably(huge)
    for report in (
        versus.in_memory(setting(huge)),
        versus.offload(setting(memory_bytes=GIB // 2)),
    ):
        assert not report.rows
        assert report.notes[0].startswith("left out: ")


def test_more_slots_that_are_slower_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = dict(zip(alone.SHARES, (5.0, 10.0, 20.0, 12.0, 40.0), strict=True))

    def bench(command: list[str]) -> Document:
        return {"decode_tokens_per_s": speeds[command[command.index("--experts") + 1]]}

    monkeypatch.setattr(alone.ours, "bench", bench)
    report = alone.slots(setting())
    assert [row.ok for row in report.rows] == [True, True, False, True]


def test_prefill_against_reading_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    run = {"prefill_s": 4.0, "disk_bytes_per_s": 400.0, "prefill_bytes_read": 800}
    monkeypatch.setattr(alone.ours, "bench", lambda command: dict(run))
    (row,) = alone.prefill(setting()).rows
    assert (row.other, row.ratio) == (2.0, 0.5)  # 800 bytes of experts at 400 a second, over 4 s


def test_the_plan_against_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    band = {"decode_tokens_per_s": {"low": 4.0, "high": 8.0}}
    band["prefill_tokens_per_s"] = {"low": 50.0, "high": 100.0}
    run = {"decode_tokens_per_s": 6.0, "prefill_tokens_per_s": 120.0}
    asked: list[tuple[int, int | None]] = []

    def predict(folder: Path, *, tokens: int, memory: int | None) -> Document:
        asked.append((tokens, memory))
        return band

    monkeypatch.setattr(alone.ours, "bench", lambda command: dict(run))
    monkeypatch.setattr(alone.ours, "plan", predict)
    rows = alone.plan(setting()).rows
    assert [(row.what, row.against, row.ok) for row in rows] == [
        ("prefill", "low end", True),
        ("prefill", "high end", False),
        ("decode", "low end", True),
        ("decode", "high end", True),
    ]
    assert asked == [(512 + 32 + 1, 2 * GIB)] * 3
    options = build_parser().parse_args(ours.plan_command(Path("m"), tokens=9, memory=7)[3:])
    assert (options.verb, options.context, options.memory) == ("plan", 9, "7")


def test_first_token_against_imports_and_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    run = {"wall_s": 10.0, "bytes_read": 1000, "disk_bytes_per_s": 450.0}
    monkeypatch.setattr(alone.ours, "first_token", lambda command, checkpoint: dict(run))
    monkeypatch.setattr(alone.ours, "imports", lambda family: {"wall_s": 2.0})
    (row,) = alone.first_token(setting()).rows
    assert row.other == pytest.approx(2 + 1.35 * 1000 / 450)


def test_a_failed_benchmark_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Setting) -> Report:
        """Fails."""
        raise ChildFailedError(["ours"], 4, "does not fit")

    def work(_: Setting) -> Report:
        """Works."""
        return Report(notes=["worked"])

    monkeypatch.setattr(command_line, "BENCHMARKS", {"a": fail, "b": work})
    reports, failed = command_line._run_all(["a", "b"], setting())
    assert failed
    assert reports["a"].notes[0].startswith("FAILED: ours: exit 4")
    assert reports["b"].notes == ["worked"]


# --- shapes


def test_a_shape_loads_in_transformers(tiny: Checkpoint) -> None:
    model, report = AutoModelForCausalLM.from_pretrained(
        tiny.folder, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, TINY.vocabulary)
    weights = model.get_input_embeddings().weight.detach().float()
    assert weights.std().item() == pytest.approx(shapes.EMBEDDING_STD, rel=0.05)
    assert model.lm_head.weight.detach().float().std().item() == pytest.approx(
        shapes.WEIGHT_STD, rel=0.05
    )


def test_a_shape_weighs_what_its_tensors_do(tiny: Checkpoint) -> None:
    assert tiny.experts == TINY.layers * TINY.experts
    assert tiny.expert_bytes == tiny.experts * 3 * TINY.hidden * TINY.intermediate * 2
    assert len(tiny.files) == TINY.layers + 1
    assert tiny.family == "olmoe"


def test_the_same_shape_has_the_same_bytes(
    tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(shapes.SHAPES, "again", TINY)
    shapes.write("again", tmp_path)
    for file in tiny.files:
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_no_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(NoCheckpointError, match="no checkpoint in"):
        inspect(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(NoCheckpointError, match="no routed experts"):
        inspect(tmp_path)


# --- one real run


@pytest.mark.slow
def test_ours_and_a_peer_on_a_tiny_shape(tiny: Checkpoint) -> None:
    counts = {"prompt_tokens": 8, "new_tokens": 4}
    engines = {
        "ours": lambda: ours.bench(ours.bench_command(tiny.folder, memory=GIB, **counts)),
        "peer": lambda: child.timed(peer_transformers.command(tiny.folder, "eager", **counts)),
    }
    turns = in_turn(1, engines)
    assert not turns.notes
    rows = versus._rows("in-memory", turns.runs["ours"], {"peer": turns.runs["peer"]})
    assert [row.what for row in rows] == ["decode", "prefill", "load and prefill", "peak memory"]
    assert all(row.ours > 0 and row.other > 0 and row.ratio > 0 for row in rows)
    assert "model" not in turns.runs["ours"][0]  # a path of this machine
