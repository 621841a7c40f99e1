"""`make demo`: four prompts of different tasks with all experts, and with a quarter of them."""

import json
import sys
from dataclasses import dataclass

from retinue.cli.terminal import note, styled, table
from retinue.config import format_size
from retinue.engine.llm import LLM
from retinue.memory.home import SAMPLE, sample_tasks
from retinue.metrics import Costs
from retinue.types import Output, SamplingParams

TASKS = ("dialogue", "sql", "math_qa", "english_prose")
SHARES = ("100%", "25%")
PARAMS = SamplingParams(max_new_tokens=48, ignore_eos=True)


@dataclass(frozen=True, slots=True)
class Run:
    """The answers with one share of the experts, and the memory that these took."""

    share: str
    outputs: list[Output]
    expert_bytes: int
    costs: Costs  # of all passes: those that served several prompts count once


def main() -> int:
    """Run the demonstration; returns 0 if both runs gave the same tokens."""
    prompts = _prompts()
    runs = [_run(share, list(prompts.values())) for share in SHARES]
    for task, whole, part in zip(prompts, runs[0].outputs, runs[1].outputs, strict=True):
        same = whole.token_ids == part.token_ids
        verdict = styled("same tokens", "green", sys.stdout) if same else "DIFFERENT TOKENS"
        print(
            f"{styled(task, 'bold', sys.stdout)}  ({verdict} with all and a quarter of the experts)"
        )
        print("  " + " ".join(prompts[task][-60:].split()), "...")
        print("  ->", " ".join(whole.text.split()), "\n")
    print(_table(runs))
    equal = [r.token_ids for r in runs[0].outputs] == [r.token_ids for r in runs[1].outputs]
    print("\nall tokens are equal" if equal else "\nthe tokens differ: this is a defect")
    return 0 if equal else 1


def _prompts() -> dict[str, str]:
    """One prompt of each task, its last part where it is long."""
    rows = [json.loads(line) for line in sample_tasks().read_text(encoding="utf-8").splitlines()]
    found: dict[str, str] = {}
    for row in rows:
        found.setdefault(row["task"], row["prompt"][-600:])
    return {task: found[task] for task in TASKS}


def _run(share: str, prompts: list[str]) -> Run:
    note(f"loading the sample model with {share} of its experts")
    with LLM(SAMPLE, memory="2GiB", experts=share) as llm:
        outputs = llm.generate(prompts, PARAMS, progress=sys.stderr.isatty())
        assembly = llm.assembly
        expert_bytes = assembly.cache.resident * assembly.facts.expert_bytes
        return Run(share, outputs, expert_bytes, assembly.metrics.total)


def _table(runs: list[Run]) -> str:
    rows = []
    for run in runs:
        stats, decode = run.outputs[-1].stats, run.costs.decode
        read = decode.bytes_read + run.costs.prefill.bytes_read
        rows.append(
            (
                run.share,
                f"{stats.resident_experts} of {stats.total_experts}",
                format_size(run.expert_bytes),
                f"{decode.hit_rate:.0%}",
                format_size(read),
                f"{decode.tokens / decode.seconds:.1f}",
            )
        )
    header = ("experts", "resident", "resident bytes", "hit rate", "bytes read", "tokens/s")
    return table(header, rows)


if __name__ == "__main__":
    sys.exit(main())
