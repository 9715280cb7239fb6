"""Bad input: one clear error in OpenAI's shape, and the server keeps serving."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import httpx
import openai.types
import openai.types.chat
import pytest

from jaxserve.config import ServerConfig
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.request import InvalidRequest
from jaxserve.server.protocol import NEUTRAL, ChatBody, CompletionBody

pytestmark = pytest.mark.anyio

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Where?"}]}
COMPLETION = {"model": "tiny", "prompt": "Where?"}


def error_of(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/generate"])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"nonsense",
        b'{"model": "tiny", }',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "temperature": NaN}',
    ],
)
async def test_malformed_json(client: httpx.AsyncClient, path: str, body: bytes) -> None:
    error = error_of(await client.post(path, content=body))
    assert error["type"] == "invalid_request_error"
    assert (await client.get("/health")).status_code == 200


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"stream": "yes"}, "stream"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"stop": 5}, "stop"),
        ({"model": 3}, "model"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"flush": True}}, "stream_options"),
        ({"frequncy_penalty": 0}, "frequncy_penalty"),
    ],
)
@pytest.mark.parametrize("route", ["completions", "chat/completions"])
async def test_wrong_fields_are_named(
    client: httpx.AsyncClient, route: str, change: dict[str, Any], param: str
) -> None:
    body = {**(COMPLETION if route == "completions" else CHAT), **change}
    error = error_of(await client.post(f"/v1/{route}", json=body))
    assert error["param"] == param
    assert param in error["message"]


@pytest.mark.parametrize(
    "change", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"stop": ""}, {"min_p": 2}]
)
async def test_values_out_of_range_are_named(
    client: httpx.AsyncClient, change: dict[str, Any]
) -> None:
    error = error_of(await client.post("/v1/chat/completions", json={**CHAT, **change}))
    assert next(iter(change)) in error["message"]


async def test_all_wrong_fields_are_told_at_once(client: httpx.AsyncClient) -> None:
    body = {**CHAT, "temperature": "hot", "colour": 1}
    message = error_of(await client.post("/v1/chat/completions", json=body))["message"]
    assert "temperature" in message
    assert "colour: unknown parameter" in message


# One value that asks for something, for each field that is not applied.
ASKING: dict[str, Any] = {
    "audio": {"voice": "alloy", "format": "wav"},
    "best_of": 2,
    "echo": True,
    "frequency_penalty": 0.5,
    "function_call": {"name": "f"},
    "functions": [{"name": "f"}],
    "include_stop_str_in_output": True,
    "logit_bias": {"50": 1},
    "logprobs": True,
    "min_tokens": 1,
    "modalities": ["text", "audio"],
    "moderation": {"model": "m"},
    "no_stop_trim": True,
    "parallel_tool_calls": "yes",
    "prediction": {"type": "content", "content": "x"},
    "presence_penalty": -0.5,
    "prompt_cache_options": {"mode": "x"},
    "prompt_cache_retention": "24h",
    "reasoning_effort": "low",
    "repetition_penalty": 1.1,
    "response_format": {"type": "json_object"},
    "service_tier": "flex",
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "store": True,
    "suffix": "end",
    "tool_choice": "required",
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "top_logprobs": 2,
    "verbosity": "low",
    "web_search_options": {},
}
REFUSED = [(route, field) for route in ("chat", "completions") for field in NEUTRAL[route]]


@pytest.mark.parametrize(("route", "field"), REFUSED)
async def test_what_is_not_applied_is_refused(
    client: httpx.AsyncClient, route: str, field: str
) -> None:
    path = "/v1/completions" if route == "completions" else "/v1/chat/completions"
    body = COMPLETION if route == "completions" else CHAT
    error = error_of(await client.post(path, json={**body, field: ASKING[field]}))
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")
    for neutral in (*NEUTRAL[route][field], None):
        response = await client.post(path, json={**body, field: neutral})
        assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("params", "body"),
    [
        (openai.types.chat.completion_create_params.CompletionCreateParamsBase, ChatBody),
        (openai.types.completion_create_params.CompletionCreateParamsBase, CompletionBody),
    ],
)
def test_every_field_of_openais_client_is_known(params: type, body: type) -> None:
    documented = {*inspect.get_annotations(params), "stream"}
    assert documented - set(body.model_fields) == set()


async def test_labels_are_accepted(client: httpx.AsyncClient) -> None:
    labels = {"user": "u", "metadata": {"a": "b"}, "safety_identifier": "s"}
    response = await client.post(
        "/v1/chat/completions", json={**CHAT, **labels, "prompt_cache_key": "k"}
    )
    assert response.status_code == 200


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "Where?",
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "robot", "content": "x"}],
        [{"role": "tool", "content": "x", "tool_call_id": "1"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}],
        [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}],
    ],
)
async def test_wrong_messages_are_refused(client: httpx.AsyncClient, messages: Any) -> None:
    error = error_of(await client.post("/v1/chat/completions", json={**CHAT, "messages": messages}))
    assert error["param"] == "messages"


@pytest.mark.parametrize("prompt", [[], [[]], [-1], [99999], "", [""], ["a", 1], {"a": 1}])
async def test_wrong_prompts_are_refused(client: httpx.AsyncClient, prompt: Any) -> None:
    error = error_of(await client.post("/v1/completions", json={**COMPLETION, "prompt": prompt}))
    assert error["param"] == "prompt"


@pytest.mark.parametrize("stream", [False, True])
async def test_prompt_longer_than_the_context(client: httpx.AsyncClient, stream: bool) -> None:
    long = "x" * 200
    body = {**COMPLETION, "prompt": long, "stream": stream}
    error = error_of(await client.post("/v1/completions", json=body))
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    body = {**CHAT, "messages": [{"role": "user", "content": long}], "stream": stream}
    error = error_of(await client.post("/v1/chat/completions", json=body))
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert "200" in error["message"]


async def test_more_tokens_than_the_context_holds(client: httpx.AsyncClient) -> None:
    error = error_of(await client.post("/v1/completions", json={**COMPLETION, "max_tokens": 195}))
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")
    assert "194" in error["message"]  # the most that can be asked
    response = await client.post("/v1/completions", json={**COMPLETION, "max_tokens": 194})
    assert response.status_code == 200


async def test_unknown_model(client: httpx.AsyncClient) -> None:
    for response in (
        await client.post("/v1/chat/completions", json={**CHAT, "model": "gpt-4"}),
        await client.get("/v1/models/gpt-4"),
    ):
        error = error_of(response, 404)
        assert error["code"] == "model_not_found"
        assert "tiny" in error["message"]


async def test_unknown_route_and_wrong_method(client: httpx.AsyncClient) -> None:
    assert (
        "/v1/chat/completion" in error_of(await client.get("/v1/chat/completion"), 404)["message"]
    )
    response = await client.get("/v1/chat/completions")
    error_of(response, 405)
    assert response.headers["allow"] == "POST"


async def test_contradicting_limits(client: httpx.AsyncClient) -> None:
    body = {**CHAT, "max_tokens": 4, "max_completion_tokens": 5}
    assert error_of(await client.post("/v1/chat/completions", json=body))["param"] == "max_tokens"


@pytest.mark.parametrize("stream", [False, True])
async def test_what_the_engine_refuses_is_a_400(
    client: httpx.AsyncClient, fake: Any, stream: bool
) -> None:
    fake.refusal = InvalidRequest("request needs 41 pages, the pool has 40.")
    body = {**CHAT, "stream": stream}
    error = error_of(await client.post("/v1/chat/completions", json=body))
    assert "41 pages" in error["message"]
    fake.refusal = None
    assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200


async def test_one_refused_choice_refuses_the_batch(client: httpx.AsyncClient, fake: Any) -> None:
    body = {**COMPLETION, "prompt": ["say:a", "x" * 300]}
    error_of(await client.post("/v1/completions", json=body))
    assert fake.added == []


async def test_api_key(engine: AsyncEngine, make_client: Callable[..., httpx.AsyncClient]) -> None:
    config = ServerConfig(served_model_name="tiny", api_key="secret")
    async with make_client(engine, config) as client:
        for key in (None, "wrong", "sécret"):
            headers = [] if key is None else [(b"authorization", f"Bearer {key}".encode())]
            response = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
            assert error_of(response, 401)["code"] == "invalid_api_key"
        assert (await client.get("/health")).status_code == 200
        response = await client.post(
            "/v1/chat/completions", json=CHAT, headers={"Authorization": "Bearer secret"}
        )
        assert response.status_code == 200
        info = await client.get("/get_server_info", headers={"Authorization": "Bearer secret"})
        assert "secret" not in info.text
