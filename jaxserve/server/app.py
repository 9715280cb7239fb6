"""The web application: routes, errors, the API key. It knows nothing of loading or signals."""

from __future__ import annotations

import secrets

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxserve.config import ServerConfig
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.server.errors import APIError, install_error_handlers
from jaxserve.server.native_api import native_router
from jaxserve.server.openai_api import openai_router
from jaxserve.server.reading_api import reading_router
from jaxserve.server.service import Service
from jaxserve.tokenizer import load_chat_template
from jaxserve.version import __version__

# Load balancers and orchestrators ask without a key; the answer tells nothing about the model.
OPEN_PATHS = frozenset({"/health"})


def create_app(engine: AsyncEngine, config: ServerConfig) -> FastAPI:
    """Return the application that serves `engine`; it answers 503 until the engine is ready.

    Raises TokenizerError when the chat template of `config` cannot be used.
    """
    template = None if config.chat_template is None else load_chat_template(config.chat_template)
    service = Service(engine, config, template)
    # Bodies are validated by protocol.py, not by FastAPI, so its generated schema knows no bodies.
    app = FastAPI(
        title="jaxserve", version=__version__, openapi_url=None, docs_url=None, redoc_url=None
    )
    app.include_router(openai_router(service))
    app.include_router(native_router(service))
    app.include_router(reading_router(service))
    install_error_handlers(app)
    if config.api_key is not None:
        app.add_middleware(RequireKey, api_key=config.api_key)
    return app


class RequireKey:
    """Answer 401 to requests without `Authorization: Bearer <api_key>`."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._wanted = f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            sent = dict(scope["headers"]).get(b"authorization", b"")
            if not secrets.compare_digest(sent, self._wanted):
                told = "no API key was sent" if not sent else "the API key is wrong"
                error = APIError(
                    401,
                    f"{told}; send the server's --api-key as 'Authorization: Bearer KEY'.",
                    code="invalid_api_key",
                )
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)
