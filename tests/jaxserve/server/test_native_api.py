"""SGLang's /generate, and what operators ask: health, info, abort."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from jaxserve.config import ServerConfig
from jaxserve.engine.async_engine import AsyncEngine, StartupProgress
from jaxserve.server.protocol import NEUTRAL

pytestmark = pytest.mark.anyio

REPLY = "Paris is the capital."


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.01)


async def generate(client: httpx.AsyncClient, **body: Any) -> Any:
    response = await client.post("/generate", json=body)
    assert response.status_code == 200, response.text
    if not body.get("stream"):
        return response.json()
    *events, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


async def test_generate_answers_in_sglangs_shape(client: httpx.AsyncClient) -> None:
    result = await generate(client, text="Where?", rid="mine")
    assert result["text"] == REPLY
    assert bytes(result["output_ids"][:-1]).decode() == REPLY
    meta = result["meta_info"]
    assert meta.pop("e2e_latency") >= 0
    assert meta == {
        "id": "mine",
        "finish_reason": {"type": "stop", "matched": 258},
        "prompt_tokens": 6,
        "completion_tokens": len(REPLY) + 1,
    }


async def test_generate_takes_token_ids_and_lists(client: httpx.AsyncClient) -> None:
    assert (await generate(client, input_ids=list(b"say:a")))["text"] == "a"
    results = await generate(client, input_ids=[list(b"say:a"), list(b"say:b")])
    assert [result["text"] for result in results] == ["a", "b"]
    params = [{"max_new_tokens": 1}, {"max_new_tokens": 2}]
    results = await generate(client, text=["say:abc", "say:abc"], sampling_params=params)
    assert [result["text"] for result in results] == ["a", "ab"]
    assert results[1]["meta_info"]["finish_reason"] == {"type": "length", "length": 2}
    assert len(await generate(client, text=["one"])) == 1


async def test_generate_streams_the_text_so_far(client: httpx.AsyncClient, fake: Any) -> None:
    fake.step_s = 0.02
    events = await generate(client, text="say:abc", stream=True)
    texts = [event["text"] for event in events]
    assert len(texts) > 1
    assert texts[-1] == "abc"
    assert all(later.startswith(text) for text, later in itertools.pairwise(texts))
    assert events[-1]["output_ids"] == [*b"abc", 258]
    *reasons, last = [event["meta_info"]["finish_reason"] for event in events]
    assert (set(reasons), last) == ({None}, {"type": "stop", "matched": 258})


async def test_generate_streams_a_list_with_indices(client: httpx.AsyncClient) -> None:
    events = await generate(client, text=["say:ab", "say:cd"], stream=True)
    last = {event["index"]: event["text"] for event in events}
    assert last == {0: "ab", 1: "cd"}


async def test_generate_n_choices(client: httpx.AsyncClient, fake: Any) -> None:
    results = await generate(client, text="x", sampling_params={"n": 2, "sampling_seed": 5})
    assert [result["text"] for result in results] == [REPLY] * 2
    assert sorted(sampling.seed for _, sampling, _ in fake.added) == [5, 6]


async def test_generate_tells_which_stop_matched(client: httpx.AsyncClient) -> None:
    result = await generate(client, text="x", sampling_params={"stop": [" the"]})
    assert result["text"] == "Paris is"
    assert result["meta_info"]["finish_reason"] == {"type": "stop", "matched": " the"}
    assert bytes(result["output_ids"]).decode() == "Paris is the"


ASKING = {
    "return_text_in_logprobs": "yes",
    "logprob_start_len": 0,
    "top_logprobs_num": 1,
    "min_new_tokens": 1,
    "frequency_penalty": 1,
    "presence_penalty": 1,
    "repetition_penalty": 2,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
}


@pytest.mark.parametrize("field", NEUTRAL["generate"])
async def test_fields_that_are_not_applied_are_refused(
    client: httpx.AsyncClient, field: str
) -> None:
    response = await client.post("/generate", json={"text": "x", field: ASKING.get(field, True)})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field
    for neutral in NEUTRAL["generate"][field]:
        await generate(client, text="x", **{field: neutral})


@pytest.mark.parametrize("field", NEUTRAL["generate.sampling_params"])
async def test_sampling_params_that_are_not_applied_are_refused(
    client: httpx.AsyncClient, field: str
) -> None:
    body = {"text": "x", "sampling_params": {field: ASKING.get(field, True)}}
    response = await client.post("/generate", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field
    for neutral in NEUTRAL["generate.sampling_params"][field]:
        await generate(client, text="x", sampling_params={field: neutral})


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"text": "x", "input_ids": [1]},
        {"text": []},
        {"input_ids": []},
        {"text": ["a", "b"], "rid": ["one"]},
        {"text": "a", "rid": ["one"]},
        {"text": ["a", "b"], "sampling_params": [{}]},
        {"text": "x", "sampling_params": {"max_new_tokens": 0}},
        {"text": "x", "sampling_params": {"max_tokens": 5}},
        {"text": "x", "sampling_params": {"max_new_tokens": 500}},
        {"text": "x" * 500},
        {"text": "x", "colour": "red"},
    ],
)
async def test_wrong_bodies_are_refused(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    response = await client.post("/generate", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


async def test_abort_ends_a_request_by_its_rid(client: httpx.AsyncClient, fake: Any) -> None:
    fake.gate.clear()
    running = asyncio.create_task(
        generate(client, text="x", rid="mine", sampling_params={"n": 2, "ignore_eos": True})
    )
    await until(lambda: len(fake.added) == 2)
    assert (await client.post("/abort_request", json={"rid": "other"})).json() == {"num_aborted": 0}
    assert (await client.post("/abort_request", json={"rid": "mine"})).json() == {"num_aborted": 2}
    fake.gate.set()
    results = await running
    assert [r["meta_info"]["finish_reason"]["type"] for r in results] == ["abort"] * 2
    assert sorted(fake.aborted)[:2] == ["mine-0", "mine-1"]


async def test_abort_all_and_neither(client: httpx.AsyncClient, fake: Any) -> None:
    fake.gate.clear()
    running = asyncio.create_task(generate(client, text=["x", "y"]))
    await until(lambda: len(fake.added) == 2)
    response = await client.post("/abort_request", json={"abort_all": True})
    assert response.json() == {"num_aborted": 2}
    fake.gate.set()
    await running
    assert (await client.post("/abort_request", json={})).status_code == 400


async def test_a_rid_in_use_is_refused(client: httpx.AsyncClient, fake: Any) -> None:
    fake.gate.clear()
    running = asyncio.create_task(generate(client, text="x", rid="mine"))
    await until(lambda: len(fake.added) == 1)
    response = await client.post("/generate", json={"text": "x", "rid": "mine"})
    assert response.status_code == 400
    fake.gate.set()
    assert (await running)["text"] == REPLY


async def test_health_and_info(client: httpx.AsyncClient, fake: Any) -> None:
    health = await client.get("/health")
    assert (health.status_code, health.json()["state"]) == (200, "ready")
    assert (await client.get("/health_generate")).status_code == 200
    assert fake.added[-1][1].max_tokens == 1
    info = (await client.get("/get_model_info")).json()
    assert (info["model_path"], info["max_model_len"], info["is_generation"]) == ("fake", 200, True)
    server = (await client.get("/get_server_info")).json()
    assert server["state"] == "ready"
    assert server["stats"]["num_steps"] >= 1


async def test_health_tells_what_start_up_does(
    fake: Any, make_client: Callable[..., Any], config: ServerConfig
) -> None:
    go_on = asyncio.Event()
    loop = asyncio.get_running_loop()

    def build(progress: StartupProgress) -> Any:
        progress("loading weights", 3, 7)
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result()
        return fake

    engine = AsyncEngine(build)
    async with make_client(engine, config) as client:
        while not (await client.get("/health")).json()["progress"]:
            await asyncio.sleep(0.01)
        health = await client.get("/health")
        assert health.status_code == 503
        assert health.json() == {
            "state": "starting",
            "progress": [{"stage": "loading weights", "done": 3, "total": 7}],
        }
        engine.progress("compiling", 1, 9)
        assert (await client.get("/health")).json()["state"] == "compiling"
        for path in ("/v1/models", "/health_generate", "/get_model_info"):
            assert (await client.get(path)).status_code == 503
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
        response = await client.post("/v1/chat/completions", json=body)
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "engine_unavailable"
        go_on.set()
        while (await client.get("/health")).status_code != 200:
            await asyncio.sleep(0.01)
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    engine.close()


async def test_a_crash_fails_what_runs_and_turns_health_red(
    client: httpx.AsyncClient, fake: Any, caplog: pytest.LogCaptureFixture
) -> None:
    fake.gate.clear()
    whole = asyncio.create_task(client.post("/generate", json={"text": "x"}))
    streamed = asyncio.create_task(client.post("/generate", json={"text": "x", "stream": True}))
    await until(lambda: len(fake.added) == 2)
    fake.crash = True
    fake.gate.set()
    assert (await whole).status_code == 503
    response = await streamed
    assert "fire" in response.text
    assert "[DONE]" not in response.text
    health = await client.get("/health")
    assert (health.status_code, health.json()["state"]) == (503, "dead")
    assert "fire" in health.json()["error"]
    assert (await client.post("/generate", json={"text": "x"})).status_code == 503
    await until(lambda: fake.is_closed)
    assert "the engine failed" in caplog.text
