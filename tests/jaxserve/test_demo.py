"""`make demo`: the answer of the real model, and every way in which the demo fails loudly."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from converters.errors import CheckpointError
from jaxserve import demo


def python(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)


def sleeper(on_sigterm: str) -> subprocess.Popen[bytes]:
    """Start a process that runs `on_sigterm` on SIGTERM; returns once it is ready for it."""
    process = python(
        "import signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: {on_sigterm})\n"
        "print('ready', flush=True)\n"
        "while True: time.sleep(0.05)"
    )
    process.stdout.readline()
    return process


@pytest.mark.real
def test_real_model_knows_the_capital_of_france(
    demo_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    answer = demo.run_demo(str(demo_model))
    printed = capfd.readouterr().out
    assert "Paris" in answer
    assert answer in printed
    assert "Time to first token:" in printed
    assert "tokens/s" in printed
    assert "Server stopped cleanly." in printed


def test_server_that_ends_while_starting_is_told() -> None:
    with python("import sys; sys.exit(3)") as server:
        server.wait()
        with pytest.raises(demo.DemoError, match="ended while starting, with exit code 3"):
            demo.wait_until_healthy(server, f"http://{demo.HOST}:{demo.free_port()}/health")


def test_server_that_never_gets_ready_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "START_TIMEOUT_S", 0.5)
    with sleeper("sys.exit(0)") as server:
        with pytest.raises(demo.DemoError, match="not ready within"):
            demo.wait_until_healthy(server, f"http://{demo.HOST}:{demo.free_port()}/health")
        server.kill()


def test_clean_stop_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with sleeper("sys.exit(0)") as server:
        demo.stop(server)
    assert capsys.readouterr().out == "Server stopped cleanly.\n"


def test_stop_with_an_error_is_told() -> None:
    with (
        sleeper("sys.exit(7)") as server,
        pytest.raises(demo.DemoError, match="stopped with exit code 7 instead of 0"),
    ):
        demo.stop(server)


def test_server_that_ignores_sigterm_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "STOP_TIMEOUT_S", 0.5)
    with sleeper("None") as server:
        with pytest.raises(demo.DemoError, match="did not stop within"):
            demo.stop(server)
        server.kill()


@pytest.mark.parametrize("error", [demo.DemoError("it broke"), CheckpointError("no index")])
def test_failure_is_one_line_and_exit_code_1(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**arguments: object) -> Path:
        raise error

    monkeypatch.setattr(demo, "demo_model_path", fail)
    assert demo.main() == 1
    assert capsys.readouterr().err == f"error: {error}\n"
