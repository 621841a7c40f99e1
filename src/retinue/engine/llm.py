"""The offline interface: `LLM(model, memory="4GiB").generate(prompts, SamplingParams(...))`."""

import operator
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from retinue.config import DEFAULT_BATCH, Config, load_config
from retinue.engine.request import Request, State, new_request
from retinue.engine.reserve import reserve
from retinue.errors import Overloaded, UsageError
from retinue.memory.machine import resident_bytes
from retinue.memory.placing import place
from retinue.types import Deadline, Output, SamplingParams, Stats

if TYPE_CHECKING:
    from retinue.engine.assembly import Assembly
    from retinue.engine.engine import Engine

Prompt = str | Sequence[int]


class LLM:
    """A Mixture-of-Experts model inside a byte budget.

    model: a checkpoint folder, a repository id, which is downloaded, or `sample`. memory: upper
    bound for the process's peak resident memory, such as `4GiB`. experts: upper bound for the
    resident experts, such as `25%`. The other settings are those of `Config`; defaults <
    `RETINUE_*` environment < arguments.

    Raises Refused before anything is loaded when the model does not fit or is not served,
    CheckpointError when its files are damaged, and DownloadError when it cannot be fetched. Not
    thread-safe but for `cancel`.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        memory: str | int | None = None,
        experts: str | int | None = None,
        preset: str | None = None,
        fetch_above: float | None = None,
        read_limit: str | int | None = None,
        task: str | None = None,
        infer_task: str | None = None,
        profile: str | Path | None = None,
        period: int | None = None,
        forecaster: str | None = None,
        precision: str | None = None,
        threads: int | None = None,
        context: int | None = None,
        kv_tokens: int | None = None,
        batch: int | None = None,
        chunk: int | None = None,
        order: str | None = None,
        first_token_deadline: float | None = None,
        token_deadline: float | None = None,
        self_check: bool | None = None,
        eager: bool | None = None,
    ) -> None:
        flags = {
            "memory": memory,
            "experts": experts,
            "preset": preset,
            "fetch_above": fetch_above,
            "read_limit": read_limit,
            "task": task,
            "infer_task": infer_task,
            "profile": None if profile is None else str(profile),
            "period": period,
            "forecaster": forecaster,
            "precision": precision,
            "threads": threads,
            "context": context,
            "kv_tokens": kv_tokens,
            "batch": batch,
            "chunk": chunk,
            "order": order,
            "first_token_deadline": first_token_deadline,
            "token_deadline": token_deadline,
            "self_check": self_check,
            "eager": eager,
        }
        config = load_config(flags)
        self._open(model, replace(config, batch=config.batch or DEFAULT_BATCH))

    @classmethod
    def from_config(cls, model: str | Path, config: Config, *, beside: int = 0) -> Self:
        """A model under a configuration that is complete already.

        beside: bytes of the budget that the caller needs for itself.
        """
        llm = cls.__new__(cls)
        llm._open(model, config, beside)
        return llm

    def _open(self, model: str | Path, config: Config, beside: int = 0) -> None:
        self.config = config
        reserved = reserve(model, config, beside)
        try:
            # torch and transformers, while the reserved memory becomes resident
            from retinue.engine.assembly import assemble
        except BaseException:
            reserved.release()
            raise
        self._assembly: Assembly | None = assemble(reserved)
        self._running: list[Request] = []

    @property
    def assembly(self) -> "Assembly":
        """The parts, for measurements. Raises UsageError after `close`."""
        if self._assembly is None:
            raise UsageError("the model is closed", hint="open it again: `LLM(...)`")
        return self._assembly

    @property
    def tokenizer(self) -> Any | None:
        """The checkpoint's tokenizer, if it has one."""
        return self.assembly.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        reuse: bool | None = None,
        progress: bool = True,
        task: str | None = None,
        deadline: Deadline | None = None,
    ) -> list[Output]:
        """Answer each prompt, a text or a list of token ids; a progress bar goes to stderr.

        `task` names the kind of work, for presets that know tasks; default: that of `task_of`.
        `deadline` says when tokens are due; default: the configuration's for that task.
        Prompts are answered together, as many as `batch` and `kv_tokens` allow. `reuse` lets those
        that begin alike compute that part once: by default where there are several. Alone, a
        prompt's answer does not depend on others; together, logits may differ by rounding.

        Raises UsageError for a prompt that is none, empty or too long, and whatever made an answer
        fail, such as Overloaded, after the other prompts were answered; the model stays usable.
        """
        if not isinstance(prompts, Sequence):
            raise _no_prompt(prompts)
        single = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int))
        batch: Sequence[Any] = [prompts] if single else prompts
        # All are checked before the first one runs.
        ids = [self._checked(prompt) for prompt in batch]
        params = params or SamplingParams()
        shared = len(ids) > 1 if reuse is None else reuse
        requests = [
            self._request(each, params, shared, self.task_of(prompt, each, task), deadline)
            for prompt, each in zip(batch, ids, strict=True)
        ]
        with _bar(len(ids), progress) as bar:
            for _ in self.serve(requests):
                bar.update(sum(1 for request in requests if request.state.final) - bar.n)
        return [self._output(request, request.take_delta()) for request in requests]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        reuse: bool = False,
        task: str | None = None,
        deadline: Deadline | None = None,
    ) -> Iterator[Output]:
        """Yield the answer as it grows; the last Output has a finish_reason and stats.

        `reuse` lets what other sequences computed serve the prefix that both share, as in a
        conversation. Its logits may differ by rounding from those of a fresh prompt. Several
        streams may be open at once; each step of one serves them all.
        """
        ids = self._checked(prompt)
        task = self.task_of(prompt, ids, task)
        return self._stream(self._request(ids, params or SamplingParams(), reuse, task, deadline))

    def cancel(self) -> None:
        """End all running answers as soon as their layer allows. From any thread or a signal."""
        for request in tuple(self._running):
            request.cancelled.set()

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a text with the tokenizer's own special tokens; ids stay as they are.

        Raises UsageError for what is neither, and for a text where there is no tokenizer.
        """
        if not isinstance(prompt, str):
            return _ids(prompt)
        if self.tokenizer is None:
            raise UsageError(
                "the checkpoint has no tokenizer", hint="give the prompt as a list of token ids"
            )
        return list(self.tokenizer(prompt)["input_ids"])

    def task_of(self, prompt: Prompt, ids: Sequence[int], task: str | None = None) -> str | None:
        """The task of a request: `task`, else the model's own, else what the prompt looks like.

        ids: the prompt's. None where it looks like no task, for presets that ask for none, and
        for a name beyond the first `task_names.MOST_TASKS`.
        """
        if (named := task or self.config.task) is not None:
            return self.assembly.task_names.told(named)
        text = prompt if isinstance(prompt, str) else ""
        return self.assembly.classifier.classify(text, ids)

    def close(self) -> None:
        """Free threads, files and memory. Idempotent."""
        if self._assembly is not None:
            self._assembly.close()
            self._assembly = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def run(self, request: Request) -> Iterator[str]:
        """Run a request that was made by hand to its end; yields the text that is new."""
        told = False
        for _ in self.serve([request]):
            told = request.state.final
            yield request.take_delta()
        if not told:  # a step of another stream has ended it
            yield request.take_delta()

    def serve(self, requests: Sequence[Request]) -> Iterator[None]:
        """Run requests to their ends; yields after each step in which one of them got further.

        The last time is when all have ended. Raises what made one of them fail, after that. Those
        that still run when the caller leaves early are cancelled.
        """
        engine = self.assembly.engine
        for request in requests:
            engine.check(request.prompt, request.params)
        coming = deque(requests)
        self._running += requests
        told, ours = not requests, set(requests)
        try:
            while not all(request.state.final for request in requests):
                _queue(engine, coming)
                moved = self.assembly.engine.step()  # asked anew: it may have been closed
                if not ours.isdisjoint(moved):
                    told = all(request.state.final for request in requests)
                    yield
            if not told:  # another caller's steps brought the end
                yield
            if not engine.busy:
                engine.idle()
        finally:
            for request in coming:
                request.end(State.CANCELLED, "cancelled")
            for request in requests:
                self._running.remove(request)
                request.cancelled.set()
            if self._assembly is not None and not all(r.state.final for r in requests):
                engine.end_cancelled()
        for request in requests:
            if request.state is State.FAILED and request.error is not None:
                raise request.error

    def fill(self) -> None:
        """Read every expert now, where all of them fit, and wait for the memory of the slots.

        Both else happen while the first requests run. The time counts as `load_s`. Raises the error
        of a read that failed.
        """
        assembly, started = self.assembly, time.perf_counter()
        if assembly.cache.holds_everything:  # what is read goes to slots that are ready
            place(assembly.cache, assembly.network.experts.there)
        assembly.tier.finish()
        assembly.load_s += time.perf_counter() - started

    def stats(self, request: Request) -> Stats:
        """What `request` has cost. Passes that served several requests count for each of them."""
        return _stats(self.assembly, request)

    def _request(
        self,
        ids: list[int],
        params: SamplingParams,
        reuse: bool,
        task: str | None,
        deadline: Deadline | None,
    ) -> Request:
        deadline = deadline or self.config.deadline(task)
        return new_request(ids, params, self.tokenizer, reuse=reuse, task=task, deadline=deadline)

    def _checked(self, prompt: Prompt) -> list[int]:
        ids = self.encode(prompt)
        self.assembly.engine.check(ids)
        return ids

    def _stream(self, request: Request) -> Iterator[Output]:
        for delta in self.run(request):
            if delta or request.state.final:
                yield self._output(request, delta)

    def _output(self, request: Request, delta: str) -> Output:
        final = request.state.final
        return Output(
            text=request.text.text,
            token_ids=list(request.token_ids),
            finish_reason=request.finish_reason,
            prompt_tokens=len(request.prompt),
            delta=delta,
            logprobs=list(request.logprobs) if request.params.logprobs is not None else None,
            stats=self.stats(request) if final else Stats(),
            task=request.task,
        )


def _queue(engine: "Engine", coming: deque[Request]) -> None:
    """Add those that are `coming` as long as more may wait; who comes too late fails."""
    while coming and len(engine.scheduler.waiting) < engine.limits.queue:
        request = coming.popleft()
        try:
            engine.add(request)
        except Overloaded as error:
            request.end(State.FAILED, "error", error)


def _ids(prompt: Sequence[int]) -> list[int]:
    """Token ids as Python's own numbers, from whatever counts as a whole number."""
    try:
        return [operator.index(token) for token in prompt]
    except TypeError as error:
        raise _no_prompt(prompt) from error


def _no_prompt(value: object) -> UsageError:
    kind = type(value).__name__
    return UsageError(
        f"not a prompt: {kind} `{value!r:.60}`", hint="a text, or a list of token ids"
    )


def _stats(assembly: "Assembly", request: Request) -> Stats:
    prefill, decode = request.costs.prefill, request.costs.decode
    steps = decode.steps_s
    return Stats(
        load_s=assembly.load_s,
        ttft_s=request.first_token_s,
        prefill_s=prefill.seconds,
        decode_s=decode.seconds,
        prefill_tokens_per_s=_rate(prefill.tokens, prefill.seconds),
        decode_tokens_per_s=_rate(decode.tokens, decode.seconds),
        decode_median_tokens_per_s=_rate(1, statistics.median(steps) if steps else 0),
        peak_rss_bytes=resident_bytes(peak=True),
        budget_bytes=assembly.split.budget,
        resident_experts=assembly.cache.resident,
        total_experts=assembly.cache.total,
        hits=decode.hits,
        pending=decode.pending,
        misses=decode.misses,
        hit_rate=decode.hit_rate,
        bytes_read=decode.bytes_read,
        bytes_read_per_token=_rate(decode.bytes_read, decode.tokens),
        read_bytes_per_s=_rate(decode.bytes_read, decode.seconds),
        stall_s=decode.stall_s,
        expert_s=decode.expert_s,
        dense_s=decode.dense_s,
        overhead_s=decode.overhead_s,
        degraded_share=decode.degraded_share,
        used_bytes_read=decode.used_bytes_read,
        prefill_bytes_read=prefill.bytes_read,
        prefill_stall_s=prefill.stall_s,
        prefill_expert_s=prefill.expert_s,
        prefill_dense_s=prefill.dense_s,
        prefill_overhead_s=prefill.overhead_s,
        reused_tokens=request.reused,
        **decode.counts,
        **{f"prefill_{name}": count for name, count in prefill.counts.items()},
        late_s=decode.computing.slope,
        start_s=decode.starting.slope,
        expand_s=assembly.expand_s,
    )


def _rate(count: float, seconds: float) -> float:
    return count / seconds if seconds else 0.0


def _bar(total: int, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, disable=not shown or total < 2, unit="prompt", dynamic_ncols=True)
