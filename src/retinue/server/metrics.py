"""What Prometheus reads: vLLM's names where they exist, ours for experts and memory.

Latencies are measured on the loop, when a piece is ready to be sent; the engine's own counters come
from the last picture. `docs/server.md` lists every name.
"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from retinue.engine.request import Request
from retinue.server.call import Call, Piece
from retinue.server.served import Picture, Served
from retinue.server.tally import Tally

LABEL = "model_name"
FIRST_TOKEN_S = (0.01, 0.02, 0.04, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
BETWEEN_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
REQUEST_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)

LAYER_COUNTERS = {
    "hits": "experts asked for that were in memory",
    "pending": "experts asked for that were on their way",
    "misses": "experts asked for that were neither",
    "missed": "tokens' chosen experts that were not there, where others may serve",
    "fetched": "of those, read for their token, not replaced",
    "routed_weight": "weight that routers gave, where a policy may choose otherwise",
    "degraded_weight": "of it, served by other experts than the routers'",
}
READ_COUNTERS = (
    ("reads", "experts read to the end, ahead or when they were missing, or for a new set"),
    ("read_bytes", "bytes of those reads"),
)
TASK_COUNTERS = {
    "answered": "answers that came to their end",
    "refused": "requests refused since too much waits",
    "deadlines_met": "answers each of whose tokens came in time",
    "deadlines_missed": "answers of which a token came late",
    "cancelled": "answers that nobody waited for, or that took too long",
    "failed": "answers that failed",
    "prompt_tokens": "tokens of prompts",
    "answer_tokens": "tokens of answers",
    "routed_weight": "weight that routers gave, where a policy may choose otherwise",
    "degraded_weight": "of it, served by other experts than the routers'",
}
PHASE_COUNTERS = {
    "bytes_read": ("expert_bytes_read", "bytes of experts read"),
    "used_bytes_read": ("expert_bytes_used", "of them, those of experts that were then used"),
    "stall_s": ("expert_stall_seconds", "time in which a layer waited for reads"),
    "missed": ("expert_choices_missed", "tokens' chosen experts that were not there"),
    "fetched": ("expert_choices_fetched", "of those, read for their token, not replaced"),
    "passes": ("passes", "forward passes"),
    "tokens": ("pass_tokens", "tokens that passes computed"),
    "seconds": ("pass_seconds", "time that passes took"),
}


REFRESH_COUNTERS = {
    "refreshes": ("refreshes", "times that the resident set was chosen anew"),
    "seconds": ("refresh_seconds", "what that took, forecasts and reads included"),
    "bytes_read": ("refresh_bytes", "bytes of experts read for it"),
}


class ServerMetrics:
    """The counters of one server. A `bridge.Listener`; used on the loop only."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._name = model_name
        self.tally = Tally()
        self._last: dict[tuple[Call, int], float] = {}  # when an answer's last token came
        histogram = self._histogram
        self._first = histogram("time_to_first_token_seconds", "to the first token", FIRST_TOKEN_S)
        self._between = histogram("inter_token_latency_seconds", "between tokens", BETWEEN_S)
        self._whole = histogram("e2e_request_latency_seconds", "of a whole request", REQUEST_S)
        self._queue = histogram("request_queue_time_seconds", "until it ran", REQUEST_S)
        self._prefill = histogram("request_prefill_time_seconds", "of prefill passes", REQUEST_S)
        self._decode = histogram("request_decode_time_seconds", "of decode passes", REQUEST_S)
        self._prompt = histogram("request_prompt_tokens", "tokens of a prompt", TOKENS)
        self._answer = histogram("request_generation_tokens", "tokens of an answer", TOKENS)
        self._longest = histogram("request_params_max_tokens", "max_tokens of a request", TOKENS)
        self._prompts = self._counter("prompt_tokens", "tokens of prompts")
        self._answers = self._counter("generation_tokens", "tokens of answers")
        self._ended = self._counter("request_success", "answers that ended", "finished_reason")
        self._asked = self._counter("prefix_cache_queries", "tokens looked for in the prefix cache")
        self._responses = Counter(
            "retinue_http_responses", "HTTP answers", ["status"], registry=self.registry
        )
        self.registry.register(_Tasks(self.tally))
        self._found = self._counter("prefix_cache_hits", "of those, tokens found")

    def text(self) -> bytes:
        """What a scrape is answered."""
        return generate_latest(self.registry)

    def watch(self, served: Served) -> None:
        """Show the engine's own counters too, now that there is one."""
        self.registry.register(_Engine(served, self._name))

    def responded(self, status: int) -> None:
        """An HTTP answer has begun."""
        self._responses.labels(str(status)).inc()

    def piece(self, call: Call, piece: Piece, now: float) -> None:
        """See `bridge.Listener`."""
        request, key = call.requests[piece.choice], (call, piece.choice)
        before = self._last.get(key)
        if piece.tokens:
            self._answers.labels(self._name).inc(piece.tokens)
            self.tally.count(piece.tokens)
            if before is None:
                self._first.labels(self._name).observe(now - call.began)
                self._read(request)
            else:
                self._between.labels(self._name).observe(now - before)
            self._last[key] = now
        if piece.finish is not None:
            self._last.pop(key, None)
            self._end(call, request, piece.finish, now)

    def _read(self, request: Request) -> None:
        """A prompt was read: counted then, as its answer's tokens are, whatever its end."""
        self._prompts.labels(self._name).inc(len(request.prompt))
        self._asked.labels(self._name).inc(len(request.prompt))
        self._found.labels(self._name).inc(request.reused)

    def _end(self, call: Call, request: Request, finish: str, now: float) -> None:
        name = self._name
        self.tally.end(request)
        self._ended.labels(name, {"cancelled": "abort"}.get(finish, finish)).inc()
        if finish not in ("stop", "length"):
            return
        self._whole.labels(name).observe(now - call.began)
        costs = request.costs
        running_s = costs.prefill.seconds + costs.decode.seconds
        self._queue.labels(name).observe(max(0.0, now - call.began - running_s))
        self._prefill.labels(name).observe(costs.prefill.seconds)
        self._decode.labels(name).observe(costs.decode.seconds)
        self._prompt.labels(name).observe(len(request.prompt))
        self._answer.labels(name).observe(len(request.token_ids))
        self._longest.labels(name).observe(request.params.max_new_tokens)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"vllm:{name}", text, [LABEL], buckets=buckets, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"vllm:{name}", text, [LABEL, *labels], registry=self.registry)


class _Tasks:
    """Turns what was counted by task into metrics, when it is asked."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client's `Collector`."""
        for field, text in TASK_COUNTERS.items():
            family = CounterMetricFamily(f"retinue_task_{field}", text, labels=["task"])
            for task, tally in self._tally.tasks.items():
                family.add_metric([task or ""], getattr(tally, field))
            yield family


class _Engine:
    """Turns the last picture into metrics, when it is asked."""

    def __init__(self, served: Served, name: str) -> None:
        self._served, self._name = served, name

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client's `Collector`."""
        picture = self._served.picture
        running, waiting = sum(picture.running.values()), sum(picture.waiting.values())
        yield self._gauge("vllm:num_requests_running", "answers that run", running)
        yield self._gauge("vllm:num_requests_waiting", "answers that wait", waiting)
        yield self._gauge(
            "vllm:kv_cache_usage_perc", "used share of key/value blocks", picture.kv_used
        )
        yield from self._memory(picture)
        yield from self._experts(picture)
        for field, (name, text) in REFRESH_COUNTERS.items():
            family = CounterMetricFamily(f"retinue_{name}", text)
            family.add_metric([], picture.refreshes[field])
            yield family

    def _memory(self, picture: Picture) -> Iterator[Metric]:
        split = self._served.assembly.split
        yield self._gauge("retinue_budget_bytes", "the budget", split.budget)
        yield self._gauge("retinue_resident_bytes", "memory held now", picture.resident_bytes)
        yield self._gauge("retinue_peak_bytes", "the most held so far", picture.peak_bytes)
        parts = GaugeMetricFamily("retinue_memory_bytes", "the budget by part", labels=["part"])
        for part in ("fixed", "kv", "workspace", "experts"):
            parts.add_metric([part], getattr(split, part))
        yield parts

    def _experts(self, picture: Picture) -> Iterator[Metric]:
        tier, label = ["host"], ["tier", "layer"]
        resident = GaugeMetricFamily("retinue_experts_resident", "experts in memory", labels=label)
        for layer, count in enumerate(picture.resident.sum(axis=1).tolist()):
            resident.add_metric([*tier, str(layer)], count)
        yield resident
        labels = ["tier", "layer", "phase"]
        for field, text in LAYER_COUNTERS.items():
            family = CounterMetricFamily(f"retinue_expert_{field}", text, labels=labels)
            for layer, phases in enumerate(picture.layers):
                for phase, counters in phases.items():
                    family.add_metric([*tier, str(layer), phase], getattr(counters, field))
            yield family
        for column, (name, text) in enumerate(READ_COUNTERS):
            family = CounterMetricFamily(f"retinue_expert_{name}", text, labels=labels)
            for reason, counts in picture.reads.items():
                for layer, count in enumerate(counts[:, column].tolist()):
                    family.add_metric([*tier, str(layer), reason], count)
            yield family
        for field, (name, text) in PHASE_COUNTERS.items():
            family = CounterMetricFamily(f"retinue_{name}", text, labels=["phase"])
            for phase, spent in (("prefill", picture.prefill), ("decode", picture.decode)):
                family.add_metric([phase], spent[field])
            yield family

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        labels = [LABEL] if name.startswith("vllm:") else []
        family = GaugeMetricFamily(name, text, labels=labels)
        family.add_metric([self._name] * len(labels), value)
        return family
