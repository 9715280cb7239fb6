"""OpenAI's routes: /v1/models, /v1/completions, /v1/chat/completions."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from jaxserve.request import FinishReason
from jaxserve.server.protocol import COMPLETIONS_MAX_TOKENS, ChatBody, CompletionBody
from jaxserve.server.service import Job, Service, new_id, read_body, usage
from jaxserve.server.streaming import DONE, EventStream, answer, event, merge


def openai_router(service: Service) -> APIRouter:
    """Return the routes under /v1."""
    router = APIRouter(prefix="/v1")
    started = int(time.time())

    def model_card() -> dict[str, Any]:
        return {
            "id": service.model_name,
            "object": "model",
            "created": started,
            "owned_by": "jaxserve",
            "root": service.engine.model_info.name,
            "max_model_len": service.engine.model_info.max_model_len,
        }

    @router.get("/models")
    async def list_models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [model_card()]})

    @router.get("/models/{name:path}")
    async def get_model(name: str) -> JSONResponse:
        service.check_model(name)
        return JSONResponse(model_card())

    @router.post("/completions")
    async def complete(request: Request) -> Response:
        body = await read_body(request, CompletionBody)
        body.check()
        service.check_model(body.model)
        service.engine.check_task("generate")
        jobs = await _completion_jobs(service, body)
        return await _respond(service, request, body, jobs, Completions(service.model_name))

    @router.post("/chat/completions")
    async def chat(request: Request) -> Response:
        body = await read_body(request, ChatBody)
        body.check()
        service.check_model(body.model)
        service.engine.check_task("generate")
        jobs = [await _chat_job(service, body)]
        return await _respond(service, request, body, jobs, ChatCompletions(service.model_name))

    return router


@dataclass(frozen=True)
class Completions:
    """The shape of /v1/completions' answers."""

    model: str

    def head(self, rid: str, *, is_chunk: bool) -> dict[str, Any]:
        return _head(rid, "text_completion", self.model)

    def choice(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}

    def first_delta(self, index: int) -> dict[str, Any] | None:
        return None

    def delta(self, index: int, text: str) -> dict[str, Any]:
        return self.choice(index, text, None)

    def last_delta(self, index: int, finish_reason: str) -> dict[str, Any]:
        return self.choice(index, "", finish_reason)


@dataclass(frozen=True)
class ChatCompletions:
    """The shape of /v1/chat/completions' answers."""

    model: str

    def head(self, rid: str, *, is_chunk: bool) -> dict[str, Any]:
        return _head(rid, "chat.completion.chunk" if is_chunk else "chat.completion", self.model)

    def choice(self, index: int, text: str, finish_reason: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": None,
            "finish_reason": finish_reason,
        }

    def first_delta(self, index: int) -> dict[str, Any] | None:
        return self._chunk(index, {"role": "assistant", "content": ""}, None)

    def delta(self, index: int, text: str) -> dict[str, Any]:
        return self._chunk(index, {"content": text}, None)

    def last_delta(self, index: int, finish_reason: str) -> dict[str, Any]:
        return self._chunk(index, {}, finish_reason)

    def _chunk(
        self, index: int, delta: dict[str, str], finish_reason: str | None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


async def _completion_jobs(service: Service, body: CompletionBody) -> list[Job]:
    rid = new_id("cmpl")
    prompts = body.prompts
    jobs = []
    for i, prompt in enumerate(prompts):
        token_ids = await service.encode(prompt, param="prompt")
        limit = service.token_limit(
            len(token_ids), body.max_tokens, COMPLETIONS_MAX_TOKENS, param="max_tokens"
        )
        sampling = body.sampling(service.default_sampling, limit)
        jobs.append(
            Job(rid if len(prompts) == 1 else f"{rid}-{i}", token_ids, sampling, body.num_choices)
        )
    return jobs


async def _chat_job(service: Service, body: ChatBody) -> Job:
    token_ids = await service.encode_chat([message.for_template() for message in body.messages])
    param = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    limit = service.token_limit(len(token_ids), body.token_limit, None, param=param)
    sampling = body.sampling(service.default_sampling, limit)
    return Job(new_id("chatcmpl"), token_ids, sampling, body.num_choices)


async def _respond(
    service: Service,
    request: Request,
    body: CompletionBody | ChatBody,
    jobs: list[Job],
    form: Completions | ChatCompletions,
) -> Response:
    if not body.stream:
        return await answer(request, _whole(service, jobs, form))
    events = _events(service, jobs, form, include_usage=body.include_usage)
    return await answer(request, EventStream.start(events))


async def _whole(
    service: Service, jobs: list[Job], form: Completions | ChatCompletions
) -> JSONResponse:
    """Wait for all choices and return them in one body."""
    async with service.running(jobs, wants_updates=False) as streams:
        outputs = await asyncio.gather(*(stream.read_all() for stream in streams))
    choices = [
        form.choice(index, output.text, _reason(output.finish_reason))
        for index, output in enumerate(outputs)
    ]
    counts = usage(_num_prompt(jobs), sum(output.num_output for output in outputs))
    return JSONResponse(
        {**form.head(jobs[0].rid, is_chunk=False), "choices": choices, "usage": counts}
    )


async def _events(
    service: Service,
    jobs: list[Job],
    form: Completions | ChatCompletions,
    *,
    include_usage: bool,
) -> AsyncGenerator[bytes, None]:
    """Yield OpenAI's chunks, after an empty piece once the engine has admitted all requests."""
    head = form.head(jobs[0].rid, is_chunk=True)
    usage_field = {"usage": None} if include_usage else {}

    def chunk(choice: dict[str, Any]) -> bytes:
        return event({**head, "choices": [choice], **usage_field})

    async with (
        service.running(jobs, wants_updates=True) as streams,
        contextlib.aclosing(merge(streams)) as outputs,
    ):
        yield b""
        for index in range(len(streams)):
            first = form.first_delta(index)
            if first is not None:
                yield chunk(first)
        num_output = [0] * len(streams)
        async for index, output in outputs:
            num_output[index] = output.num_output
            if output.text:
                yield chunk(form.delta(index, output.text))
            if output.finished:
                yield chunk(form.last_delta(index, _reason(output.finish_reason)))
    if include_usage:
        counts = usage(_num_prompt(jobs), sum(num_output))
        yield event({**head, "choices": [], "usage": counts})
    yield DONE


def _head(rid: str, kind: str, model: str) -> dict[str, Any]:
    return {
        "id": rid,
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": None,
    }


def _num_prompt(jobs: Sequence[Job]) -> int:
    return sum(len(job.prompt_token_ids) for job in jobs)


def _reason(reason: FinishReason | None) -> str:
    assert reason is not None, "a finished request says why"
    return reason.value
