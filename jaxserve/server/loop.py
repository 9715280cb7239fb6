"""The event loop of the server: uvicorn, signals, draining."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
from collections.abc import Callable, Sequence
from types import FrameType

import uvicorn

from jaxserve.config import ServerConfig
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.server.app import create_app

logger = logging.getLogger(__name__)

# After draining, only the last bytes of finished answers are left to send.
FLUSH_TIMEOUT_S = 5
POLL_INTERVAL_S = 0.05


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


async def serve_until_signal(
    engine: AsyncEngine, config: ServerConfig, sockets: Sequence[socket.socket]
) -> None:
    """Answer on `sockets` until SIGTERM, SIGINT or the failure of start-up, then drain."""
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
    if not gc.isenabled():  # as jaxserve.server.command left it for the start
        gc.freeze()  # what was imported and built stays: it need not be looked at again
        gc.enable()
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
