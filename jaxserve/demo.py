"""`make demo`: serve a small real model, ask it one question through the official OpenAI client.

The server is its own process, started as a user would start it, and must end cleanly on SIGTERM.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable

from converters.demo import demo_model_path
from jaxserve.cli import is_user_error
from jaxserve.config import user_cache_dir
from jaxserve.log import ProgressDisplay

try:
    import openai
except ImportError:  # optional: the `demo` extra
    openai = None

QUESTION = "What is the capital of France? Answer in one sentence."
HOST = "127.0.0.1"
MAX_TOKENS = 64
START_TIMEOUT_S = 1800.0  # loading and compiling on a slow machine
STOP_TIMEOUT_S = 60.0
POLL_INTERVAL_S = 0.25


class DemoError(RuntimeError):
    """The demo did not work; the message says which step failed and how."""


def main() -> int:
    """Run the demo and return its exit code."""
    try:
        if openai is None:
            raise DemoError("the openai package is missing: pip install 'jaxserve[demo]'")
        with ProgressDisplay() as progress:
            path = demo_model_path(cache_dir=user_cache_dir(), progress=progress)
        print(f"Model: {path}", flush=True)
        run_demo(str(path))
    except (DemoError, ValueError) as error:
        if isinstance(error, ValueError) and not is_user_error(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run_demo(model_path: str) -> str:
    """Start a server, ask it the question, stop it, and return the answer.

    Raises DemoError when the server does not start, does not answer or does not stop cleanly.
    """
    port = free_port()
    command = [sys.executable, "-m", "jaxserve.launch_server", "--model-path", model_path]
    command += ["--served-model-name", "demo", "--host", HOST, "--port", str(port)]
    print(f"Starting: {' '.join(command)}", flush=True)
    started_s = time.perf_counter()
    server = subprocess.Popen(command)
    try:
        wait_until_healthy(server, f"http://{HOST}:{port}/health")
        print(f"Ready after {time.perf_counter() - started_s:.1f} s", flush=True)
        wait_until_warm(server, f"http://{HOST}:{port}/get_server_info")
        print(f"At full speed after {time.perf_counter() - started_s:.1f} s", flush=True)
        answer = ask(f"http://{HOST}:{port}/v1")
        stop(server)
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()
    return answer


def free_port() -> int:
    """Return a loopback port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def wait_until_healthy(server: subprocess.Popen[bytes], url: str) -> None:
    """Return once `url` answers 200; raises DemoError if the server ends or takes too long."""
    _poll(server, url, lambda body: True, "ready")


def wait_until_warm(server: subprocess.Popen[bytes], url: str) -> None:
    """Return once every batch shape is compiled, as `/get_server_info` at `url` tells.

    The server answers before that, in a larger shape than needed, but not at its full speed.
    """

    def is_warm(body: bytes) -> bool:
        return json.loads(body)["stats"]["is_warm"]

    _poll(server, url, is_warm, "at full speed")


def _poll(
    server: subprocess.Popen[bytes], url: str, is_there: Callable[[bytes], bool], what: str
) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline_s = time.perf_counter() + START_TIMEOUT_S
    while time.perf_counter() < deadline_s:
        if server.poll() is not None:
            raise DemoError(f"the server ended while starting, with exit code {server.returncode}")
        try:
            with direct.open(url, timeout=5) as response:
                if response.status == 200 and is_there(response.read()):
                    return
        except (urllib.error.URLError, OSError):
            pass  # not listening yet, or 503 because it is still loading
        time.sleep(POLL_INTERVAL_S)
    raise DemoError(f"the server was not {what} within {START_TIMEOUT_S:.0f} s")


def ask(base_url: str) -> str:
    """Stream the answer to standard output, print its timing, and return its text."""
    print(f"\nQ: {QUESTION}\nA: ", end="", flush=True)
    pieces: list[str] = []
    first_s = last_s = 0.0
    num_tokens = 0
    with openai.OpenAI(
        base_url=base_url,
        api_key="none",
        http_client=openai.DefaultHttpxClient(trust_env=False),  # no proxy to loopback
    ) as client:
        model = client.models.list().data[0].id
        asked_s = time.perf_counter()
        stream = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            max_tokens=MAX_TOKENS,
            stream=True,
            stream_options={"include_usage": True},
        )
        for chunk in stream:
            if chunk.usage is not None:
                num_tokens = chunk.usage.completion_tokens
            for choice in chunk.choices:
                if choice.delta.content:
                    last_s = time.perf_counter()
                    first_s = first_s or last_s
                    pieces.append(choice.delta.content)
                    print(choice.delta.content, end="", flush=True)
    answer = "".join(pieces)
    if not answer.strip():
        raise DemoError("the server answered with no text")
    print(f"\n\nTime to first token: {(first_s - asked_s) * 1000:.0f} ms")
    if num_tokens > 1 and last_s > first_s:
        rate = (num_tokens - 1) / (last_s - first_s)
        print(f"Tokens: {num_tokens}, {rate:.1f} tokens/s after the first", flush=True)
    return answer


def stop(server: subprocess.Popen[bytes]) -> None:
    """Send SIGTERM and wait; raises DemoError unless the server ends in time with exit code 0."""
    server.send_signal(signal.SIGTERM)
    try:
        code = server.wait(timeout=STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise DemoError(f"the server did not stop within {STOP_TIMEOUT_S:.0f} s") from error
    if code != 0:
        raise DemoError(f"the server stopped with exit code {code} instead of 0")
    print("Server stopped cleanly.", flush=True)


if __name__ == "__main__":
    sys.exit(main())
