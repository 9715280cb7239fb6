"""The application on a loopback port, through OpenAI's own client and through bare sockets."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

REPLY = "Paris is the capital."
MESSAGES: list[Any] = [{"role": "user", "content": "Where?"}]


@pytest.fixture
def client(base_url: str) -> Iterator[openai.OpenAI]:
    http_client = openai.DefaultHttpxClient(trust_env=False)  # no proxy to loopback
    with openai.OpenAI(
        base_url=f"{base_url}/v1", api_key="none", http_client=http_client, max_retries=0
    ) as client:
        yield client


def until(holds: Callable[[], bool]) -> None:
    deadline_s = time.perf_counter() + 10
    while not holds():
        assert time.perf_counter() < deadline_s
        time.sleep(0.01)


def test_openais_client_chats(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0)
    assert answer.choices[0].message.content == REPLY
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(REPLY) + 1
    messages = [*MESSAGES, answer.choices[0].message, *MESSAGES]  # as clients send it back
    assert client.chat.completions.create(model="tiny", messages=messages).choices


def test_openais_client_streams_a_chat(client: openai.OpenAI, fake: Any) -> None:
    fake.step_s = 0.02
    stream = client.chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    arrivals = [(time.perf_counter(), chunk) for chunk in stream]
    chunks = [chunk for _, chunk in arrivals]
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == REPLY
    assert chunks[-1].usage.completion_tokens == len(REPLY) + 1
    assert arrivals[-1][0] - arrivals[0][0] > 0.2  # as it was made, not all at the end


def test_openais_client_completes(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt=["say:a", "say:b"], max_tokens=5, extra_body={"top_k": 3}
    )
    assert [choice.text for choice in answer.choices] == ["a", "b"]
    stream = client.completions.create(model="tiny", prompt="say:abc", max_tokens=5, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "abc"


def test_openais_client_raises_its_own_errors(client: openai.OpenAI, fake: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="tiny"):
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True)
    assert (error.value.param, error.value.code) == ("logprobs", "unsupported_parameter")
    fake.gate.clear()
    stream = client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    fake.crash = True
    fake.gate.set()
    with pytest.raises(openai.APIError, match="fire"):
        list(stream)


def test_a_stream_that_is_closed_early_is_aborted(client: openai.OpenAI, fake: Any) -> None:
    fake.step_s = 0.01
    body = {"ignore_eos": True}
    stream = client.chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, extra_body=body
    )
    next(stream)
    stream.close()
    until(lambda: len(fake.aborted) == 1 and not fake.has_work)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_is_aborted(base_url: str, fake: Any, stream: bool, n: int) -> None:
    fake.gate.clear()
    body = json.dumps(
        {"model": "tiny", "messages": MESSAGES, "n": n, "stream": stream, "ignore_eos": True}
    )
    address = urlsplit(base_url)
    assert address.hostname is not None
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: test\r\nContent-Length: {len(body)}\r\n"
            f"\r\n{body}".encode()
        )
        until(lambda: len(fake.added) == n)
    fake.step_s = 0.05
    fake.gate.set()
    until(lambda: len(fake.aborted) == n and not fake.has_work)
