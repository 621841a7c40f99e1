"""Chooses a token from logits. One sampler a request: it owns the request's random numbers."""

from collections import Counter
from collections.abc import Collection, Mapping

import torch

from retinue.types import SamplingParams, TokenLogprob

LEAST_TEMPERATURE = 1e-6  # below it, greedy in all but name


class Sampler:
    """Greedy at temperature 0, otherwise seeded sampling; filters apply in the usual order."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._random = torch.Generator()
        if params.seed is not None:
            self._random.manual_seed(params.seed)
        else:
            self._random.seed()

    def choose(
        self, logits: torch.Tensor, prompt: Collection[int] = (), answer: Collection[int] = ()
    ) -> int:
        """The next token. logits: [vocabulary]; penalties see the ids of `prompt` and `answer`."""
        params, logits = self._params, logits.float()
        if params.repetition_penalty != 1.0:
            logits = _repeat_less(logits, {*prompt, *answer}, params.repetition_penalty)
        if (params.presence_penalty or params.frequency_penalty) and answer:
            logits = _vary(logits, Counter(answer), params)
        if params.logit_bias:
            logits = _add(logits, params.logit_bias)
        if params.temperature == 0:
            return int(logits.argmax())
        # The largest becomes 0, so that no temperature, however small, makes it infinite.
        logits = (logits - logits.max()) / max(params.temperature, LEAST_TEMPERATURE)
        probabilities = torch.softmax(logits, dim=-1)
        probabilities = _filter(probabilities, params)
        return int(torch.multinomial(probabilities, 1, generator=self._random))

    def logprob(self, logits: torch.Tensor, token_id: int) -> TokenLogprob | None:
        """The model's own log-probability of `token_id` and of the likeliest alternatives."""
        count = self._params.logprobs
        if count is None:
            return None
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        values, ids = logprobs.topk(min(count, len(logprobs)))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return TokenLogprob(token_id, float(logprobs[token_id]), top)


def _repeat_less(logits: torch.Tensor, seen: set[int], penalty: float) -> torch.Tensor:
    """Make tokens that were seen less likely (CTRL, arXiv 1909.05858)."""
    logits, ids = logits.clone(), torch.tensor(sorted(seen), dtype=torch.int64)
    values = logits[ids]
    logits[ids] = torch.where(values > 0, values / penalty, values * penalty)
    return logits


def _vary(logits: torch.Tensor, counts: Counter[int], params: SamplingParams) -> torch.Tensor:
    """Subtract what OpenAI's penalties take from tokens that the answer has already."""
    presence, frequency = params.presence_penalty, params.frequency_penalty
    return _add(logits, {token: -presence - frequency * n for token, n in counts.items()})


def _add(logits: torch.Tensor, amounts: Mapping[int, float]) -> torch.Tensor:
    ids = torch.tensor(list(amounts), dtype=torch.int64)
    return logits.index_add(0, ids, torch.tensor(list(amounts.values()), dtype=logits.dtype))


def _filter(probabilities: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Zero what top-k, top-p and min-p leave out. The likeliest token always stays."""
    if params.top_k == 0 and params.top_p == 1.0 and params.min_p == 0.0:
        return probabilities
    ordered, ids = probabilities.sort(descending=True, stable=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if params.top_k:
        keep[params.top_k :] = False
    if params.top_p < 1.0:
        # A token stays if those before it have not reached the share yet.
        shares = torch.where(keep, ordered, 0.0)
        shares = shares / shares.sum()
        keep &= shares.cumsum(0) - shares < params.top_p
    if params.min_p:
        keep &= ordered >= params.min_p * ordered[0]
    keep[0] = True
    return torch.zeros_like(probabilities).scatter_(0, ids, torch.where(keep, ordered, 0.0))
