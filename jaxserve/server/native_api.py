"""SGLang's native routes, and what operators ask: /generate, /health, /get_model_info, …"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from jaxserve.engine.async_engine import RequestStream
from jaxserve.request import FinishReason, RequestOutput, SamplingParams
from jaxserve.server.errors import APIError, bad_request
from jaxserve.server.protocol import GENERATE_MAX_TOKENS, AbortBody, GenerateBody
from jaxserve.server.service import Job, Service, new_id, read_body
from jaxserve.server.streaming import DONE, EventStream, answer, event, merge
from jaxserve.version import __version__

HEALTH_PROMPT, HEALTH_TOKEN = "Hello", 0


def native_router(service: Service) -> APIRouter:
    """Return the routes outside /v1."""
    router = APIRouter()
    engine = service.engine

    @router.post("/generate")
    async def generate(request: Request) -> Response:
        body = await read_body(request, GenerateBody)
        body.check()
        engine.check_task("generate")
        jobs = await _generate_jobs(service, body)
        as_list = body.is_batch or jobs[0].num_choices > 1
        if not body.stream:
            return await answer(request, _whole(service, jobs, as_list=as_list))
        return await answer(request, EventStream.start(_events(service, jobs, as_list=as_list)))

    @router.post("/abort_request")
    async def abort_request(request: Request) -> JSONResponse:
        body = await read_body(request, AbortBody)
        if body.abort_all == (body.rid is not None):
            raise bad_request("send either rid or abort_all=true.", param="rid")
        return JSONResponse(
            {"num_aborted": service.abort_all() if body.rid is None else service.abort(body.rid)}
        )

    @router.get("/health")
    async def health() -> JSONResponse:
        state = engine.state
        told = {"state": state, "progress": engine.progress.describe()}
        if engine.error is not None:
            told["error"] = str(engine.error)
        return JSONResponse(told, 200 if state == "ready" else 503)

    @router.get("/health_generate")
    async def health_generate(request: Request) -> Response:
        tokenizer = engine.tokenizer
        prompt = tokenizer.encode(HEALTH_PROMPT) if tokenizer.has_text else [HEALTH_TOKEN]
        if engine.model_info.task != "generate":
            return await answer(request, _one_text(service, prompt))
        sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        job = Job(new_id("health"), prompt, sampling)
        return await answer(request, _one_token(service, job))

    @router.get("/get_model_info")
    async def get_model_info() -> JSONResponse:
        return JSONResponse(_model_info(service))

    @router.get("/get_server_info")
    async def get_server_info() -> JSONResponse:
        config = dataclasses.asdict(service.config)
        config["api_key"] = None if config["api_key"] is None else "(set)"
        return JSONResponse(
            {
                "version": __version__,
                "state": engine.state,
                "num_active": engine.num_active,
                "model": _model_info(service),
                "server": config,
                "stats": _plain(engine.stats()),
            }
        )

    return router


def _model_info(service: Service) -> dict[str, Any]:
    return {
        "model_path": service.engine.model_info.name,
        "served_model_name": service.model_name,
        "is_generation": service.engine.model_info.task == "generate",
        "has_chat_template": service.chat_template is not None
        or service.engine.tokenizer.has_chat_template,
        "preferred_sampling_params": dict(service.default_sampling),
        **_plain(service.engine.model_info),
    }


def _plain(value: Any) -> Any:
    """Return dataclasses and mappings as dicts, and what JSON does not know as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


async def _generate_jobs(service: Service, body: GenerateBody) -> list[Job]:
    param = "text" if body.text is not None else "input_ids"
    prompts = body.prompts
    rids = body.rid if isinstance(body.rid, list) else [body.rid] * len(prompts)
    jobs = []
    for i, (prompt, params) in enumerate(zip(prompts, body.sampling_params_list, strict=True)):
        token_ids = await service.encode(prompt, param=param)
        limit = service.token_limit(
            len(token_ids), params.max_new_tokens, GENERATE_MAX_TOKENS, param="max_new_tokens"
        )
        rid = rids[i] or new_id("gen")
        if isinstance(body.rid, str) and body.is_batch:
            rid = f"{rid}-{i}"
        sampling = params.sampling(service.default_sampling, limit)
        jobs.append(Job(rid, token_ids, sampling, params.n or 1))
    return jobs


async def _whole(service: Service, jobs: list[Job], *, as_list: bool) -> JSONResponse:
    started_s = time.perf_counter()

    async def one(stream: RequestStream) -> dict[str, Any]:
        output = await stream.read_all()
        return _result(stream, output, output.text, list(output.token_ids), started_s)

    async with service.running(jobs, wants_updates=False) as streams:
        results = await asyncio.gather(*(one(stream) for stream in streams))
    return JSONResponse(results if as_list else results[0])


async def _events(
    service: Service, jobs: list[Job], *, as_list: bool
) -> AsyncGenerator[bytes, None]:
    """Yield SGLang's chunks, each with all of the text so far, after an empty first piece."""
    started_s = time.perf_counter()
    async with (
        service.running(jobs, wants_updates=True) as streams,
        contextlib.aclosing(merge(streams)) as outputs,
    ):
        yield b""
        texts = [""] * len(streams)
        token_ids: list[list[int]] = [[] for _ in streams]
        async for index, output in outputs:
            texts[index] += output.text
            token_ids[index].extend(output.token_ids)
            result = _result(streams[index], output, texts[index], token_ids[index], started_s)
            yield event({**result, "index": index} if as_list else result)
    yield DONE


async def _one_text(service: Service, prompt: list[int]) -> JSONResponse:
    await service.read(service.engine.model_info.task, [prompt], [new_id("health")])
    return JSONResponse({"state": service.engine.state})


async def _one_token(service: Service, job: Job) -> JSONResponse:
    async with service.running([job], wants_updates=False) as streams:
        output = await streams[0].read_all()
    if output.num_output != 1:
        raise APIError(503, f"the engine gave {output.num_output} tokens when asked for one.")
    return JSONResponse({"state": service.engine.state})


def _result(
    stream: RequestStream,
    output: RequestOutput,
    text: str,
    token_ids: list[int],
    started_s: float,
) -> dict[str, Any]:
    """Return one answer in SGLang's shape: the text and tokens so far, and where it stands."""
    meta: dict[str, Any] = {
        "id": stream.request_id,
        "finish_reason": None,
        "prompt_tokens": output.num_prompt,
        "completion_tokens": output.num_output,
    }
    if output.finished:
        meta["finish_reason"] = _finish_reason(stream, output)
        meta["e2e_latency"] = time.perf_counter() - started_s
    return {"text": text, "output_ids": token_ids, "meta_info": meta}


def _finish_reason(stream: RequestStream, output: RequestOutput) -> dict[str, Any]:
    if output.finish_reason is FinishReason.STOP:
        return {"type": "stop", "matched": stream.stop_reason}
    if output.finish_reason is FinishReason.LENGTH:
        return {"type": "length", "length": output.num_output}
    return {"type": "abort", "message": "the request was aborted"}
