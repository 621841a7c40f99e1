"""What requests may say: every field is honoured, or refused by its name.

The types are checked strictly, as OpenAI does: `"1"` is no number, `1` no truth.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from retinue.config import Config
from retinue.server.problem import Problem
from retinue.types import Deadline, SamplingParams

MAX_ALTERNATIVES = 20
MAX_STOPS = 16
LONGEST_STOP = 256  # characters: each new piece of text is searched for each
MAX_PROMPTS = 128

# Known to OpenAI's clients, and not served: more than "unknown" is to be said of them.
UNSERVED = {
    "audio": "only text is served",
    "function_call": "functions are not served",
    "functions": "functions are not served",
    "modalities": "only text is served",
    "parallel_tool_calls": "tools are not served",
    "prediction": "predicted outputs are not served",
    "reasoning_effort": "the template of the model decides",
    "tool_choice": "tools are not served; only `none` can be honoured",
    "tools": "tools are not served",
    "web_search_options": "the server does not search",
}

TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]
Seconds = Annotated[float, Field(gt=0, le=86400)]
Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
Prompts = (
    Text
    | TokenIds
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
)


class Body(BaseModel):
    """What all bodies share: strict types, and no field that nobody reads."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Body):
    """How a stream ends. `include_usage`: with one more chunk that says what it took."""

    include_usage: bool | None = None


class PlainText(Body):
    """The one response format that is served."""

    type: Literal["text"]


class DeadlineBody(Body):
    """When tokens are due, in seconds: the first after arrival, each other after the one before."""

    first_token_s: Seconds | None = None
    between_tokens_s: Seconds | None = None


class Common(Body):
    """What both endpoints take."""

    model: str
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    user: Annotated[str, Field(max_length=256)] | None = None
    # What OpenAI's interface lacks.
    task: Annotated[str, Field(min_length=1, max_length=100)] | None = None
    deadline: DeadlineBody | None = None

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise Problem(400, "stream_options needs `stream`", param="stream_options")
        return self

    @property
    def count(self) -> int:
        """How many answers each prompt gets."""
        return self.n or 1

    @property
    def alternatives(self) -> int | None:
        """How many likely tokens are reported for each new one; None: nothing is."""
        raise NotImplementedError

    @property
    def longest(self) -> int | None:
        """The longest answer that was asked for, in tokens."""
        return self.max_tokens

    def due(self, config: Config, task: str | None) -> Deadline | None:
        """When tokens are due: as the request says, or as `config` says for its task."""
        if self.deadline is None:
            return config.deadline(task)
        return Deadline(self.deadline.first_token_s, self.deadline.between_tokens_s)

    def sampling(self, config: Config) -> SamplingParams:
        """How tokens are chosen. `config` says what the request does not."""
        own = config.sampling()
        stop = self.stop if self.stop is not None else own.stop
        return SamplingParams(
            temperature=_given(self.temperature, own.temperature),
            max_new_tokens=_given(self.longest, own.max_new_tokens),
            top_p=_given(self.top_p, own.top_p),
            top_k=max(0, _given(self.top_k, own.top_k)),  # vLLM writes -1 for all
            min_p=_given(self.min_p, own.min_p),
            repetition_penalty=_given(self.repetition_penalty, own.repetition_penalty),
            presence_penalty=_given(self.presence_penalty, 0.0),
            frequency_penalty=_given(self.frequency_penalty, 0.0),
            logit_bias=_biases(self.logit_bias or {}),
            seed=_given(self.seed, own.seed),
            stop=stop,
            ignore_eos=bool(self.ignore_eos),
            logprobs=self.alternatives,
        )


class Part(Body):
    """One part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """One message; its text is whole or in parts."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(min_length=1)]

    @property
    def text(self) -> str:
        """All of the text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatBody(Common):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    response_format: PlainText | None = None
    tool_choice: Literal["none"] | None = None

    @model_validator(mode="after")
    def _logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise Problem(400, "top_logprobs needs `logprobs`", param="top_logprobs")
        both = self.max_tokens is not None and self.max_completion_tokens is not None
        if both and self.max_tokens != self.max_completion_tokens:
            text = "max_tokens and max_completion_tokens differ: give one of them"
            raise Problem(400, text, param="max_tokens")
        return self

    @property
    def alternatives(self) -> int | None:
        """See `Common`."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def longest(self) -> int | None:
        """See `Common`."""
        return self.max_tokens or self.max_completion_tokens


class CompletionBody(Common):
    """The body of `/v1/completions`."""

    prompt: Prompts
    best_of: Annotated[int, Field(ge=1)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None
    suffix: None = None

    @model_validator(mode="after")
    def _limits(self) -> Self:
        if self.best_of is not None and self.best_of != self.count:
            raise Problem(400, "best_of is not served: it has to equal `n`", param="best_of")
        if self.echo and self.logprobs is not None:
            text = "echo gives no logprobs: those of a prompt are not computed"
            raise Problem(400, text, param="echo")
        return self

    @property
    def prompts(self) -> list[Any]:
        """One or more prompts, each a text or token ids."""
        single = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if single else list(self.prompt)

    @property
    def alternatives(self) -> int | None:
        """See `Common`."""
        return self.logprobs


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorDocument(BaseModel):
    """The answer to a request that was refused or failed."""

    error: ErrorBody


def _given(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value


def _biases(given: dict[str, float]) -> dict[int, float]:
    """Token ids stand as texts in JSON's keys."""
    wrong = [key for key in given if not (key.isascii() and key.isdigit() and len(key) < 10)]
    if wrong:
        raise Problem(400, f"logit_bias: not a token id: `{wrong[0][:20]}`", param="logit_bias")
    return {int(key): bias for key, bias in given.items()}
