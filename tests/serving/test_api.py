"""The service as OpenAI's client sees it, and as those see it who mean no good."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
import torch

import lethe_compile as lethe
from lethe_compile.models import reasoner
from lethe_compile.serving.api import Service, ServiceSettings
from lethe_compile.serving.penalties import CountPenalty
from lethe_compile.serving.prompts import Prompts
from lethe_compile.serving.server import Server, listen
from lethe_compile.serving.source import LocalSource

KEY = "sesame"
SECONDS = 120.0
TEMPLATE = "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('users only') }}{% endif %}"
TEMPLATE += "{{ bos_token }} {{ m.content }}{% endfor %}"
BODY, QUEUE, BATCH, STALL = 20_000, 6, 2, 0.5


@dataclass
class Live:
    """A uvicorn server in a thread, on loopback, and what is behind it."""

    engine: lethe.Engine
    port: int
    prompt: list[int]  # ids
    text: str  # the same without <bos>, which the tokenizer puts in front
    fast_tokens: list[int]  # what follows the prompt, greedy, by `generate`
    http: httpx.Client
    client: openai.OpenAI

    def call(self, method: str, path: str, *, key: str | None = KEY, **options: Any) -> httpx.Response:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return self.http.request(method, path, headers=headers, **options)

    def post(self, **body: Any) -> httpx.Response:
        return self.call("POST", "/v1/completions", json={"model": "reasoner", "prompt": self.text, **body})

    def alone(self, new: int) -> list[int]:
        assert len(self.fast_tokens) >= new
        return self.fast_tokens[:new]


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "nothing came of it"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    torch.set_num_threads(1)
    config = lethe.LetheConfig(prune_threshold=32, prune_interval=8, page_size=8, sparse_ratio=5.0)
    fast = lethe.optimize(reasoner.load_model(), config, verified=False)
    tokenizer = reasoner.load_tokenizer()
    prompt = reasoner.problems(1, seed=1).prompt(0)
    alone = fast.generate(torch.tensor([prompt]), max_new_tokens=48, do_sample=False)[0, len(prompt) :].tolist()
    engine = lethe.Engine(fast, max_batch=BATCH, max_queue=QUEUE)
    settings = ServiceSettings("reasoner", [KEY], max_body=BODY, stall=STALL)
    words = Prompts(tokenizer, TEMPLATE)
    service = Service(LocalSource(engine), words, settings)
    listener = listen("127.0.0.1", 0)
    server = Server(service.app, 10.0, engine.close)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    text = tokenizer.decode(prompt, skip_special_tokens=True)
    port = listener.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with httpx.Client(base_url=url, timeout=SECONDS) as http:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=SECONDS)
        yield Live(engine, port, prompt, text, alone, http, client)
        client.close()
    server.should_exit = True
    thread.join(SECONDS)
    words.close()
    engine.close(abort=True)
    assert not thread.is_alive()


def words_of(tokens: list[int]) -> str:
    return str(reasoner.load_tokenizer().decode(tokens))


# --- answers --------------------------------------------------------------------------------------------


def test_a_completion_is_what_generate_gives(live: Live) -> None:
    answer = live.client.completions.create(model="reasoner", prompt=live.text, max_tokens=48)
    (choice,) = answer.choices
    assert choice.text == words_of(live.alone(48))
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    counts = (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens)
    assert counts == (len(live.prompt), 48, len(live.prompt) + 48)


def test_a_stream_has_the_same_text_and_its_usage(live: Live) -> None:
    options = {"include_usage": True}
    stream = live.client.completions.create(
        model="reasoner", prompt=live.prompt, max_tokens=9, stream=True, stream_options=options
    )
    events = list(stream)
    assert "".join(event.choices[0].text for event in events[:-1]) == words_of(live.alone(9))
    assert len(events) > 5, "all of it came at once"
    assert [event.choices[0].finish_reason for event in events[-2:-1]] == ["length"]
    assert events[-1].choices == []
    assert events[-1].usage is not None and events[-1].usage.completion_tokens == 9
    assert all(event.usage is None for event in events[:-1])


def test_a_chat_goes_through_the_template(live: Live) -> None:
    messages: Any = [{"role": "user", "content": [{"type": "text", "text": live.text}]}]
    answer = live.client.chat.completions.create(model="reasoner", messages=messages, max_completion_tokens=6)
    assert answer.choices[0].message.content == words_of(live.alone(6))
    assert answer.choices[0].message.role == "assistant"
    stream = live.client.chat.completions.create(model="reasoner", messages=messages, max_tokens=6, stream=True)
    events = [event.choices[0] for event in stream]
    assert events[0].delta.role == "assistant"
    assert "".join(event.delta.content or "" for event in events) == words_of(live.alone(6))
    assert events[-1].finish_reason == "length"
    with pytest.raises(openai.BadRequestError, match="users only"):
        live.client.chat.completions.create(model="reasoner", messages=[{"role": "system", "content": "x"}])


def test_prompts_times_n_are_choices(live: Live) -> None:
    answer = live.client.completions.create(
        model="reasoner", prompt=[live.text, "walk"], n=2, max_tokens=5, temperature=1.5, seed=3
    )
    texts = [choice.text for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert texts[0] != texts[1] or texts[2] != texts[3], "n draws, not one n times"
    again = live.client.completions.create(
        model="reasoner", prompt=[live.text, "walk"], n=2, max_tokens=5, temperature=1.5, seed=3
    )
    assert [choice.text for choice in again.choices] == texts


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_it(live: Live, stream: bool) -> None:
    whole = words_of(live.alone(12))
    stop = whole.split()[5] + " " + whole.split()[6][:1]  # from one token into the next
    answer = live.post(max_tokens=40, stop=["never", stop], stream=stream)
    before = whole[: whole.index(stop)]
    if stream:
        events = [json.loads(line[6:]) for line in answer.text.split("\n\n")[:-2]]
        assert answer.text.endswith("data: [DONE]\n\n")
        assert "".join(event["choices"][0]["text"] for event in events) == before
        assert events[-1]["choices"][0]["finish_reason"] == "stop"
    else:
        assert answer.json()["choices"][0]["text"] == before
        assert answer.json()["choices"][0]["finish_reason"] == "stop"
    eventually(lambda: live.engine.stats().running == 0)


def test_a_stop_token_is_counted_and_not_shown(live: Live) -> None:
    tokens = live.alone(20)
    at = next(i for i in range(3, 20) if tokens[i] not in tokens[:i])
    answer = live.post(max_tokens=40, stop_token_ids=[tokens[at]]).json()
    assert answer["choices"][0]["text"] == words_of(tokens[:at])
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == at + 1


def test_log_probabilities(live: Live) -> None:
    figures = live.client.completions.create(
        model="reasoner", prompt=live.prompt, max_tokens=4, logprobs=3
    ).choices[0].logprobs  # fmt: skip
    assert figures is not None and figures.tokens is not None and figures.top_logprobs is not None
    assert figures.tokens == [words_of([token]) for token in live.alone(4)]
    assert all(
        max(top, key=lambda name: top[name]) == token
        for top, token in zip(figures.top_logprobs, figures.tokens, strict=True)
    )
    assert figures.text_offset is not None and figures.text_offset[:2] == [0, len(figures.tokens[0])]


def test_a_bias_changes_the_text(live: Live) -> None:
    first = live.alone(1)[0]
    banned = live.post(max_tokens=3, logit_bias={str(first): -100}).json()["choices"][0]["text"]
    assert words_of([first]) not in banned.split()
    assert live.post(max_tokens=3, frequency_penalty=0.1).json()["choices"][0]["text"] == words_of(live.alone(3))


def test_penalties_count_the_text_and_not_the_prompt() -> None:
    penalty, scores = CountPenalty(0.5, 0.25), torch.zeros(1, 5)
    assert penalty(torch.tensor([[1, 1, 2]]), scores).tolist() == [[0, 0, 0, 0, 0]]
    assert penalty(torch.tensor([[1, 1, 2, 3, 3, 2]]), scores).tolist() == [[0, 0, -0.75, -1, 0]]


# --- refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"best_of": 2}, "best_of"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"colour": "red"}, "colour"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"stop": [""]}, "stop"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 9000}, "max_tokens"),
        ({"prompt": []}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1] * 8192}, "prompt"),
        ({"prompt": [352]}, None),
        ({"logit_bias": {"352": 1}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"model": 3}, "model"),
    ],
    ids=lambda value: json.dumps(value)[:30],
)
def test_what_is_not_right_is_named(live: Live, body: dict[str, Any], param: str | None) -> None:
    before = live.engine.stats().prompt_tokens
    if body.get("prompt", 1) is None:
        answer = live.call("POST", "/v1/completions", json={"model": "reasoner"})
    else:
        answer = live.post(**body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and error["type"] == "invalid_request_error" and error["message"]
    assert live.engine.stats().prompt_tokens == before


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b'"x"', b'{"model": "reasoner", "prompt": "\xff"}', b"[" * 9000, b'{"a": ' * 3000]
)
def test_malformed_bodies(live: Live, body: bytes) -> None:
    answer = live.call("POST", "/v1/completions", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_other_errors_have_openais_shape(live: Live) -> None:
    with pytest.raises(openai.NotFoundError, match="this service has 'reasoner'") as caught:
        live.client.completions.create(model="gpt-5", prompt="x")
    assert caught.value.code == "model_not_found"
    assert live.call("GET", "/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert live.call("GET", "/v1/completions").status_code == 405
    assert [model.id for model in live.client.models.list()] == ["reasoner"]
    assert live.client.models.retrieve("reasoner").id == "reasoner"


def test_a_key_is_needed_for_all_but_health(live: Live) -> None:
    for key in (None, "sesam", KEY + "x"):
        for path in ("/v1/models", "/v1/completions", "/metrics", "/nothing"):
            answer = live.call("GET", path, key=key)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
    assert live.call("GET", "/health", key=None).json() == {"status": "ok"}


def raw(live: Live, head: str, *, buffer: int | None = None) -> socket.socket:
    connection = socket.socket()
    connection.settimeout(SECONDS)
    if buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.connect(("127.0.0.1", live.port))
    connection.sendall(f"{head}\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n".encode())
    return connection


def test_a_body_that_is_too_large_is_refused_before_it_comes(live: Live) -> None:
    with raw(live, "POST /v1/completions HTTP/1.1") as connection:
        connection.sendall(b"Content-Length: 1000000000000\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")
    with raw(live, "POST /v1/completions HTTP/1.1") as connection:
        connection.sendall(b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(BODY // 1000 + 1):
            connection.sendall(b"3e8\r\n" + b"x" * 1000 + b"\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")
    assert live.post(prompt="x" * BODY).status_code == 413


# --- load, and clients that leave -----------------------------------------------------------------------


def endless(live: Live, **body: Any) -> bytes:
    """A request of 8,000 tokens, as it goes over the wire."""
    content = {"model": "reasoner", "prompt": live.prompt, "max_tokens": 8000, "ignore_eos": True, **body}
    text = json.dumps(content).encode()
    return f"Content-Length: {len(text)}\r\n\r\n".encode() + text


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_pages(live: Live, stream: bool) -> None:
    eventually(lambda: live.engine.stats().running == 0)
    before = live.engine.stats().cancelled
    with raw(live, "POST /v1/completions HTTP/1.1") as connection:
        connection.sendall(endless(live, stream=stream, n=2))
        eventually(lambda: live.engine.stats().running == 2)
    eventually(lambda: live.engine.stats().cancelled == before + 2)
    eventually(lambda: live.engine.stats().pages_used == 0)


def test_a_reader_that_stalls_is_given_up(live: Live) -> None:
    before = live.engine.stats().cancelled
    with raw(live, "POST /v1/completions HTTP/1.1", buffer=2048) as connection:
        connection.sendall(endless(live, stream=True, logprobs=20))  # 1 kB a token: what is between us is soon full
        eventually(lambda: live.engine.stats().cancelled == before + 1)
    eventually(lambda: live.engine.stats().pages_used == 0)


def test_a_full_queue_asks_to_come_back(live: Live) -> None:
    head = "POST /v1/completions HTTP/1.1"
    with raw(live, head) as first, raw(live, head) as second:
        first.sendall(endless(live, n=BATCH))
        eventually(lambda: live.engine.stats().running == BATCH)
        second.sendall(endless(live, n=QUEUE - 1))
        eventually(lambda: live.engine.stats().queued == QUEUE - 1)
        cancelled = live.engine.stats().cancelled
        with pytest.raises(openai.RateLimitError) as caught:
            live.client.completions.create(model="reasoner", prompt=live.prompt, n=2)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        eventually(lambda: live.engine.stats().cancelled == cancelled + 1)  # all of a call's choices, or none
    eventually(lambda: live.engine.stats().running == 0)


def test_calls_side_by_side(live: Live) -> None:
    async def all_of_them() -> list[str]:
        url = f"http://127.0.0.1:{live.port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=50, timeout=SECONDS) as client:
            calls = [client.completions.create(model="reasoner", prompt=live.text, max_tokens=6) for _ in range(12)]
            return [answer.choices[0].text for answer in await asyncio.gather(*calls)]

    assert asyncio.run(all_of_them()) == [words_of(live.alone(6))] * 12


def test_metrics(live: Live) -> None:
    live.post(max_tokens=2)
    text = live.call("GET", "/metrics").text
    for name in ("queued", "running", "max_batch", "pages_used", "retained_tokens", "rounds_total", "steps_total"):
        assert f'lethe_engine_{name}{{replica="0"}} ' in text
    for name in ("first_token", "per_token", "queue_time", "end_to_end"):
        assert f'lethe_{name}_seconds_bucket{{le="+Inf"}} ' in text
        assert f"lethe_{name}_seconds_count 0.0" not in text
    assert 'lethe_http_requests_total{path="/v1/completions",status="200"}' in text
