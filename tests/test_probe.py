"""How fast kernels multiply: every format is measured through what the engine would use."""

from collections.abc import Iterator

import pytest
import torch

from retinue.memory import machine, native, probe, rates
from retinue.memory.machine import Rate
from retinue.memory.native import Format

FORMATS = {"bfloat16", "float16", "float32", "int8", "int4"}
LITTLE = 1 << 20  # less than one expert, which is then all that is taken


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of which each reading is 10 ms after the one before."""
    readings = iter(range(10**9))
    monkeypatch.setattr(probe, "SLICES", 3)
    monkeypatch.setattr(probe.time, "perf_counter", lambda: next(readings) / 100)


@pytest.fixture(autouse=True)
def few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kernels", [True, False])
def test_every_format_has_a_rate(
    monkeypatch: pytest.MonkeyPatch, ticks: None, kernels: bool
) -> None:
    if not kernels:
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip(f"{native.why_not()}")
    found = probe.measure_rates(1, FORMATS, seconds=0.03, at_most_bytes=LITTLE)
    assert set(found) == FORMATS
    numbers = 3 * probe.HIDDEN * probe.INNER
    # 50 runs a second; the library has as many experts in a run as there is memory for.
    rate = found["float32"]
    assert rate.row_bytes_per_s == pytest.approx(50 * 4 * numbers)
    assert rate.flops_per_s == pytest.approx(50 * 2 * numbers * probe.TOKENS)
    small = found["int4"].row_bytes_per_s / (50 * probe._size(Format.INT4))
    assert small == pytest.approx(7 if kernels else 1)


def test_the_best_slice_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second each for three, then five experts; 8 in the third slice, which took four."""
    readings = iter([0.0, 0.0, 1.0, 10.0, 10.0, 11.0, 20.0, 20.0, 24.0])
    monkeypatch.setattr(probe, "SLICES", 3)
    monkeypatch.setattr(probe.time, "perf_counter", lambda: next(readings))
    counts = iter([1, 3, 5, 8])
    seen: list[int] = []

    def run(at: int) -> int:
        seen.append(at)
        return next(counts)

    assert probe._per_second(run, 3.0) == 5
    assert seen == [0, 1, 4, 9]


def test_all_experts_are_read_before_one_is_read_again() -> None:
    library = native.library()
    if library is None:
        pytest.skip(f"{native.why_not()}")
    seen: list[int] = []

    class Recording:
        def experts(self, shape: object, parts: torch.Tensor, *_: object) -> None:
            seen.extend(((parts[:, 0] - data.data_ptr()) // size).tolist())

    size = probe._size(Format.INT8)
    data = torch.zeros(20 * size + 5, dtype=torch.uint8)
    run = probe._by_library(Recording(), Format.INT8, data)  # type: ignore[arg-type]
    done = 0
    for _ in range(5):
        done += run(1, done)
    assert seen == [number % 20 for number in range(40)]


def test_rates_are_remembered_per_threads_and_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, list[str], int]] = []

    def measure(threads: int, formats: list[str], *, at_most_bytes: int) -> dict[str, Rate]:
        asked.append((threads, formats, at_most_bytes))
        return dict.fromkeys(formats, Rate(float(len(asked)), 7.0))

    def known(threads: int, *formats: str, **options: int) -> dict[str, float]:
        found = rates.known_rates(threads, formats, **options)  # type: ignore[arg-type]
        return {name: rate.row_bytes_per_s for name, rate in found.items()}

    monkeypatch.setattr(probe, "measure_rates", measure)
    assert rates.remembered_rates(77) == {}
    assert known(77, "int4", at_most_bytes=1 << 40) == {"int4": 1.0}
    assert known(77, "int4") == {"int4": 1.0}
    assert asked == [(77, ["int4"], rates.WEIGHTS_BYTES)]
    assert known(77, "int4", "int8", at_most_bytes=5) == {"int4": 1.0, "int8": 2.0}
    assert asked[1:] == [(77, ["int8"], 5)]
    assert known(77, "int4", fresh=True) == {"int4": 3.0, "int8": 2.0}
    assert known(78, "int4") == {"int4": 4.0}
    assert rates.remembered_rates(77)["int4"].row_bytes_per_s == 3
    monkeypatch.setenv("RETINUE_NATIVE", "0")
    assert rates.remembered_rates(77) == {}
    monkeypatch.delenv("RETINUE_NATIVE")
    (machine.cache_folder() / rates._name(77)).write_text("{")
    assert rates.remembered_rates(77) == {}


def test_the_library_is_looked_for_where_it_is_loaded_from() -> None:
    assert rates._LIBRARY == native.LIBRARY
    assert native.SWITCH in rates._SWITCHES
