"""Routes that read texts: /v1/embeddings, /encode, /classify, /v1/score, /v1/rerank."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from jaxserve.engine.async_engine import Task
from jaxserve.engine.reading import unit
from jaxserve.server.errors import bad_request
from jaxserve.server.protocol import ChatMessage, TokenIds
from jaxserve.server.reading_protocol import EmbeddingBody, ReadBody, RerankBody, ScoreBody
from jaxserve.server.service import Service, new_id, read_body, usage
from jaxserve.server.streaming import answer


def reading_router(service: Service) -> APIRouter:
    """Return the routes of models that write no text; others answer 400 with the remedy."""
    router = APIRouter()

    @router.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        body = await read_body(request, EmbeddingBody)
        service.check_model(body.model)
        service.engine.check_task("embed")
        return await answer(request, _embeddings(service, body))

    @router.post("/encode")
    async def encode(request: Request) -> Response:
        return await answer(request, _read(service, await read_body(request, ReadBody), "embed"))

    @router.post("/classify")
    async def classify(request: Request) -> Response:
        return await answer(request, _read(service, await read_body(request, ReadBody), "score"))

    @router.post("/v1/score")
    async def score(request: Request) -> Response:
        body = await read_body(request, ScoreBody)
        service.check_model(body.model)
        service.engine.check_task("score")
        return await answer(request, _score(service, body))

    @router.post("/v1/rerank")
    async def rerank(request: Request) -> Response:
        body = await read_body(request, RerankBody)
        service.check_model(body.model)
        service.engine.check_task("score")
        return await answer(request, _rerank(service, body))

    return router


async def _embeddings(service: Service, body: EmbeddingBody) -> JSONResponse:
    info = service.engine.model_info
    size = body.dimensions
    if size is not None and size > info.embedding_size:
        raise bad_request(
            f"dimensions={size} is more than the {info.embedding_size} of this model. Ask for at "
            "most that many.",
            param="dimensions",
        )
    texts = [await service.encode(text, param="input") for text in body.texts]
    vectors = await service.read("embed", texts, _ids("embd", len(texts)))
    if size is not None:
        cut = (vector[:size] for vector in vectors)
        vectors = [unit(vector) if info.is_normalized else vector for vector in cut]
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": _base64(v) if body.encoding_format == "base64" else v.tolist(),
        }
        for index, v in enumerate(vectors)
    ]
    return JSONResponse(
        {
            "object": "list",
            "data": data,
            "model": service.model_name,
            "usage": _prompt_usage(texts),
        }
    )


async def _read(service: Service, body: ReadBody, task: Task) -> JSONResponse:
    """Answer in SGLang's shape; what a text was read as is called its embedding there."""
    started_s = time.perf_counter()
    service.check_model(body.model)
    service.engine.check_task(task)
    field, value = body.given
    rids = [rid or new_id("read") for rid in body.rids]
    values = value if body.is_batch else [value]
    texts = [await _token_ids(service, one, field) for one in values]
    results = await service.read(task, texts, rids)
    answers = [
        {"embedding": result.tolist(), "meta_info": _meta(rid, text, started_s)}
        for result, rid, text in zip(results, rids, texts, strict=True)
    ]
    return JSONResponse(answers if body.is_batch else answers[0])


async def _token_ids(
    service: Service, value: str | TokenIds | list[ChatMessage], param: str
) -> TokenIds:
    if isinstance(value, list) and value and isinstance(value[0], ChatMessage):
        messages = [message.for_template() for message in value]  # pyright: ignore
        return await service.encode_conversation(messages, param=param)
    return await service.encode(value, param=param)  # pyright: ignore


async def _score(service: Service, body: ScoreBody) -> JSONResponse:
    texts = [await service.encode(text, param="items") for text in body.texts()]
    scores = await service.read("score", texts, _ids("score", len(texts)))
    if body.apply_softmax:
        scores = [_softmax(one) for one in scores]
    return JSONResponse(
        {
            "object": "scoring",
            "model": service.model_name,
            "scores": [one.tolist() for one in scores],
            "usage": _prompt_usage(texts),
        }
    )


async def _rerank(service: Service, body: RerankBody) -> JSONResponse:
    started_s = time.perf_counter()
    labels = service.engine.model_info.labels
    if labels != 1:
        raise bad_request(
            f"ranking needs a model with one score; this one has {labels}. Use /v1/score and "
            "choose among them."
        )
    texts = await asyncio.to_thread(
        lambda: [service.encode_pair(body.query, document) for document in body.documents]
    )
    for text in texts:
        service.check_prompt(text, param="documents")
    rids = _ids("rerank", len(texts))
    scores = [float(one[0]) for one in await service.read("score", texts, rids)]
    best = sorted(range(len(scores)), key=lambda i: -scores[i])[: body.top_n]
    return JSONResponse(
        [
            {
                "score": scores[i],
                "document": body.documents[i] if body.return_documents else None,
                "index": i,
                "meta_info": _meta(rids[i], texts[i], started_s),
            }
            for i in best
        ]
    )


def _ids(prefix: str, count: int) -> list[str]:
    whole = new_id(prefix)
    return [f"{whole}-{i}" for i in range(count)]


def _meta(rid: str, text: TokenIds, started_s: float) -> dict[str, Any]:
    return {
        "id": rid,
        "finish_reason": {"type": "length", "length": 0},
        "prompt_tokens": len(text),
        "e2e_latency": time.perf_counter() - started_s,
    }


def _prompt_usage(texts: Sequence[TokenIds]) -> dict[str, int]:
    counts = usage(sum(map(len, texts)), 0)
    del counts["completion_tokens"]  # OpenAI's embeddings have none
    return counts


def _base64(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")


def _softmax(scores: np.ndarray) -> np.ndarray:
    wide = np.exp(scores.astype(np.float64) - scores.max())
    return wide / wide.sum()
