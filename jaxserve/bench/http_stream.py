"""A small HTTP client: JSON in, JSON or server-sent events out; one connection a request.

Written out because a benchmark must not wait for a client library, nor need one installed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

MAX_LINE_BYTES = 2**26  # an event holds every token so far
SHOWN_ERROR_CHARS = 500


class BenchError(ValueError):
    """A server that cannot be measured; the message says what it answered."""


async def get_json(url: str) -> dict[str, Any]:
    """GET a JSON object; raises BenchError for anything else."""
    async with _exchange("GET", url, None) as body:
        data = b"".join([piece async for piece in body])
    try:
        return json.loads(data)
    except ValueError as error:
        raise BenchError(f"{url} did not answer with JSON: {data[:SHOWN_ERROR_CHARS]!r}") from error


async def stream_events(url: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """POST JSON and yield the JSON of each server-sent event up to `[DONE]`.

    Raises BenchError for an error of the server, as status or as event.
    """
    async with _exchange("POST", url, body) as pieces:
        rest = b""
        async for piece in pieces:
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                data = line.removeprefix(b"data:").strip()
                if data == line.strip() or data == b"[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise BenchError(f"{url} sent an error: {event['error']}")
                yield event


@contextlib.asynccontextmanager
async def _exchange(
    method: str, url: str, body: dict[str, Any] | None
) -> AsyncIterator[AsyncIterator[bytes]]:
    """Send a request; gives the pieces of a body whose status was 200."""
    parts = urlsplit(url)
    is_https = parts.scheme == "https"
    port = parts.port or (443 if is_https else 80)
    try:
        reader, writer = await asyncio.open_connection(
            parts.hostname, port, ssl=is_https or None, limit=MAX_LINE_BYTES
        )
    except OSError as error:
        raise BenchError(f"no server answers at {url}: {error}") from error
    data = b"" if body is None else json.dumps(body).encode()
    head = (
        f"{method} {parts.path or '/'} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
        "Connection: close\r\n\r\n"
    )
    try:
        writer.write(head.encode() + data)
        await writer.drain()
        status = (await reader.readline()).split()
        headers = {}
        while line := (await reader.readline()).strip():
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        is_chunked = headers.get("transfer-encoding", "").lower() == "chunked"
        pieces = _chunks(reader) if is_chunked else _until_closed(reader)
        if len(status) < 2 or status[1] != b"200":
            text = b"".join([piece async for piece in pieces]).decode(errors="replace")
            code = b" ".join(status[1:]).decode() or "nothing"
            raise BenchError(f"{url} answered {code}: {text[:SHOWN_ERROR_CHARS]}")
        yield pieces
    except (OSError, asyncio.IncompleteReadError) as error:
        raise BenchError(f"{url} hung up in the middle of an answer: {error}") from error
    finally:
        writer.close()


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The pieces of a chunked body (RFC 9112, section 7.1)."""
    while size := int((await reader.readline()).split(b";")[0] or b"0", 16):
        piece = await reader.readexactly(size + 2)
        yield piece[:-2]


async def _until_closed(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while piece := await reader.read(2**16):
        yield piece
