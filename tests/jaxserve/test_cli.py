"""The command line: finding commands, refusing flags, errors in one line, exit codes."""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest

from jaxserve import cli, demo, log
from jaxserve.config import ConfigError
from jaxserve.server import command
from jaxserve.version import __version__

ROOT = Path(cli.__file__).parents[1]


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Replace the server by one that only records its configs; the port check stays real."""
    calls: list[tuple] = []

    def run_server(engine_config, server_config) -> int:
        calls.append((engine_config, server_config))
        return 0

    server = types.ModuleType("jaxserve.server.run")
    server.run_server = run_server
    monkeypatch.setitem(sys.modules, "jaxserve.server.run", server)
    return calls


@pytest.fixture
def port() -> int:
    return demo.free_port()


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make a command `fail` that raises `error`."""

    def run(args: argparse.Namespace) -> int:
        raise error

    module = types.ModuleType("failing")
    module.add_arguments = lambda parser: None
    module.run = run
    monkeypatch.setitem(sys.modules, "failing", module)
    monkeypatch.setattr(cli, "COMMANDS", {"fail": cli.Command("failing", "fails")})


def test_no_command_prints_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    listing = capsys.readouterr().out
    assert all(name in listing for name in cli.COMMANDS)


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"jaxserve {__version__}\n"


def test_help_does_not_wait_for_jax() -> None:
    code = (
        "import sys, jaxserve.cli as cli\n"
        "try: cli.main(['serve', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('jax' in sys.modules and 'jax was imported')"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "--tp-size" in done.stdout


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    assert f"usage: jaxserve {name}" in capsys.readouterr().out


def test_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["serv", "demo"])
    assert ended.value.code == 2
    assert "there is no command 'serv'; did you mean serve?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mem-fraction-statik", "0.5"], "no flag --mem-fraction-statik (did you mean --mem-fr"),
        (["--enable-torch-compile"], "no flag --enable-torch-compile"),
        (["--attention-backend=fa3"], "no flag --attention-backend"),
        (["--tp-size", "two"], "--tp-size"),
        (["second-model"], "unexpected argument: second-model"),
        (["--context", "10"], "no flag --context"),
    ],
)
def test_flag_that_does_not_exist_is_refused(
    arguments: list[str], message: str, served: list, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve", "demo", *arguments])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in error
    assert error.count("\n") == 1
    assert not served


@pytest.mark.parametrize("model_first", [True, False])
def test_model_may_stand_before_or_after_the_flags(
    model_first: bool, served: list, port: int
) -> None:
    flags = ["--port", str(port), "--disable-overlap-schedule", "--tp", "2"]
    assert cli.main(["serve", *(["demo", *flags] if model_first else [*flags, "demo"])]) == 0
    ((engine_config, server_config),) = served
    assert (engine_config.model_path, engine_config.tp_size) == ("demo", 2)
    assert server_config.port == port


def test_launch_server_takes_an_sglang_command_line(served: list, port: int) -> None:
    arguments = ["--model-path", "demo", "--port", str(port), "--trust-remote-code"]
    arguments += ["--tensor-parallel-size", "2", "--mem-fraction-static", "0.8"]
    assert cli.run_command("serve", arguments, prog="launch_server") == 0
    ((engine_config, server_config),) = served
    assert (engine_config.tp_size, engine_config.mem_fraction_static) == (2, 0.8)
    assert server_config.trust_remote_code


def test_launch_server_is_the_serve_command() -> None:
    done = run_python("-m", "jaxserve.launch_server", "--enable-lora")
    assert done.returncode == 2
    assert "no flag --enable-lora" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: no model was given"),
        (
            ["demo", "--model-path", "other"],
            "error: two models were given: 'demo' and --model-path",
        ),
        (["demo", "--tp-size", "0"], "error: --tp-size is 0; allowed: 1 or more"),
        (["demo", "--dtype", "int3"], "error: --dtype is 'int3'"),
        (["demo", "--port", "0"], "error: --port is 0"),
        (["demo", "--mem-fraction-static", "1.5"], "error: --mem-fraction-static is 1.5"),
        (["demo", "--host", "no.such.host.invalid"], "error: --host no.such.host.invalid"),
    ],
)
def test_setting_that_cannot_work_is_one_line_and_exit_code_1(
    arguments: list[str], message: str, served: list, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1
    assert not served


def test_port_in_use_is_told_before_the_model_is_loaded(
    served: list, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", "demo", "--port", str(port)]) == 1
    assert f"error: --port {port} on 127.0.0.1 is in use" in capsys.readouterr().err
    assert not served


def test_free_port_passes_the_check(port: int) -> None:
    command.check_port("127.0.0.1", port)


def test_our_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, ConfigError("--this is wrong"))
    assert cli.main(["fail"]) == 1
    assert capsys.readouterr().err == "error: --this is wrong\n"


def test_debug_level_shows_the_traceback_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, ConfigError("--this is wrong"))
    assert cli.main(["fail", "--log-level", "debug"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.endswith("error: --this is wrong\n")


@pytest.mark.parametrize("place", [0, 1])
def test_log_level_may_stand_before_or_after_a_command_of_a_command(
    place: int, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["latency", "--cases", "nonsense"]
    arguments[place:place] = ["--log-level", "debug"]
    assert cli.main(["bench", *arguments]) == 1
    assert capsys.readouterr().err.startswith("Traceback")


def test_a_mistyped_flag_of_a_command_of_a_command_gets_a_guess(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "latency", "--casez", "1x1/1"])
    assert "did you mean --cases?" in capsys.readouterr().err


def test_errors_of_others_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, ValueError("a bug"))
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["fail"])


def test_interrupt_is_not_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, KeyboardInterrupt())
    assert cli.main(["fail"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_progress_without_a_terminal_is_a_line_per_stage(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with log.ProgressDisplay() as progress:
        for done in range(101):
            progress("loading", done, 100)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" (")[0] for line in lines] == ["loading: 0 %", "loading: 100 %"]


def test_progress_of_unknown_length_counts(capsys: pytest.CaptureFixture[str]) -> None:
    with log.ProgressDisplay() as progress:
        progress("compiling", 3, 0)
    assert capsys.readouterr().err.startswith("compiling: 3 (")
