"""Our side: the commands that measure retinue, always through its own command line."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.checkpoint import Checkpoint
from benchmarks.child import Done, run_child
from benchmarks.group import Group
from benchmarks.results import Document

from retinue.memory.machine import known_speeds, measure_disk

# What any engine over transformers has to import before it can read a weight.
_IMPORTS = (
    "import json, torch, safetensors.torch;"
    " import transformers.models.auto.modeling_auto;"
    " import transformers.models.{family}.modeling_{family};"
    " print(json.dumps(dict(torch=torch.__version__)))"
)


# In a child, since it needs torch.
_RATES = (
    "from retinue.memory.process import prepare; prepare();"
    " from retinue.memory.machine import cores; from retinue.memory.rates import known_rates;"
    " known_rates(cores(), ['bfloat16', 'float16', 'float32', 'int8', 'int4'], fresh=True);"
    " print('{}')"
)


def bench_command(
    folder: Path,
    *,
    prompt_tokens: int,
    new_tokens: int,
    memory: int | None = None,
    experts: str | None = None,
) -> list[str]:
    """`retinue bench` with its JSON; without `memory` it has its own default."""
    command = [sys.executable, "-m", "retinue", "bench", str(folder), "--json"]
    command += ["--prompt-tokens", str(prompt_tokens), "--new-tokens", str(new_tokens)]
    if memory is not None:
        command += ["--memory", str(memory)]
    if experts is not None:
        command += ["--experts", experts]
    return command


def plan_command(folder: Path, *, tokens: int, memory: int | None = None) -> list[str]:
    """`retinue plan` with its JSON, for work of so many tokens."""
    command = [sys.executable, "-m", "retinue", "plan", str(folder), "--json"]
    command += ["--context", str(tokens)]
    return command if memory is None else [*command, "--memory", str(memory)]


def plan(folder: Path, *, tokens: int, memory: int | None = None) -> Document:
    """The plan from speeds that are measured now, not remembered."""
    measure_and_remember(folder)
    done = run_child(plan_command(folder, tokens=tokens, memory=memory))
    return {key: done.document[key] for key in ("decode_tokens_per_s", "prefill_tokens_per_s")}


def measure_and_remember(folder: Path) -> None:
    """Let `plan` find the speeds of now: of the disk that `folder` is on, and of the kernels."""
    known_speeds(folder, fresh=True)
    run_child([sys.executable, "-c", _RATES])


def first_token_command(
    checkpoint: Checkpoint, ids: Sequence[int], *, memory: int | None = None
) -> list[str]:
    """`retinue run` that ends with the first new token."""
    command = [sys.executable, "-m", "retinue", "run", str(checkpoint.folder)]
    command += [" ".join(map(str, ids)), "--token-ids", "--max-new-tokens", "1", "--ignore-eos"]
    command += ["--context", str(len(ids) + 1), "--json"]
    if memory is not None:
        command += ["--memory", str(memory)]
    return command


def imports_command(family: str) -> list[str]:
    """A process that only imports what the model's family needs."""
    return [sys.executable, "-c", _IMPORTS.format(family=family)]


def bench(command: Sequence[str], group: Group | None = None) -> Document:
    """Run a `bench_command`; the result has the whole process's time as `wall_s`."""
    return _with_wall(run_child(command, group))


def _with_wall(done: Done) -> Document:
    document = {key: value for key, value in done.document.items() if key != "model"}
    return document | {"wall_s": round(done.wall_s, 4)}


def first_token(command: Sequence[str], checkpoint: Checkpoint) -> Document:
    """Run a `first_token_command`, with the disk's speed before and after it."""
    before = measure_disk(checkpoint.files)
    done = run_child(command)
    after = measure_disk(checkpoint.files)
    read = checkpoint.dense_bytes + done.document["stats"]["prefill_bytes_read"]
    return {
        "wall_s": done.wall_s,
        "bytes_read": read,
        "disk_bytes_per_s": (before + after) / 2,
        "stats": done.document["stats"],
    }


def imports(family: str) -> Document:
    """How long a process takes that only imports."""
    started = time.perf_counter()
    run_child(imports_command(family))
    return {"wall_s": time.perf_counter() - started}
