"""/v1/models, /v1/completions and /v1/chat/completions over the fake engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from jaxserve.config import ServerConfig
from jaxserve.engine.async_engine import AsyncEngine

pytestmark = pytest.mark.anyio

REPLY = "Paris is the capital."
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Where?"}]}
COMPLETION = {"model": "tiny", "prompt": "Where?", "max_tokens": 50}


def chunks_of(response: httpx.Response) -> list[dict[str, Any]]:
    """Return the events of a streamed answer, which must end as OpenAI's do."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


async def test_models_lists_the_served_name(client: httpx.AsyncClient) -> None:
    listing = (await client.get("/v1/models")).json()
    assert listing["object"] == "list"
    (card,) = listing["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("tiny", "model", 200)
    assert (await client.get("/v1/models/tiny")).json() == card


@pytest.mark.parametrize("model", [{}, {"model": None}])
async def test_a_request_that_names_no_model_gets_the_one_served(
    client: httpx.AsyncClient, model: dict[str, None]
) -> None:
    for route, body in (("completions", COMPLETION), ("chat/completions", CHAT)):
        rest = {key: value for key, value in body.items() if key != "model"}
        answer = await client.post(f"/v1/{route}", json={**rest, **model})
        assert answer.status_code == 200
        assert answer.json()["model"] == "tiny"


async def test_chat_answers(client: httpx.AsyncClient) -> None:
    answer = (await client.post("/v1/chat/completions", json=CHAT)).json()
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == "tiny"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": REPLY, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    num_prompt = len("Where?") + 4  # <bos>, <|user|>, <eos>, <|assistant|>
    num_output = len(REPLY) + 1  # and the end token
    assert answer["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
    }


async def test_chat_streams_role_text_and_reason(client: httpx.AsyncClient, fake: Any) -> None:
    fake.step_s = 0.02
    chunks = chunks_of(await client.post("/v1/chat/completions", json={**CHAT, "stream": True}))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(choice["delta"]["content"] for choice in choices[1:-1]) == REPLY
    assert len(choices) > 4
    assert choices[-1]["delta"] == {}
    reasons = [choice["finish_reason"] for choice in choices]
    assert reasons == [None] * (len(choices) - 1) + ["stop"]


async def test_usage_comes_in_a_last_chunk_when_asked(client: httpx.AsyncClient) -> None:
    body = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = chunks_of(await client.post("/v1/chat/completions", json=body))
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == len(REPLY) + 1


async def test_completion_answers_and_streams_the_same(client: httpx.AsyncClient) -> None:
    answer = (await client.post("/v1/completions", json=COMPLETION)).json()
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [
        {"index": 0, "text": REPLY, "logprobs": None, "finish_reason": "stop"}
    ]
    chunks = chunks_of(await client.post("/v1/completions", json={**COMPLETION, "stream": True}))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == REPLY
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


async def test_completion_gives_sixteen_tokens_unless_told(client: httpx.AsyncClient) -> None:
    answer = (await client.post("/v1/completions", json={"model": "tiny", "prompt": "x"})).json()
    assert answer["choices"][0]["text"] == REPLY[:16]
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 16


async def test_prompts_may_be_texts_or_token_ids(client: httpx.AsyncClient, fake: Any) -> None:
    for prompt in ("say:a", ["say:a", "say:bc"], list(b"say:a"), [list(b"say:a"), list(b"say:bc")]):
        answer = (
            await client.post("/v1/completions", json={**COMPLETION, "prompt": prompt})
        ).json()
        expected = ["a"] if isinstance(prompt, str) or isinstance(prompt[0], int) else ["a", "bc"]
        assert [choice["text"] for choice in answer["choices"]] == expected
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))
    assert answer["usage"] == {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16}


@pytest.mark.parametrize("stream", [False, True])
async def test_n_choices_have_seeds_of_their_own(
    client: httpx.AsyncClient, fake: Any, stream: bool
) -> None:
    body = {**CHAT, "n": 3, "seed": 7, "stream": stream}
    response = await client.post("/v1/chat/completions", json=body)
    assert sorted(sampling.seed for _, sampling, _ in fake.added) == [7, 8, 9]
    if stream:
        texts = ["", "", ""]
        for chunk in chunks_of(response):
            choice = chunk["choices"][0]
            texts[choice["index"]] += choice["delta"].get("content", "")
    else:
        texts = [choice["message"]["content"] for choice in response.json()["choices"]]
        assert response.json()["usage"]["prompt_tokens"] == len(fake.added[0][0])
    assert texts == [REPLY] * 3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", [" the", [" the", "never"], ["capital", " the"]])
async def test_a_stop_string_ends_the_text_before_it(
    client: httpx.AsyncClient, fake: Any, stop: Any, stream: bool
) -> None:
    body = {**COMPLETION, "stop": stop, "stream": stream}
    response = await client.post("/v1/completions", json=body)
    if stream:
        choices = [chunk["choices"][0] for chunk in chunks_of(response)]
    else:
        choices = response.json()["choices"]
        assert response.json()["usage"]["completion_tokens"] == len("Paris is the")
    assert "".join(choice["text"] for choice in choices) == "Paris is"
    assert choices[-1]["finish_reason"] == "stop"
    async with asyncio.timeout(10):
        while fake.has_work:  # the abort reaches it between two steps
            await asyncio.sleep(0.01)


async def test_stop_token_ids_end_the_text_before_them(client: httpx.AsyncClient) -> None:
    body = {**COMPLETION, "stop_token_ids": [ord("t")]}
    choice = (await client.post("/v1/completions", json=body)).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("Paris is ", "stop")


async def test_ignore_eos_goes_on(client: httpx.AsyncClient) -> None:
    body = {**COMPLETION, "ignore_eos": True}
    choice = (await client.post("/v1/completions", json=body)).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["text"] == (REPLY * 3)[: 50 - 2]  # two end tokens have no text


async def test_characters_of_several_tokens_stream_whole(
    client: httpx.AsyncClient, fake: Any
) -> None:
    fake.step_s = 0.02
    body = {**COMPLETION, "prompt": "say:é東😀!", "stream": True}
    chunks = chunks_of(await client.post("/v1/completions", json=body))
    pieces = [chunk["choices"][0]["text"] for chunk in chunks]
    assert "".join(pieces) == "é東😀!"
    assert len([piece for piece in pieces if piece]) > 1
    assert not any("\ufffd" in piece for piece in pieces)


async def test_sampling_fields_reach_the_engine(client: httpx.AsyncClient, fake: Any) -> None:
    asked = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 3}
    await client.post("/v1/chat/completions", json={**CHAT, **asked, "max_completion_tokens": 4})
    (_, sampling, _) = fake.added[0]
    assert {name: getattr(sampling, name) for name in asked} == asked
    assert sampling.max_tokens == 4


async def test_defaults_come_from_the_checkpoint_then_from_openai(
    make_fake: Callable[..., Any], make_client: Callable[..., Any], config: ServerConfig
) -> None:
    fake = make_fake({"temperature": 0.6, "top_k": 20})
    engine = AsyncEngine(lambda progress: fake)
    engine.wait_until_ready()
    async with make_client(engine, config) as client:
        await client.post("/v1/chat/completions", json=CHAT)
        await client.post("/v1/chat/completions", json={**CHAT, "temperature": 0})
    engine.close()
    first, second = (sampling for _, sampling, _ in fake.added)
    assert (first.temperature, first.top_k, first.top_p) == (0.6, 20, 1.0)
    assert (second.temperature, second.top_k) == (0.0, 20)
    assert first.max_tokens is None  # up to the context limit


async def test_messages_may_have_parts_developers_and_echoed_fields(
    client: httpx.AsyncClient, fake: Any
) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": t} for t in ("a", "b")]},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None, "audio": None},
        {"role": "user", "content": "d"},
    ]
    response = await client.post("/v1/chat/completions", json={**CHAT, "messages": messages})
    assert response.status_code == 200, response.text
    text = fake.tokenizer.decode(fake.added[0][0], skip_special_tokens=False)
    assert text == (
        "<bos><|system|>Be brief.<eos><|user|>a\nb<eos><|assistant|>c<eos><|user|>d<eos>"
        "<|assistant|>"
    )


async def test_the_servers_chat_template_is_used(
    engine: AsyncEngine, fake: Any, make_client: Callable[..., Any], tmp_path: Any
) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages[0].content }}!", "utf-8")
    async with make_client(
        engine, ServerConfig(served_model_name="tiny", chat_template=str(file))
    ) as client:
        await client.post("/v1/chat/completions", json=CHAT)
    assert bytes(fake.added[0][0]) == b"Where?!"
