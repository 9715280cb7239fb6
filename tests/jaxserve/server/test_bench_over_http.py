"""`jaxserve bench serve --url`, and a server without a tokenizer, on a loopback port."""

from __future__ import annotations

import json

import httpx
import pytest

from jaxserve import cli
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.tokenizer import NoTokenizer

LOAD = ["--num-requests", "5", "--input-tokens", "7", "--output-tokens", "6"]


def test_a_running_server_is_measured(
    base_url: str, fake, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.step_s = 0.005
    assert cli.main(["bench", "serve", "--url", base_url, *LOAD, "--request-rate", "inf"]) == 0
    said = capsys.readouterr()
    (result,) = map(json.loads, said.out.splitlines())
    assert result["case"] == "serve inf/s"
    assert (result["requests"], result["input_tokens"], result["output_tokens"]) == (5, 7, 6)
    assert result["tpot_ms"] > 4, "each token takes a step"
    assert result["settings"]["architecture"] == "FakeForCausalLM"
    measured = fake.added[-5:]
    assert all(len(prompt) == 7 for prompt, _, _ in measured)
    assert all(sampling.ignore_eos and sampling.max_tokens == 6 for _, sampling, _ in measured)
    assert len(fake.added) > 5, "some requests come before those that are timed"


def test_an_error_of_the_server_is_told(
    base_url: str, fake, capsys: pytest.CaptureFixture[str]
) -> None:
    load = ["--input-tokens", "500"]
    assert cli.main(["bench", "serve", "--url", base_url, *load]) == 1
    told = capsys.readouterr().err
    assert "/generate answered 400" in told
    assert "the model's context is 200 tokens" in told


@pytest.mark.anyio
async def test_a_server_without_a_tokenizer_takes_token_ids(
    engine: AsyncEngine, fake, client: httpx.AsyncClient
) -> None:
    fake.tokenizer = NoTokenizer()
    ids = [1, 2, 3]
    sampling = {"max_new_tokens": 4, "ignore_eos": True}
    answer = await client.post("/generate", json={"input_ids": ids, "sampling_params": sampling})
    assert answer.status_code == 200
    assert len(answer.json()["output_ids"]) == 4
    assert answer.json()["text"] == ""
    body = {"model": "tiny", "prompt": ids, "max_tokens": 4}
    answer = await client.post("/v1/completions", json=body)
    assert answer.json()["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
    }
    assert (await client.get("/health_generate")).status_code == 200
    model_info = (await client.get("/get_model_info")).json()
    assert model_info["has_chat_template"] is False


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"text": "Hello"}),
        ("/v1/completions", {"model": "tiny", "prompt": "Hello"}),
        ("/v1/completions", {"model": "tiny", "prompt": [1, 2], "stop": "x"}),
        (
            "/v1/chat/completions",
            {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]},
        ),
    ],
)
async def test_without_a_tokenizer_text_is_refused(
    path: str, body: dict, engine: AsyncEngine, fake, client: httpx.AsyncClient
) -> None:
    fake.tokenizer = NoTokenizer()
    answer = await client.post(path, json=body)
    assert answer.status_code == 400
    assert "without a tokenizer" in answer.json()["error"]["message"]
