"""The whole server with the sample model: the clients that people have, and a process's end."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from retinue.cli import serve
from retinue.cli.main import main
from retinue.config import Config
from retinue.memory.home import locate
from retinue.model.profiles import learnt_profile, read_profile
from retinue.server.run import server_bytes
from retinue.server.served import Served
from serving import NAME, FakeServed, Running, ready, running

MESSAGES: list[Any] = [{"role": "user", "content": "Hello there!"}]
CONFIG: dict[str, Any] = {"preset": "popular-by-task", "experts": "40%", "context": 256}


@pytest.fixture(scope="module")
def sample() -> Iterator[Running]:
    config = Config(**CONFIG, batch=8, learn=True, routes={"/c": {"task": "configured"}})
    folder = locate("sample", print)
    with running(lambda: Served(folder, config, server_bytes(config)), **CONFIG) as it:
        it.until(lambda: it.server.bridge.phase == "ready")
        yield it
    taught = read_profile(learnt_profile(folder))
    assert taught.tasks["dialogue"].texts > 0
    assert taught.tasks["dialogue"].weight.sum() > 0


@pytest.fixture
def client(sample: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{sample.url}/v1", api_key="any", max_retries=0) as client:
        yield client
    sample.idle()


def test_a_stream_gives_what_the_whole_answer_is(client: openai.OpenAI) -> None:
    asked = {"model": NAME, "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    stream = client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    parts = list(stream)
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content
    assert parts[-1].usage is not None
    assert whole.usage is not None
    assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens == 12
    assert parts[-1].model_extra["retinue"]["degraded_share"] > 0


def test_seeds_choices_logprobs_and_stops(client: openai.OpenAI) -> None:
    def ask(seed: int) -> list[str]:
        answer = client.completions.create(
            model=NAME, prompt="A: Hello", max_tokens=8, seed=seed, n=2, temperature=1
        )
        return [choice.text for choice in answer.choices]

    first = ask(1)
    assert first == ask(1) != ask(2)
    assert first[0] != first[1]
    answer = client.chat.completions.create(
        model=NAME, messages=MESSAGES, max_tokens=8, logprobs=True, top_logprobs=3, stop=["\n"]
    )
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.content is not None
    assert {len(item.top_logprobs) for item in found.content} == {3}


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": NAME, "messages": MESSAGES, "max_tokens": 4}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**asked | {"max_tokens": 400})
    assert (caught.value.param, caught.value.code) == ("max_tokens", "context_length_exceeded")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**asked | {"model": "other"})
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(**asked, tools=[])


def test_closing_a_stream_cancels_it(client: openai.OpenAI, sample: Running) -> None:
    stream = client.completions.create(
        model=NAME,
        prompt="A: Hello",
        max_tokens=240,
        stream=True,
        extra_body={"task": "python_code"},
    )
    next(iter(stream))
    stream.close()
    sample.idle()
    assert sample.server.metrics.tally.tasks["python_code"].cancelled == 1
    said = dict(line.rsplit(" ", 1) for line in metrics(sample).splitlines() if line[0] != "#")
    tasks = sum(float(said[name]) for name in said if name.startswith("retinue_task_prompt_tokens"))
    (prompts,) = (float(said[name]) for name in said if name.startswith("vllm:prompt_tokens_total"))
    assert prompts == tasks  # a prompt that was read counts, whatever became of its answer


def test_tasks_are_inferred_and_their_degradation_counted(
    client: openai.OpenAI, sample: Running
) -> None:
    prompt = "A: Hello, how are you today?\nB: Fine, thanks. And you?\nA:"
    answer = client.completions.create(model=NAME, prompt=prompt, max_tokens=4)
    assert answer.model_extra is not None
    assert answer.model_extra["retinue"]["task"] == "dialogue"
    experts = httpx.get(f"{sample.url}/v1/experts").json()
    shares = {row["task"]: row["layers"] for row in experts["degraded_by_task"]}
    assert max(shares["dialogue"]) > 0
    assert sum(layer["decode"]["misses"] for layer in experts["layers"]) > 0
    said = dict(line.rsplit(" ", 1) for line in metrics(sample).splitlines() if line[0] != "#")
    for layer in experts["layers"]:
        for reason, found in layer["reads"].items():
            labels = f'{{layer="{layer["layer"]}",phase="{reason}",tier="host"}}'
            assert float(said[f"retinue_expert_reads_total{labels}"]) == found["experts"]
            assert float(said[f"retinue_expert_read_bytes_total{labels}"]) == found["bytes"]
    read = sum(layer["reads"]["refresh"]["bytes"] for layer in experts["layers"])
    assert read > experts["refreshes"]["bytes_read"] > 0  # the first set was read at load
    assert experts["layers"][0]["decode"]["missed"] >= experts["layers"][0]["decode"]["misses"] > 0
    assert experts["period"] is None  # this preset forecasts nothing
    assert experts["refreshes"]["refreshes"] > 0
    assert f"retinue_refreshes_total {experts['refreshes']['refreshes']}.0" in metrics(sample)
    state = httpx.get(f"{sample.url}/v1/state").json()
    assert state["memory"]["budget_bytes"] > state["memory"]["resident_bytes"] > 0


def test_names_that_the_profile_lacks_leave_no_trace(
    client: openai.OpenAI, sample: Running
) -> None:
    served = sample.server.bridge.model
    assert {"dialogue", "configured"} <= served.tasks
    answer = client.completions.create(
        model=NAME, prompt="A: Hello", max_tokens=2, extra_body={"task": "unheard"}
    )
    assert answer.model_extra is not None
    assert answer.model_extra["retinue"]["task"] in served.tasks | {None}
    assert "unheard" not in served.assembly.metrics.tasks
    assert "unheard" not in metrics(sample)


def metrics(sample: Running) -> str:
    return httpx.get(f"{sample.url}/metrics").text


# --- any request that the description allows


@pytest.fixture(scope="module")
def description() -> Iterator[Any]:
    with ready(FakeServed()) as it:
        yield schemathesis.openapi.from_url(f"{it.url}/openapi.json")
        it.idle()


def test_nothing_that_is_described_makes_it_fail(description: Any) -> None:
    tried = set()
    for found in description.get_all_operations():
        operation = found.ok()
        tried.add(operation.path)

        @settings(
            max_examples=15,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def check(case: Any) -> None:
            if isinstance(case.body, dict):
                case.body["model"] = NAME
            response = case.call()
            assert response.status_code < 500, response.text

        check()
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models/{name}"} <= tried


# --- a process


def test_a_process_ends_well() -> None:
    """It answers while it loads, ends its stream after SIGTERM, and exits with 0."""
    arguments = ["serve", "sample", "--port", "0", "--json", "--memory", "900MiB", "--api-key", "k"]
    process = subprocess.Popen(
        [sys.executable, "-m", "retinue", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"RETINUE_SELF_CHECK": "0"},
    )
    try:
        assert process.stdout is not None
        listening = json.loads(process.stdout.readline())
        health = httpx.get(f"{listening['url']}/health")
        assert (health.status_code, health.json()) == (503, {"status": "loading"})
        while httpx.get(f"{listening['url']}/health", timeout=60).status_code == 503:
            assert process.poll() is None
        with openai.OpenAI(base_url=f"{listening['url']}/v1", api_key="k") as client:
            stream = client.completions.create(
                model=listening["model"], prompt="A: Hello", max_tokens=64, stream=True
            )
            parts = [next(iter(stream))]
            process.send_signal(signal.SIGTERM)
            parts += list(stream)
        assert parts[-1].choices[0].finish_reason in ("length", "stop")
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, said
    assert "preset auto (exact)" in said
    assert "stopping: 1 answers" in said


def test_a_process_need_not_have_loaded_to_end() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "retinue", "serve", "sample", "--port", "0", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert "url" in json.loads(process.stdout.readline())
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, said
    assert "stopped" in said


def test_nor_does_it_wait_for_the_thread_that_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    for loading in (False, True):
        monkeypatch.setattr(serve, "run_server", lambda server, listening, it=loading: it)
        assert main(["serve", "sample"]) == 0
        assert ended == [0] * loading
