"""`run_server`: the server of `jaxserve.server.lifecycle` around the real engine."""

from __future__ import annotations

from jaxserve.config import EngineConfig, ServerConfig
from jaxserve.engine.async_engine import StartupProgress
from jaxserve.engine.engine import Engine
from jaxserve.log import ProgressDisplay
from jaxserve.server.lifecycle import serve


def run_server(engine_config: EngineConfig, server_config: ServerConfig) -> int:
    """Load a model, serve it until SIGTERM or SIGINT, and return the exit code.

    Raises ConfigError when the port cannot be had, and whatever loading the model raises.
    """
    with ProgressDisplay() as display:
        return serve(
            lambda progress: Engine(engine_config, progress=progress),
            server_config,
            progress=StartupProgress(display),
        )
