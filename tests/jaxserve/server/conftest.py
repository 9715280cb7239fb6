"""An engine without a model, and the web application around it.

The fake engine answers each prompt with a fixed text, one byte per step, through the same interface
and the same threads as the real one.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from jaxserve.config import ServerConfig
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.request import FinishReason, Request, SamplingParams, Status
from jaxserve.server.app import create_app
from jaxserve.server.lifecycle import listen
from jaxserve.tokenizer import Tokenizer

EOS = 258
REPLY = "Paris is the capital."
TIMEOUT_S = 30.0


@dataclasses.dataclass(frozen=True)
class FakeModelInfo:
    name: str = "fake"
    architecture: str = "FakeForCausalLM"
    max_model_len: int = 200
    vocab_size: int = 262
    dtype: str = "float32"
    task: str = "generate"
    end_token: int | None = None


class FakeEngine:
    """Answers REPLY and an end token; a prompt with "say:" gets back what follows it.

    While `gate` is cleared, steps give no tokens; `step_s` is how long one takes; `crash` makes the
    next one fail; `refusal` makes the next `add` fail.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.model_info = FakeModelInfo()
        self.gate = threading.Event()
        self.gate.set()
        self.step_s = 0.0
        self.crash = False
        self.refusal: ValueError | None = None
        self.added: list[tuple[list[int], SamplingParams, str]] = []
        self.aborted: list[str] = []
        self.num_steps = 0
        self.num_asked = 0  # how often the step thread looked for work
        self.is_closed = False
        self._running: dict[str, tuple[Request, list[int]]] = {}

    @property
    def has_work(self) -> bool:
        self.num_asked += 1
        return bool(self._running)

    def add(
        self, prompt_token_ids: list[int], sampling: SamplingParams, request_id: str
    ) -> Request:
        if self.refusal is not None:
            raise self.refusal
        self.added.append((list(prompt_token_ids), sampling, request_id))
        request = Request(
            id=request_id,
            tokens=list(prompt_token_ids),
            num_prompt=len(prompt_token_ids),
            sampling=sampling,
            eos_ids=frozenset({EOS}),
        )
        _, said, rest = self.tokenizer.decode(prompt_token_ids).partition("say:")
        reply = [*(rest if said else REPLY).encode(), EOS]
        self._running[request_id] = (request, reply)
        return request

    def abort(self, request_id: str) -> bool:
        self.aborted.append(request_id)
        return self._running.pop(request_id, None) is not None

    def step(self) -> list[Request]:
        if not self.gate.wait(0.002):
            return []
        time.sleep(self.step_s)
        if self.crash:
            raise RuntimeError("the device caught fire")
        self.num_steps += 1
        touched = []
        for request, reply in list(self._running.values()):
            sampling = request.sampling
            num_output = len(request.tokens) - request.num_prompt
            token = reply[num_output % len(reply)]
            request.tokens.append(token)
            num_output += 1
            if (token == EOS and not sampling.ignore_eos) or token in sampling.stop_token_ids:
                request.finish_reason = FinishReason.STOP
            elif num_output == sampling.max_tokens or (
                len(request.tokens) == self.model_info.max_model_len
            ):
                request.finish_reason = FinishReason.LENGTH
            if request.finish_reason is not None:
                request.status = Status.FINISHED
                del self._running[request.id]
            touched.append(request)
        return touched

    def stats(self) -> dict[str, int]:
        return {"num_steps": self.num_steps}

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def fake(byte_tokenizer_dir: Path) -> FakeEngine:
    return FakeEngine(Tokenizer.load(byte_tokenizer_dir))


@pytest.fixture
def make_fake(byte_tokenizer_dir: Path) -> Callable[..., FakeEngine]:
    """Return a function that makes a fake engine; its argument is the generation config."""

    def make(generation_config: dict[str, Any] | None = None) -> FakeEngine:
        return FakeEngine(Tokenizer.load(byte_tokenizer_dir, generation_config=generation_config))

    return make


@pytest.fixture
def engine(fake: FakeEngine) -> Iterator[AsyncEngine]:
    """The asyncio front around `fake`, ready."""
    engine = AsyncEngine(lambda progress: fake)
    engine.wait_until_ready()
    yield engine
    fake.gate.set()
    assert engine.close()


@pytest.fixture
def config() -> ServerConfig:
    return ServerConfig(served_model_name="tiny")


@pytest.fixture
async def client(engine: AsyncEngine, config: ServerConfig) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application, without a network."""
    async with client_of(engine, config) as client:
        yield client


@pytest.fixture
def make_client() -> Callable[..., httpx.AsyncClient]:
    return client_of


def client_of(engine: AsyncEngine, config: ServerConfig) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=create_app(engine, config), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test", timeout=TIMEOUT_S)


@pytest.fixture
def base_url(engine: AsyncEngine, config: ServerConfig) -> Iterator[str]:
    """The application on a real loopback port."""
    (sock,) = listen("127.0.0.1", 0)
    server = uvicorn.Server(
        uvicorn.Config(create_app(engine, config), log_config=None, lifespan="off")
    )
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])))
    thread.start()
    yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    server.should_exit = True
    thread.join(TIMEOUT_S)
    assert not thread.is_alive()
