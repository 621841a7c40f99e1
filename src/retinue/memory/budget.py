"""Splits one number of bytes into everything the process holds, before anything is loaded.

    runtime      interpreter, libraries, threads: what is there with no model at all; a server too
    dense        every weight that is not a routed expert; without the embedding's rows, where
                 they may stay in their file and experts lack the room
    kv           keys, values and states of all sequences that run at once
    workspace    activations of the largest prefill chunk
    experts      slots, whatever the rest leaves

The first four are needed whole; what cannot fit is refused here, with the smallest budget that
would work. A control group also charges kernel memory, hence the reserve within `runtime`.
Of what the others do not use, experts may take `more` slots, see `memory/lending.py`.
"""

from dataclasses import dataclass
from pathlib import Path

from retinue.config import DEFAULT_CONTEXT, Config, format_size, parse_size
from retinue.errors import DoesNotFit, UsageError
from retinue.memory.machine import available_bytes, resident_bytes
from retinue.types import Facts

# Measured with olmoe, qwen3_moe and mixtral on Linux, see docs/LOG.md: the process with its
# libraries imported and its threads started, and page tables, file handles and stacks.
RUNTIME_BYTES = 470 << 20
RESERVE_BYTES = 48 << 20
DECODING_BYTES = 16 << 20  # scratch of the threads that do so
CHUNK_TOKENS: int = Config().chunk
_LESS = "a smaller `--context`, `--kv-tokens`, `--chunk` or `--batch`"


@dataclass(frozen=True, slots=True)
class Split:
    """Where the bytes of a budget go; `fixed` is runtime and dense weights together.

    `embedding_stays`: the embedding's rows are not among them, they stay in their file. `more`:
    slots at most that may come on top, while others do not use what is theirs. `beside`: what of
    `fixed` is for the program around the engine.
    """

    budget: int
    fixed: int
    kv: int
    workspace: int
    slots: int
    slot_bytes: int
    context: int
    kv_tokens: int
    chunk: int
    smallest: int
    embedding_stays: bool = False
    more: int = 0
    beside: int = 0

    @property
    def experts(self) -> int:
        """Bytes of all slots."""
        return self.slots * self.slot_bytes


def nested_bytes(slot_bytes: int) -> int:
    """What it takes to decode experts of other precisions, two at once, or to encode one."""
    return 2 * slot_bytes + DECODING_BYTES


def context_tokens(facts: Facts, context: int | None) -> int:
    """The context to make room for. Raises UsageError for one that the model does not have."""
    if context is None:
        return min(DEFAULT_CONTEXT, facts.max_context)
    if context > facts.max_context:
        raise UsageError(
            f"context is out of range: `{context}`", hint=f"the model has {facts.max_context}"
        )
    return context


def pool_tokens(context: int, kv_tokens: int | None) -> int:
    """Tokens of all sequences together. Raises UsageError if the longest one has no room."""
    if kv_tokens is not None and kv_tokens < context:
        raise UsageError(
            f"kv_tokens is out of range: `{kv_tokens}`, the context alone has {context}",
            hint=f"use `--kv-tokens {context}` or more, or a smaller `--context`",
        )
    return kv_tokens or context


def workspace_bytes(facts: Facts, chunk: int, context: int, pool: int) -> int:
    """What a pass over `chunk` tokens computes in, at most.

    context: tokens of the longest sequence. pool: of all of them.
    """
    count = facts.workspace_bytes + facts.workspace_bytes_per_context * pool
    # Sequences whose blocks are not neighbours are copied together, layer by layer.
    count += facts.kv_bytes_per_token * pool // facts.layers
    count += facts.workspace_bytes_per_token * chunk
    return count + facts.workspace_bytes_per_pair * chunk * context


def budget_bytes(memory: str | int) -> int:
    """`--memory` in bytes, but no more than this process holds and could still take.

    A share is one of that. The reserve is tolerance: it is there for what a control group has
    charged to us and no process holds.
    """
    possible = available_bytes() + resident_bytes()
    return min(parse_size(memory, whole=possible), possible + RESERVE_BYTES)


def fits_whole(folder: Path, memory: str | int) -> bool:
    """Whether `memory` surely holds the whole checkpoint, by the sizes of its files alone."""
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return weights + RUNTIME_BYTES + RESERVE_BYTES <= budget_bytes(memory)


def split(
    facts: Facts,
    *,
    memory: str | int,
    context: int | None = None,
    experts: str | int | None = None,
    kv_tokens: int | None = None,
    chunk: int = CHUNK_TOKENS,
    batch: int = 1,
    each_layer: bool = False,
    beside: int = 0,
) -> Split:
    """Divide `memory`, or raise DoesNotFit with the smallest budget that would work.

    `each_layer` says that one token's experts of every layer must be resident at once, `beside`
    how many bytes the program around the engine needs, such as a server.
    """
    least = facts.min_slots * (facts.moe_layers if each_layer else 1)
    budget = budget_bytes(memory)
    tokens = context_tokens(facts, context)
    pool = pool_tokens(tokens, kv_tokens)
    # Depends on nothing that residency could change: not on the memory.
    chunk = min(tokens, chunk)
    fixed = RUNTIME_BYTES + RESERVE_BYTES + beside + facts.dense_bytes
    # A pass over running states works on a copy of them.
    kv = facts.kv_bytes_per_token * pool + 2 * facts.state_bytes * batch
    workspace = workspace_bytes(facts, chunk, tokens, pool)
    needed = fixed + kv + workspace
    most = facts.total_experts
    if experts is not None:
        most = min(most, _slot_limit(facts, experts, least))
    smallest = needed - facts.embedding_bytes + least * facts.slot_bytes
    embedding_stays = facts.embedding_bytes > 0 and budget < needed + most * facts.slot_bytes
    if embedding_stays:
        fixed, needed = fixed - facts.embedding_bytes, needed - facts.embedding_bytes
    if budget < smallest:
        raise DoesNotFit(
            f"`{facts.name}` does not fit into {format_size(budget)}:"
            f" it needs at least {format_size(smallest)} for {tokens} tokens of context",
            smallest_bytes=smallest,
            hint=_hint(smallest),
        )
    slots = min((budget - needed) // facts.slot_bytes, most)
    unused = (RUNTIME_BYTES + kv + workspace) // facts.slot_bytes if experts is None else 0
    return Split(
        budget,
        fixed,
        kv,
        workspace,
        slots,
        facts.slot_bytes,
        tokens,
        pool,
        chunk,
        smallest,
        embedding_stays,
        more=min(unused, most - slots),
        beside=beside,
    )


def _hint(smallest: int) -> str:
    possible = available_bytes() + resident_bytes()
    if smallest > possible:
        return (
            f"only {format_size(possible)} are available: close other programs, raise the limit, or"
            f" use {_LESS}"
        )
    return f"use `--memory {smallest}` or more, or {_LESS}"


def _slot_limit(facts: Facts, experts: str | int, least: int) -> int:
    """`--experts` in slots: a share of all experts, or a size."""
    whole = facts.total_experts * facts.slot_bytes
    slots = parse_size(experts, whole=whole) // facts.slot_bytes
    if slots < least:
        whole = facts.min_slots < least
        raise DoesNotFit(
            f"`--experts {experts}` leaves room for {slots} experts; one token needs"
            f" {least} at once" + " over all layers, since this preset keeps a set in each" * whole,
            smallest_bytes=least * facts.slot_bytes,
            hint=f"use `--experts {least * facts.slot_bytes}` or more"
            + ", or an exact preset" * whole,
        )
    return int(slots)
