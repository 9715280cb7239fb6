"""From the port to the last answer: listen, load, serve, drain, stop."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from types import FrameType

import uvicorn

from jaxserve.config import ConfigError, ServerConfig
from jaxserve.engine.async_engine import AsyncEngine, StartupProgress, StepEngine
from jaxserve.server.app import create_app
from jaxserve.tokenizer import load_chat_template

logger = logging.getLogger(__name__)

BACKLOG = 2048
# After draining, only the last bytes of finished answers are left to send.
FLUSH_TIMEOUT_S = 5
CLOSE_TIMEOUT_S = 3
POLL_INTERVAL_S = 0.05


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
            asyncio.run(_serve(engine, config, sockets))
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


class _Server(uvicorn.Server):
    """uvicorn, except that a signal starts our drain instead of its own shutdown.

    uvicorn would close the port at once, and raise the signal again after it has stopped.
    """

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_signal = on_signal

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called in the main thread, between two of its bytecodes."""
        logger.info("received %s", signal.Signals(sig).name)
        self._on_signal()


async def _serve(
    engine: AsyncEngine, config: ServerConfig, sockets: Sequence[socket.socket]
) -> None:
    loop = asyncio.get_running_loop()
    stop, stop_now = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (stop_now if stop.is_set() else stop).set()

    server = _Server(
        uvicorn.Config(
            create_app(engine, config),
            log_config=None,  # jaxserve.log has configured logging
            log_level=config.log_level,
            access_log=config.log_level == "debug",
            lifespan="off",
            timeout_graceful_shutdown=FLUSH_TIMEOUT_S,
        ),
        on_signal=lambda: loop.call_soon_threadsafe(on_signal),
    )
    watchers = [
        asyncio.create_task(_announce(engine, config, server)),
        asyncio.create_task(_drain(engine, config, server, stop, stop_now)),
    ]
    try:
        await server.serve(sockets=list(sockets))
    finally:
        for watcher in watchers:
            watcher.cancel()
        await asyncio.gather(*watchers, return_exceptions=True)


async def _announce(engine: AsyncEngine, config: ServerConfig, server: uvicorn.Server) -> None:
    """Log when the engine is ready; stop the server if it will never be."""
    while engine.state in ("starting", "compiling"):
        await asyncio.sleep(POLL_INTERVAL_S)
    if engine.state == "ready":
        logger.info("ready: http://%s:%d/v1", config.host, config.port)
    elif engine.error is not None:
        server.should_exit = True


async def _drain(
    engine: AsyncEngine,
    config: ServerConfig,
    server: uvicorn.Server,
    stop: asyncio.Event,
    stop_now: asyncio.Event,
) -> None:
    """After a first signal let requests finish, after a second one abort them; then stop."""
    await stop.wait()
    logger.info("draining %d requests; a second signal aborts them", engine.num_active)
    drain = asyncio.create_task(engine.drain(config.drain_timeout_s))
    hurry = asyncio.create_task(stop_now.wait())
    await asyncio.wait({drain, hurry}, return_when=asyncio.FIRST_COMPLETED)
    if not drain.done():
        drain.cancel()
        await engine.drain(0)
    hurry.cancel()
    server.should_exit = True
