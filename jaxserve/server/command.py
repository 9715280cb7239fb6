"""`jaxserve serve`: flags to configs, the port, then the server."""

from __future__ import annotations

import argparse
import errno
import importlib
import logging
import socket

from jaxserve.config import ConfigError, EngineConfig, ServerConfig, add_flags, from_args

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model as a positional, and every flag of the engine and the server."""
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="the model; the same as --model-path MODEL"
    )
    add_flags(parser, EngineConfig)
    add_flags(parser, ServerConfig)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT and return the exit code.

    Raises ConfigError for settings that cannot work and for a port that cannot be had, before
    anything heavy is imported or loaded.
    """
    if args.model is not None:
        if args.model_path not in (None, args.model):
            raise ConfigError(
                f"two models were given: {args.model!r} and --model-path {args.model_path!r}; "
                "give one"
            )
        args.model_path = args.model
    if args.model_path is None:
        raise ConfigError("no model was given; name one: jaxserve serve MODEL, or --model-path")
    engine_config = from_args(EngineConfig, args)
    server_config = from_args(ServerConfig, args)
    if server_config.trust_remote_code:
        logger.info("--trust-remote-code is not needed: code in a checkpoint is never executed")
    check_port(server_config.host, server_config.port)
    # Deferred: JAX and the web framework should not delay `--help` and the checks above.
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
