"""Server-sent events, several request streams in one, and what happens when a client hangs up."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxserve.engine.async_engine import RequestStream
from jaxserve.request import RequestOutput
from jaxserve.server.errors import CLIENT_CLOSED_REQUEST, to_api_error

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


def event(data: Mapping[str, Any]) -> bytes:
    """Return one server-sent event that carries `data` as JSON."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


class EventStream(Response):
    """Send events as they come; when the client hangs up, the generator is closed at once.

    An exception of the generator becomes a last event in OpenAI's error shape: the status line
    has been sent by then.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]  # not known
        self._events = events

    @classmethod
    async def start(cls, events: AsyncGenerator[bytes, None]) -> EventStream:
        """Wait for the first piece: until then an exception can still become a status line."""
        await anext(events)
        return cls(events)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self._events):
            with contextlib.suppress(ClientDisconnected):
                await unless_disconnected(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": 200, "headers": list(self.raw_headers)}
        )
        try:
            async for data in self._events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except Exception as error:
            body = event(to_api_error(error).body)
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class ClientDisconnected(Exception):
    """The client hung up before its answer was there; the work for it was cancelled."""


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns, but cancel it when the client hangs up.

    The request's body must have been read.

    Raises:
        ClientDisconnected: after the cancelled work has cleaned up.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_wait_for_disconnect(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnected
        return task.result()
    finally:
        for job in (task, watcher):
            job.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def answer(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """Return the response that `work` makes, unless the client has hung up."""
    try:
        return await unless_disconnected(request.receive, work)
    except ClientDisconnected:
        return Response(status_code=CLIENT_CLOSED_REQUEST)


async def merge(
    streams: Sequence[RequestStream],
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """Yield (index of the stream, output) of several streams in the order they come."""
    if len(streams) == 1:
        async for output in streams[0]:
            yield 0, output
        return
    # Bounded, so that a slow client slows the readers; a stream keeps what it is not asked for.
    queue: asyncio.Queue[tuple[int, RequestOutput] | Exception | None] = asyncio.Queue(len(streams))

    async def read(index: int, stream: RequestStream) -> None:
        try:
            async for output in stream:
                await queue.put((index, output))
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    readers = [asyncio.create_task(read(i, stream)) for i, stream in enumerate(streams)]
    num_open = len(readers)
    try:
        while num_open:
            item = await queue.get()
            if item is None:
                num_open -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
