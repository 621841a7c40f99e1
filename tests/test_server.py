"""What the server answers and what it refuses, around a network that counts."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from disk import eventually
from serving import CHAT, NAME, TEXT, FakeServed, Running, complete, events, ready, refused


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    with ready(FakeServed(), api_key=None, choices=4, max_body=4096, max_prompt=60) as it:
        yield it


@pytest.fixture
def client(shared: Running) -> Iterator[httpx.Client]:
    with shared.client() as client:
        yield client
    shared.idle()


# --- answers


def test_a_completion(client: httpx.Client) -> None:
    answer = complete(client).json()
    assert answer["object"] == "text_completion"
    assert answer["model"] == NAME
    choice = {"index": 0, "text": "CDE", "logprobs": None, "finish_reason": "length"}
    assert answer["choices"] == [choice]
    usage = {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    assert answer["usage"] == usage | {"prompt_tokens_details": {"cached_tokens": 0}}


def test_a_chat(client: httpx.Client) -> None:
    answer = client.post("/v1/chat/completions", json=CHAT).json()
    assert answer["object"] == "chat.completion"
    (choice,) = answer["choices"]
    # Without a template the messages are lines; the end of the last is an `n` to this tokenizer.
    message = {"role": "assistant", "content": "opqr", "refusal": None}
    assert choice == {"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}


def test_answers_have_names_of_their_own(client: httpx.Client) -> None:
    assert complete(client).json()["id"] != complete(client).json()["id"]


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("AB", ["CD"]),
        ([33, 34], ["CD"]),
        (["AB", "a"], ["CD", "bc"]),
        ([[33, 34], [65]], ["CD", "bc"]),
    ],
)
def test_every_form_of_a_prompt(client: httpx.Client, prompt: Any, texts: list[str]) -> None:
    answer = complete(client, prompt=prompt, max_tokens=2).json()
    assert [choice["text"] for choice in answer["choices"]] == texts
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(texts)))


def test_several_answers_count_their_prompt_once(client: httpx.Client) -> None:
    answer = complete(client, prompt=["AB", "a"], n=2).json()
    assert [choice["text"] for choice in answer["choices"]] == ["CDE", "CDE", "bcd", "bcd"]
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["usage"]["completion_tokens"] == 12


def test_several_answers_share_their_prompt() -> None:
    served = FakeServed(chunk=64)
    with ready(served) as it, it.client() as client:
        prompt = "A" * 33
        assert len(complete(client, prompt=prompt, n=3).json()["choices"]) == 3
        whole = [run for phase, run in served.network.runs if phase == "prefill"]
    # The first computes it all; the others share its two full blocks.
    assert [[len(tokens) for tokens, _ in parts] for parts in whole] == [[33], [1, 1]]


def test_echo_repeats_the_prompt(client: httpx.Client) -> None:
    assert complete(client, echo=True).json()["choices"][0]["text"] == "ABCDE"
    answer = complete(client, echo=True, prompt=[33, 34], n=2).json()
    assert [choice["text"] for choice in answer["choices"]] == ["ABCDE", "ABCDE"]
    parts = events(complete(client, echo=True, stream=True))
    assert "".join(part["choices"][0]["text"] for part in parts[:-1]) == "ABCDE"


@pytest.mark.parametrize("stop", ["DE", ["x", "DE"]])
def test_stop(client: httpx.Client, stop: Any) -> None:
    (choice,) = complete(client, stop=stop, max_tokens=9).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("C", "stop")


def test_logprobs_of_completions(client: httpx.Client) -> None:
    found = complete(client, logprobs=2).json()["choices"][0]["logprobs"]
    assert found["tokens"] == ["C", "D", "E"]
    assert found["text_offset"] == [0, 1, 2]
    assert [len(top) for top in found["top_logprobs"]] == [2, 2, 2]
    assert found["token_logprobs"][0] == found["top_logprobs"][0]["C"] < 0


def test_logprobs_of_a_chat(client: httpx.Client) -> None:
    body = CHAT | {"logprobs": True, "top_logprobs": 1}
    choice = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert "".join(item["token"] for item in content) == choice["message"]["content"]
    assert all(item["bytes"] == list(item["token"].encode()) for item in content)
    assert all(item["top_logprobs"][0]["logprob"] == item["logprob"] for item in content)


def test_logprobs_of_a_stream_are_those_of_the_whole(client: httpx.Client) -> None:
    whole = complete(client, logprobs=1).json()["choices"][0]["logprobs"]
    parts = [part["choices"][0] for part in events(complete(client, logprobs=1, stream=True))[:-1]]
    for name, values in whole.items():
        assert [value for part in parts for value in part["logprobs"][name]] == values


def test_penalties_and_biases_reach_the_sampler(client: httpx.Client) -> None:
    """The network gives 5 to the next letter and 0 to all others."""
    assert complete(client, logit_bias={"10": 6}).json()["choices"][0]["text"] == "***"
    assert complete(client, logit_bias={"35": -100}).json()["choices"][0]["text"][0] != "C"


def test_a_stream(client: httpx.Client) -> None:
    response = complete(client, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *parts, last, done = events(response)
    assert done == "[DONE]"
    assert "".join(part["choices"][0]["text"] for part in parts) == "CDE"
    assert [part["choices"][0]["finish_reason"] for part in parts] == [None, None, "length"]
    assert all(part["usage"] is None for part in parts)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3
    assert len({part["id"] for part in [*parts, last]}) == 1


def test_a_stream_of_a_chat(client: httpx.Client) -> None:
    whole = client.post("/v1/chat/completions", json=CHAT).json()["choices"][0]["message"]
    response = client.post("/v1/chat/completions", json=CHAT | {"stream": True, "n": 2})
    *parts, done = events(response)
    assert done == "[DONE]"
    for index in (0, 1):
        mine = [p["choices"][0] for p in parts if p["choices"][0]["index"] == index]
        assert [part["delta"].get("role") for part in mine] == ["assistant", None, None, None]
        assert "".join(part["delta"].get("content", "") for part in mine) == whole["content"]
        assert mine[-1]["finish_reason"] == "length"


# --- refusals


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 95}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 5}, "n"),
        ({"n": True}, "n"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ""}, "stop"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": "A" * 61}, "prompt"),
        ({"prompt": "A\ud800"}, "prompt"),
        ({"prompt": ["A", 1]}, "prompt"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other"),
        ({"tools": []}, "tools"),
        ({"nonsense": None}, "nonsense"),
        ({"seed": -1}, "seed"),
        ({"seed": 1 << 63}, "seed"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"model": None}, "model"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    client: httpx.Client, fields: dict[str, Any], param: str
) -> None:
    body = json.dumps(TEXT | fields)
    kind = {"Content-Type": "application/json"}
    message = refused(client.post("/v1/completions", content=body, headers=kind), 400, param)
    assert param.split(".")[0] in message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_completion_tokens": 9}, "max_tokens"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"prompt": "x"}, "prompt"),
    ],
)
def test_what_a_chat_cannot_honour(
    client: httpx.Client, fields: dict[str, Any], param: str
) -> None:
    refused(client.post("/v1/chat/completions", json=CHAT | fields), 400, param)


def test_trivial_values_are_honoured(client: httpx.Client) -> None:
    fields = {"response_format": {"type": "text"}, "tool_choice": "none", "user": "someone"}
    fields |= {"stop": None, "n": None, "logit_bias": None, "stream_options": None}
    response = client.post("/v1/chat/completions", json=CHAT | fields)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    "body", ["", "{", "[]", "7", '"x"', "{}", '{"model": NaN}', "[" * 3000, "{" + "9" * 3000]
)
def test_bodies_that_are_none(client: httpx.Client, body: str) -> None:
    kind = {"Content-Type": "application/json"}
    response = client.post("/v1/completions", content=body, headers=kind)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_nothing_else_is_here(client: httpx.Client) -> None:
    refused(client.get("/v1/nothing"), 404)
    refused(client.get("/v1/completions"), 405)
    refused(client.get("/v1/models/other"), 404, "model")
    refused(complete(client, model="other"), 404, "model")
    assert complete(client, model="alias").status_code == 200


@pytest.mark.parametrize("field", ["model", "prompt", "stop", "task", "user", "\ud800"])
def test_half_a_surrogate_pair_is_the_clients_mistake(client: httpx.Client, field: str) -> None:
    """JSON can say it, UTF-8 cannot: no answer may hold it as it came."""
    body = json.dumps(TEXT | {field: "\ud800"})  # escaped
    kind = {"Content-Type": "application/json"}
    response = client.post("/v1/completions", content=body, headers=kind)
    assert response.status_code == (404 if field == "model" else 400)
    assert response.json()["error"]["message"]


def test_other_kinds_of_bodies(client: httpx.Client) -> None:
    kind = {"Content-Type": "text/plain"}
    refused(client.post("/v1/completions", content="{}", headers=kind), 415)


def test_long_bodies_are_not_read(client: httpx.Client) -> None:
    refused(complete(client, prompt="A" * 5000), 413)
    kind = {"Content-Type": "application/json"}
    pieces = iter([b" " * 3000, b" " * 3000])  # of a length that nobody announces
    refused(client.post("/v1/completions", content=pieces, headers=kind), 413)


# --- what the server tells of itself


def test_views(client: httpx.Client) -> None:
    complete(client, task="chat")
    # The client has its answer a moment before the server counts that request as ended.
    eventually(lambda: not any(t["running"] for t in client.get("/v1/state").json()["tasks"]))
    (first, second) = client.get("/v1/models").json()["data"]
    assert (first["id"], second["id"]) == (NAME, "alias")
    experts = client.get("/v1/experts").json()
    assert experts["layers"][0]["resident"] == [0, 2]
    assert experts["resident"] == 2
    state = client.get("/v1/state").json()
    assert state["experts"][0]["map"] == "1010"
    task = next(task for task in state["tasks"] if task["task"] == "chat")
    assert (task["answered"], task["answer_tokens"], task["running"]) == (1, 3, 0)


def test_one_page_of_documentation(client: httpx.Client) -> None:
    assert client.get("/docs").status_code == 200
    assert client.get("/redoc").status_code == 404


def test_metrics_count(shared: Running, client: httpx.Client) -> None:
    def value(name: str) -> float:
        lines = client.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    names = (
        *("vllm:prompt_tokens_total", "vllm:generation_tokens_total"),
        *("vllm:time_to_first_token_seconds_count", "vllm:inter_token_latency_seconds_count"),
        *(
            "vllm:e2e_request_latency_seconds_count",
            'vllm:request_success_total{finished_reason="length"',
        ),
        *('retinue_http_responses_total{status="200"', 'retinue_http_responses_total{status="400"'),
    )
    before = [value(name) for name in names]
    complete(client, n=2)
    complete(client, n=-1)
    shared.idle()
    grown = [value(name) - was for name, was in zip(names, before, strict=True)]
    assert grown[:6] == [4, 6, 2, 4, 2, 2]
    assert grown[6] >= 1
    assert grown[7] == 1
    assert value("retinue_experts_resident") == 2
    assert value("vllm:num_requests_running") == 0
