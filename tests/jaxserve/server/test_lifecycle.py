"""Start-up, draining and exit codes of the server process, in this process."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from jaxserve.config import ConfigError, ServerConfig
from jaxserve.engine.async_engine import StartupProgress
from jaxserve.server.lifecycle import listen, serve
from jaxserve.tokenizer import TokenizerError

pytestmark = pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="signals need the main thread"
)

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
TIMEOUT_S = 20.0


def ask(port: int, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
    """Return status and body of one request."""
    data = None if body is None else json.dumps(body).encode()
    try:
        with DIRECT.open(f"http://127.0.0.1:{port}{path}", data, timeout=TIMEOUT_S) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def until(holds: Callable[[], bool]) -> None:
    deadline_s = time.perf_counter() + TIMEOUT_S
    while not holds():
        assert time.perf_counter() < deadline_s
        time.sleep(0.01)


def state(port: int) -> str:
    try:
        return ask(port, "/health")[1]["state"]
    except (urllib.error.URLError, OSError):
        return "down"


def interrupt(sig: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), sig)


@pytest.fixture(autouse=True)
def no_signal_ends_the_tests() -> Iterator[None]:
    """Ignore SIGTERM where the server does not handle it: one may come after it has stopped."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def config() -> ServerConfig:
    (sock,) = listen("127.0.0.1", 0)
    with sock:
        port = sock.getsockname()[1]
    return ServerConfig(port=port, served_model_name="tiny", drain_timeout_s=TIMEOUT_S)


@pytest.fixture
def user() -> Iterator[ThreadPoolExecutor]:
    """The other side: `serve` needs the main thread, for its signals."""
    with ThreadPoolExecutor() as pool:
        yield pool


def serve_while(
    user: ThreadPoolExecutor,
    config: ServerConfig,
    build: Callable[[StartupProgress], Any],
    script: Callable[[int], Any],
) -> Any:
    """Serve while `script(port)` runs in another thread; return (exit code, script's result)."""

    def run() -> Any:
        until(lambda: state(config.port) != "down")
        try:
            return script(config.port)
        finally:
            interrupt()

    result: Future[Any] = user.submit(run)
    code = serve(build, config)
    return code, result.result(TIMEOUT_S)


def test_a_signal_lets_requests_finish_and_exits_zero(
    user: ThreadPoolExecutor, config: ServerConfig, fake: Any
) -> None:
    def script(port: int) -> tuple[int, str, int]:
        until(lambda: state(port) == "ready")
        fake.gate.clear()
        running = user.submit(ask, port, "/generate", {"text": "say:last words"})
        until(lambda: len(fake.added) == 1)
        interrupt()
        until(lambda: state(port) == "draining")
        refused, _ = ask(port, "/generate", {"text": "too late"})
        fake.gate.set()
        status, answer = running.result(TIMEOUT_S)
        return status, answer["text"], refused

    code, result = serve_while(user, config, lambda progress: fake, script)
    assert (code, result) == (0, (200, "last words", 503))
    assert fake.is_closed


def test_requests_that_take_too_long_are_aborted(
    user: ThreadPoolExecutor, config: ServerConfig, fake: Any
) -> None:
    fake.step_s = 0.05
    config = dataclasses.replace(config, drain_timeout_s=0.2)

    def script(port: int) -> Any:
        until(lambda: state(port) == "ready")
        body = {"text": "x", "sampling_params": {"ignore_eos": True, "max_new_tokens": 150}}
        running = user.submit(ask, port, "/generate", body)
        until(lambda: len(fake.added) == 1)
        interrupt(signal.SIGINT)
        return running.result(TIMEOUT_S)

    code, (status, answer) = serve_while(user, config, lambda progress: fake, script)
    assert (code, status) == (0, 200)
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"


def test_health_answers_while_the_model_loads(
    user: ThreadPoolExecutor, config: ServerConfig, fake: Any
) -> None:
    loaded = threading.Event()

    def build(progress: StartupProgress) -> Any:
        progress("compiling", 2, 5)
        loaded.wait(TIMEOUT_S)
        return fake

    def script(port: int) -> tuple[int, dict[str, Any]]:
        try:
            return ask(port, "/health")
        finally:
            loaded.set()
            until(lambda: state(port) == "ready")

    code, told = serve_while(user, config, build, script)
    assert code == 0
    assert told == (
        503,
        {"state": "compiling", "progress": [{"stage": "compiling", "done": 2, "total": 5}]},
    )


def test_a_model_that_cannot_be_loaded_ends_the_server(config: ServerConfig) -> None:
    def build(progress: StartupProgress) -> Any:
        raise ConfigError("--model-path names nothing")

    with pytest.raises(ConfigError, match="--model-path names nothing"):
        serve(build, config)


def test_a_port_in_use_is_told_before_anything_is_loaded(config: ServerConfig) -> None:
    def build(progress: StartupProgress) -> Any:
        raise AssertionError("must not be called")

    (sock,) = listen("127.0.0.1", config.port)
    with sock, pytest.raises(ConfigError, match=f"--port {config.port}"):
        serve(build, config)


def test_a_wrong_chat_template_is_told_before_anything_is_loaded(
    config: ServerConfig, tmp_path: Path
) -> None:
    def build(progress: StartupProgress) -> Any:
        raise AssertionError("must not be called")

    file = tmp_path / "template.jinja"
    file.write_text("{% for", "utf-8")
    with pytest.raises(TokenizerError, match="--chat-template"):
        serve(build, dataclasses.replace(config, chat_template=str(file)))


def test_listening_twice_is_refused_at_once() -> None:
    (sock,) = listen("127.0.0.1", 0)
    with sock:
        with pytest.raises(ConfigError) as error:
            listen("127.0.0.1", sock.getsockname()[1])
        assert isinstance(error.value.__cause__, OSError)
        assert error.value.__cause__.errno == errno.EADDRINUSE


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match="--host"):
        listen("192.0.2.1", 0)
