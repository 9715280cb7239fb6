"""From the port to the exit code: listen, load, serve (`jaxserve.server.loop`), stop."""

from __future__ import annotations

import asyncio
import errno
import importlib
import logging
import os
import socket
import sys
from collections.abc import Callable

from jaxserve.config import ConfigError, ServerConfig
from jaxserve.engine.async_engine import AsyncEngine, StartupProgress, StepEngine
from jaxserve.tokenizer import load_chat_template

logger = logging.getLogger(__name__)

BACKLOG = 2048
CLOSE_TIMEOUT_S = 3


def serve(
    build: Callable[[StartupProgress], StepEngine],
    config: ServerConfig,
    *,
    progress: StartupProgress | None = None,
) -> int:
    """Serve until SIGTERM or SIGINT and return the exit code.

    The port is taken first, so that a port in use costs no loading time and /health answers (503)
    while the model loads. A first signal lets running requests finish for at most
    `config.drain_timeout_s`, a second one does not.

    Raises:
        ConfigError: the port cannot be had.
        TokenizerError: the chat template cannot be used.
        Exception: whatever `build` raised.
    """
    if config.chat_template is not None:
        load_chat_template(config.chat_template)  # a mistake is told before the model is loaded
    sockets = listen(config.host, config.port)
    try:
        engine = AsyncEngine(build, progress=progress)
        try:
            # Deferred: the web framework is imported while the model loads.
            loop = importlib.import_module("jaxserve.server.loop")
            asyncio.run(loop.serve_until_signal(engine, config, sockets))
        finally:
            has_ended = engine.close(CLOSE_TIMEOUT_S)
    finally:
        for sock in sockets:
            sock.close()
    code = 0 if engine.error is None else 1
    if not has_ended:
        # A model is being loaded or compiled. Python cannot end such a thread, and ending the
        # interpreter around it can crash, which would hide the exit code.
        logger.info("stopped without waiting for a compilation or for the model to load")
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if engine.error is not None and not engine.was_started:
        raise engine.error
    return code


def listen(host: str, port: int) -> list[socket.socket]:
    """Return listening sockets on all addresses of `host`; raises ConfigError if that fails."""
    sockets: list[socket.socket] = []
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in addresses:
            sock = socket.socket(family, kind, protocol)
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(address)
            sock.listen(BACKLOG)
    except OSError as error:
        for sock in sockets:
            sock.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"--port {port} on {host} is in use; stop the other program or give another --port."
            ) from error
        raise ConfigError(f"cannot listen on --host {host} --port {port}: {error}.") from error
    return sockets
