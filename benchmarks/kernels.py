"""The native kernels against memory and against torch's own products: `kernels`."""

import sys
from functools import partial

from benchmarks.child import in_turn, run_child
from benchmarks.results import Document, Report, Row, compare
from benchmarks.setting import Setting

COMMAND = [sys.executable, "-m", "benchmarks.kernels_child"]
PROMISED_SHARE = 0.8
GB, TERA = 1e9, 1e12


def kernels(setting: Setting) -> Report:
    """One token through experts and linear layers against memory; 64 tokens against torch."""
    turns = in_turn(setting.runs, {"ours": partial(_measure, COMMAND)})
    runs = turns.runs["ours"]
    rows = [
        _streamed(name, runs) if isinstance(found, dict) else _prefill(name, runs)
        for name, found in runs[0].items()
        if name not in ("features", "threads", "prefill torch")
    ]
    note = f"{runs[0]['features']}, {runs[0]['threads']} threads"
    return Report(rows, [note, *turns.notes], turns.runs)


def _measure(command: list[str]) -> Document:
    return run_child(command).document


def _streamed(name: str, runs: list[Document]) -> Row:
    return compare(
        ("kernels", f"{name}, one token", "GB/s"),
        [run[name]["bytes_per_s"] / GB for run in runs],
        "memory",
        [run[name]["memory_bytes_per_s"] / GB for run in runs],
    ).promised(PROMISED_SHARE)


def _prefill(name: str, runs: list[Document]) -> Row:
    return compare(
        ("kernels", f"{name.removeprefix('prefill ')}, 64 tokens an expert", "TOP/s a core"),
        [run[name] / TERA for run in runs],
        "torch in bf16",
        [run["prefill torch"] / TERA for run in runs],
    )
