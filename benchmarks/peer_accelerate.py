"""The peer for models that exceed memory: transformers with accelerate's offload to disk.

    python -m benchmarks.peer_accelerate CHECKPOINT --cpu-bytes 5500000000

What does not fit into the CPU bytes is written to the offload folder, in the form in which the
model wants it, and read back by every forward pass. No pass goes before the clock: it would
read as much as a step. The last line is one JSON document.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.peer_transformers import measure, new_parser, peak_rss_bytes, prepare

# What the process holds beside the weights that it was allowed: libraries, and the layer that
# is being read. Where the kernel kills the peer for it, the next one is tried.
RESERVES_BYTES = (900_000_000, 1_350_000_000, 1_800_000_000)


def command(
    folder: Path, cpu_bytes: int, offload_folder: Path, *, prompt_tokens: int, new_tokens: int
) -> list[str]:
    """What starts this peer."""
    words = [sys.executable, "-m", "benchmarks.peer_accelerate", str(folder)]
    words += ["--cpu-bytes", str(cpu_bytes), "--offload-folder", str(offload_folder)]
    return [*words, "--prompt-tokens", str(prompt_tokens), "--new-tokens", str(new_tokens)]


def main() -> None:
    """Load, measure, print."""
    parser = new_parser("peer_accelerate")
    parser.add_argument("--cpu-bytes", type=int, required=True, metavar="N")
    parser.add_argument("--offload-folder", metavar="DIR", help="(default: a temporary one)")
    options = parser.parse_args()
    prepare(options)
    import torch
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
        started = time.perf_counter()
        model: Any = AutoModelForCausalLM.from_pretrained(
            options.checkpoint,
            dtype=torch.bfloat16,
            device_map="auto",
            max_memory={"cpu": options.cpu_bytes},
            offload_folder=options.offload_folder or temporary,
        )
        document: dict[str, Any] = {"engine": "transformers with accelerate"}
        document |= {"load_s": time.perf_counter() - started}
        devices = [str(device) for device in getattr(model, "hf_device_map", {}).values()]
        document |= {"modules": len(devices), "modules_on_disk": devices.count("disk")}
        document |= measure(model, options.prompt_tokens, options.new_tokens)
    print(json.dumps(document | {"peak_rss_bytes": peak_rss_bytes()}), flush=True)


if __name__ == "__main__":
    main()
