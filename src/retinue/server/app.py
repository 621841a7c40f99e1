"""The application: routes, and how a request becomes a call."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from retinue import __version__
from retinue.config import Config
from retinue.engine.request import Request as EngineRequest
from retinue.engine.request import new_request
from retinue.errors import RetinueError, UsageError
from retinue.server.answer import (
    ChatShape,
    CompletionShape,
    Shape,
    chat_envelope,
    completion_envelope,
)
from retinue.server.bridge import Bridge
from retinue.server.call import Call
from retinue.server.deliver import ClientLeft, Delivery
from retinue.server.gate import Gate
from retinue.server.metrics import ServerMetrics
from retinue.server.page import add_page
from retinue.server.problem import Problem, problem_of
from retinue.server.prompts import chat_ids, chat_text, check_length, prompt_ids
from retinue.server.schema import UNSERVED, ChatBody, Common, CompletionBody, ErrorDocument
from retinue.server.served import Served
from retinue.server.views import experts_view, state_view
from retinue.types import SamplingParams

OVERLOADED = 429
CLIENT_LEFT = 499  # as nginx counts them; nobody reads it
TASK_HEADER = "x-retinue-task"


NESTED = ("role", "content", "type", "text", "include_usage", "first_token_s", "between_tokens_s")
SHAPES = {
    "prompt": "has to be a text or token ids, or a list of up to 128 of either; none may be empty",
    "stop": "has to be a text or a list of up to 16, each of 1 to 256 characters",
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "refused", "model": ErrorDocument},
    "5XX": {"description": "failed, loading or stopping", "model": ErrorDocument},
}


@dataclass(slots=True)
class Server:
    """What all routes share. `names` are those that requests may call the model by."""

    config: Config
    names: tuple[str, ...]
    bridge: Bridge[Served]
    metrics: ServerMetrics
    # One thread: tokenizers are not made for several, and no more of them would be faster.
    texts: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "texts"))

    async def answer(self, request: Request, body: ChatBody | CompletionBody) -> Response:
        """Answer one request of either endpoint."""
        served = self.bridge.model
        self._check(body)
        work = partial(self._call, served, body, _task(request, body, served.tasks))
        groups, echoes = await asyncio.get_running_loop().run_in_executor(self.texts, work)
        shape: Shape = ChatShape(served.tokenizer)
        envelope = chat_envelope(body.model)
        if isinstance(body, CompletionBody):
            shape = CompletionShape(served.tokenizer, echoes)
            envelope = completion_envelope(body.model)
        delivery = Delivery(self.bridge, Call(groups, body.user), shape, envelope)
        options = body.stream_options
        with_usage = bool(options is not None and options.include_usage)
        try:
            if body.stream:
                return await delivery.stream(request.receive, with_usage=with_usage)
            return await delivery.whole(request.receive)
        except Problem as problem:
            if problem.status == OVERLOADED:
                self.metrics.tally.refuse(groups[0][0].task)
            raise

    def _check(self, body: ChatBody | CompletionBody) -> None:
        """Raise Problem for what can be refused without looking at the prompt."""
        if body.model not in self.names:
            text = f"there is no model `{body.model:.80}` here, only `{self.names[0]}`"
            raise Problem(404, text, param="model", code="model_not_found")
        if body.count > self.config.choices:
            text = f"n is {body.count}, this server gives {self.config.choices} answers at most"
            raise Problem(400, text, param="n")

    def _call(
        self, served: Served, body: ChatBody | CompletionBody, task: str | None
    ) -> tuple[list[list[EngineRequest]], list[str]]:
        """The requests of each prompt, checked, and what each answer repeats of its prompt."""
        tokenizer, params = served.tokenizer, body.sampling(self.config)
        groups: list[list[EngineRequest]] = []
        echoes: list[str] = []
        for prompt, ids in _prompts(tokenizer, body):
            context = served.engine.limits.context
            check_length(len(ids), body.longest, context, self.config.max_prompt)
            _check_ids(served, ids, params, body)
            kind = served.task_of(prompt, ids, task)
            due = body.due(self.config, kind)
            several = _several(params, body.count)
            groups.append(
                [
                    new_request(ids, each, tokenizer, reuse=True, task=kind, deadline=due)
                    for each in several
                ]
            )
            if isinstance(body, CompletionBody) and body.echo:
                echoes += [_text(tokenizer, prompt)] * len(several)
        return groups, echoes


def create_app(server: Server) -> FastAPI:
    """The application of `server`."""
    app = FastAPI(title="retinue", version=__version__, responses=RESPONSES, redoc_url=None)
    app.add_middleware(Gate, config=server.config, responded=server.metrics.responded)
    app.add_exception_handler(Problem, _on_problem)
    app.add_exception_handler(RetinueError, _on_problem)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    for kind in (400, 404, 405, HTTPException):
        app.add_exception_handler(kind, _on_http)
    app.add_exception_handler(ClientLeft, _on_left)
    app.add_exception_handler(Exception, _on_problem)
    _add_inference(app, server)
    _add_views(app, server)
    add_page(app)
    return app


def _add_inference(app: FastAPI, server: Server) -> None:
    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatBody) -> Response:
        return await server.answer(request, body)

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionBody) -> Response:
        return await server.answer(request, body)


def _add_views(app: FastAPI, server: Server) -> None:
    @app.get("/health")
    async def health() -> Response:
        phase = server.bridge.phase
        return JSONResponse({"status": phase}, status_code=200 if phase == "ready" else 503)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(server, name) for name in server.names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name not in server.names:
            text = f"there is no model `{name:.80}` here, only `{server.names[0]}`"
            raise Problem(404, text, param="model", code="model_not_found")
        return _model(server, name)

    @app.get("/v1/experts")
    async def experts() -> dict[str, Any]:
        return experts_view(server.bridge.model)

    @app.get("/v1/state")
    async def state() -> dict[str, Any]:
        return state_view(server.bridge.model, server.metrics.tally)


def _model(server: Server, name: str) -> dict[str, Any]:
    served = server.bridge.model
    return {
        "id": name,
        "object": "model",
        "created": served.loaded_at,
        "owned_by": "retinue",
        "max_model_len": served.engine.limits.context,
    }


def _prompts(
    tokenizer: Any | None, body: ChatBody | CompletionBody
) -> Iterator[tuple[str | list[int], list[int]]]:
    """Each prompt as it was given, and its ids."""
    if isinstance(body, ChatBody):
        yield chat_text(body.messages), chat_ids(tokenizer, body.messages)
        return
    for prompt in body.prompts:
        yield prompt, prompt_ids(tokenizer, prompt)


def _task(request: Request, body: Common, known: frozenset[str]) -> str | None:
    """What the request says it is; a name that nobody knows is as if it were not given."""
    said = (body.task, request.headers.get(TASK_HEADER), request.state.task)
    return next((name for name in said if name in known), None)


def _check_ids(
    served: Served, ids: list[int], params: SamplingParams, body: ChatBody | CompletionBody
) -> None:
    """Raise Problem for what the engine would refuse, by the field that is to blame."""
    param = "messages" if isinstance(body, ChatBody) else "prompt"
    for check in (partial(served.engine.check, ids), partial(served.engine.check, ids, params)):
        try:
            check()
        except UsageError as error:
            raise problem_of(error, param=param) from error
        param = "logit_bias"


def _several(params: SamplingParams, count: int) -> list[SamplingParams]:
    """Equal seeds would give equal answers."""
    if params.seed is None:
        return [params] * count
    return [replace(params, seed=(params.seed + i) % (1 << 63)) for i in range(count)]


def _text(tokenizer: Any | None, prompt: str | list[int]) -> str:
    if isinstance(prompt, str):
        return prompt
    return "" if tokenizer is None else str(tokenizer.decode(prompt, skip_special_tokens=True))


async def _on_problem(request: Request, error: Exception) -> Response:
    problem = problem_of(error)
    return JSONResponse(problem.as_dict(), problem.status, problem.headers)


async def _on_left(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_LEFT)


async def _on_http(request: Request, error: Exception) -> Response:
    status: int = getattr(error, "status_code", 500)
    texts = {404: f"there is no {request.url.path:.80} here", 405: "this method is not served here"}
    problem = Problem(status, texts.get(status, "the body cannot be read"))
    return JSONResponse(problem.as_dict(), status, getattr(error, "headers", None))


async def _on_invalid(request: Request, error: Exception) -> Response:
    """The first thing that is wrong, by the name of its field."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = [part for part in first["loc"][1:] if isinstance(part, int) or part]
    if first["type"] == "json_invalid" or not where:
        problem = Problem(400, "the body is not a JSON object that this endpoint knows")
        return await _on_problem(request, problem)
    field_name, text = str(where[0]), str(first["msg"])
    path = field_name + "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" if part in NESTED else ""
        for part in where[1:]
    )
    if first["type"] == "extra_forbidden":
        path = ".".join(map(str, where))
        text = UNSERVED.get(field_name, "this server knows no such field")
    elif len(where) > 1 and field_name in SHAPES:
        text = SHAPES[field_name]
    problem = Problem(400, f"{path:.120}: {text}", param=path[:120])
    return await _on_problem(request, problem)
