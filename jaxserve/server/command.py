"""`jaxserve serve`: flags to configs, the port, then the server."""

from __future__ import annotations

import argparse
import errno
import gc
import importlib
import logging
import socket

from jaxserve.config import (
    ConfigError,
    EngineConfig,
    ServerConfig,
    add_flags,
    add_model,
    from_args,
    take_model,
)

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model as a positional, and every flag of the engine and the server."""
    add_model(parser)
    add_flags(parser, EngineConfig)
    add_flags(parser, ServerConfig)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT and return the exit code.

    Raises ConfigError for settings that cannot work and for a port that cannot be had, before
    anything heavy is imported or loaded.
    """
    take_model(args, "serve")
    engine_config = from_args(EngineConfig, args)
    server_config = from_args(ServerConfig, args)
    if server_config.trust_remote_code:
        logger.info("--trust-remote-code is not needed: code in a checkpoint is never executed")
    check_port(server_config.host, server_config.port)
    # Hundreds of modules make many objects and no garbage: looking for it takes a tenth of a start.
    # jaxserve.server.loop turns it on again.
    gc.disable()
    # Deferred: JAX should not delay `--help` and the checks above.
    server = importlib.import_module("jaxserve.server.run")
    return server.run_server(engine_config, server_config)


def check_port(host: str, port: int) -> None:
    """Raise ConfigError unless a server could listen on `host` and `port` now."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ConfigError(f"--host {host} is no address of this machine: {error}") from error
    for family, kind, protocol, _, address in addresses:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError as error:
                raise _port_error(host, port, error) from error


def _port_error(host: str, port: int, error: OSError) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(
            f"--port {port} on {host} is in use by another program; stop it or give another --port"
        )
    if error.errno == errno.EACCES:
        return ConfigError(f"--port {port} needs more rights than this user has; use one over 1023")
    return ConfigError(f"--host {host} --port {port}: cannot listen there: {error.strerror}")
