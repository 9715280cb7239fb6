"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
from typing import Any

import pydantic
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from jaxserve.engine.async_engine import ContextLengthExceeded, EngineUnavailable
from jaxserve.request import InvalidRequest

logger = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499  # nginx's status, for the log: nobody reads this answer


class APIError(Exception):
    """An answer with an error status.

    Args:
        status: the HTTP status.
        message: what was asked, what was found, what to do.
        param: the body field it is about.
        code: OpenAI's short name for the error, for clients that branch on it.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    @property
    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": _error_type(self.status),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "5"}}
        return JSONResponse(self.body, self.status, headers=headers.get(self.status))


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> APIError:
    """Return the error for a request that must not be sent again unchanged."""
    return APIError(400, message, param=param, code=code)


def to_api_error(error: Exception) -> APIError:
    """Return what a client is told about an exception of the engine or of validation."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, ContextLengthExceeded):
        return bad_request(str(error), code="context_length_exceeded")
    if isinstance(error, ClientDisconnect):
        return APIError(CLIENT_CLOSED_REQUEST, "the client hung up while it sent its request.")
    if isinstance(error, InvalidRequest):
        return bad_request(str(error))
    if isinstance(error, EngineUnavailable):
        return APIError(503, str(error), code="engine_unavailable")
    if isinstance(error, pydantic.ValidationError):
        return _validation_error(error)
    if isinstance(error, ValueError) and type(error).__module__.startswith("jaxserve."):
        return bad_request(str(error))  # a limit of the scheduler, such as too few pages
    logger.error("a request failed", exc_info=error)
    return APIError(500, "the server failed at this request; its log has the details.")


def install_error_handlers(app: FastAPI) -> None:
    """Answer every error of every route in OpenAI's shape."""

    async def on_error(request: Request, error: Exception) -> JSONResponse:
        return to_api_error(error).response()

    async def on_http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        messages = {
            404: f"there is no route {request.url.path}. See /v1/models, /v1/chat/completions, "
            "/v1/completions, /generate, /v1/embeddings, /classify, /v1/score, /v1/rerank, "
            "/health.",
            405: f"{request.url.path} does not take {request.method}.",
        }
        message = messages.get(error.status_code, str(error.detail))
        response = APIError(error.status_code, message).response()
        response.headers.update(error.headers or {})
        return response

    app.add_exception_handler(HTTPException, on_http_error)
    for kind in (APIError, ClientDisconnect, EngineUnavailable, ValueError):
        app.add_exception_handler(kind, on_error)
    app.add_exception_handler(Exception, on_error)


def _error_type(status: int) -> str:
    if status == 401:
        return "authentication_error"
    if status == 404:
        return "not_found_error"
    return "invalid_request_error" if status < 500 else "server_error"


def _validation_error(error: pydantic.ValidationError) -> APIError:
    """Name every wrong field in one message; `param` is the first of them."""
    problems: dict[str, list[str]] = {}
    for detail in error.errors(include_url=False, include_context=False, include_input=False):
        if detail["type"] == "json_invalid":
            return bad_request(f"the body is not JSON: {detail['msg']}.", code="invalid_json")
        path = ".".join(str(part) for part in detail["loc"][:1]) or "body"
        where = ".".join(str(part) for part in detail["loc"]) or "body"
        message = detail["msg"]
        if detail["type"] == "extra_forbidden":
            message = "unknown parameter; it would have no effect here"
        problems.setdefault(path, []).append(f"{where}: {message}")
    lines = [line for found in problems.values() for line in found]
    shown = "; ".join(lines[:8]) + (f"; and {len(lines) - 8} more" if len(lines) > 8 else "")
    return bad_request(f"{shown}.", param=next(iter(problems)))
