"""The peer for weights of four bits: llama.cpp, through llama-cpp-python.

    python -m benchmarks.peer_llamacpp FILE.gguf --repack

Without `--repack` the weights stay mapped from the file, the only way in which llama.cpp runs a
model that exceeds memory. With it they are rearranged while loading, which is its fastest way, and
a short pass goes before the clock. The same ids as `retinue bench` feeds, in the same order.
The last line is one JSON document.
"""

import ctypes
import importlib.util
import json
import random
import sys
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from benchmarks.peer_transformers import WARM_UP_TOKENS, _cores, peak_rss_bytes, speeds

PACKAGES = ("llama_cpp", "gguf")
HOW_TO_INSTALL = "pip install llama-cpp-python gguf` (it compiles llama.cpp for this machine)"


def missing() -> str:
    """What a reader must do before this peer can run; empty where nothing is missing."""
    lacking = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    return f"{' and '.join(lacking)} not installed: `{HOW_TO_INSTALL}" if lacking else ""


def command(file: Path, *, repack: bool, prompt_tokens: int, new_tokens: int) -> list[str]:
    """What starts this peer."""
    words = [sys.executable, "-m", "benchmarks.peer_llamacpp", str(file)]
    words += ["--repack"] * repack
    return [*words, "--prompt-tokens", str(prompt_tokens), "--new-tokens", str(new_tokens)]


def build_parser() -> ArgumentParser:
    """The options of this peer."""
    parser = ArgumentParser(prog="python -m benchmarks.peer_llamacpp")
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--repack", action="store_true", help="rearrange the weights for speed")
    parser.add_argument("--prompt-tokens", type=int, default=512, metavar="N")
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N")
    parser.add_argument("--threads", type=int, metavar="N", help="(default: all cores allowed)")
    return parser


class Session:
    """One loaded model with one context."""

    def __init__(self, options: Namespace) -> None:
        import llama_cpp as lib

        self._lib = lib
        self._quiet = lib.llama_log_callback(
            lambda *_: None
        )  # kept: the library holds no reference
        lib.llama_log_set(self._quiet, ctypes.c_void_p(0))
        lib.llama_backend_init()
        of_model = lib.llama_model_default_params()
        of_model.use_extra_bufts = options.repack
        self._model: Any = lib.llama_model_load_from_file(options.file.encode(), of_model)
        if not self._model:
            sys.exit(f"llama.cpp cannot load {options.file}")
        of_context = lib.llama_context_default_params()
        of_context.n_ctx = options.prompt_tokens + options.new_tokens + WARM_UP_TOKENS
        of_context.n_batch = max(options.prompt_tokens, WARM_UP_TOKENS)
        of_context.n_threads = of_context.n_threads_batch = options.threads or _cores()
        self._context: Any = lib.llama_init_from_model(self._model, of_context)
        self.vocabulary: int = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))

    def feed(self, ids: list[int]) -> float:
        """Append `ids` in one pass; returns its seconds."""
        array = (self._lib.llama_token * len(ids))(*ids)
        started = time.perf_counter()
        code = self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(array, len(ids)))
        elapsed = time.perf_counter() - started
        if code != 0:
            sys.exit(f"llama_decode ended with {code}")
        return elapsed

    def forget(self) -> None:
        """Begin anew, with nothing in the context."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)


def main() -> None:
    """Load, measure, print."""
    options = build_parser().parse_args()
    started = time.perf_counter()
    session = Session(options)
    if options.repack:
        session.feed([0] * WARM_UP_TOKENS)
        session.forget()
    load_s = time.perf_counter() - started
    source = random.Random(0)

    def drawn(count: int) -> list[int]:
        return [source.randrange(session.vocabulary) for _ in range(count)]

    prefill_s = session.feed(drawn(options.prompt_tokens))
    steps_s = [session.feed(drawn(1)) for _ in range(options.new_tokens)]
    document = {"engine": "llama.cpp", "load_s": load_s, "prefill_s": prefill_s}
    document |= speeds(options.prompt_tokens, prefill_s, steps_s)
    print(json.dumps(document | {"peak_rss_bytes": peak_rss_bytes()}), flush=True)


if __name__ == "__main__":
    main()
