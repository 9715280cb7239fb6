"""The asyncio front: many coroutines and several event loops over one step thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from jaxserve.engine.async_engine import (
    AsyncEngine,
    ContextLengthExceeded,
    EngineDead,
    EngineUnavailable,
)
from jaxserve.request import FinishReason, InvalidRequest, SamplingParams

pytestmark = pytest.mark.anyio

REPLY = "Paris is the capital."
PROMPT = list(b"Where?")
ENDLESS = SamplingParams(ignore_eos=True, max_tokens=None)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.005)


async def collect(engine: AsyncEngine, prompt: list[int], request_id: str) -> str:
    outputs = [output async for output in engine.generate(prompt, SamplingParams(), request_id)]
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert outputs[-1].num_output == sum(len(output.token_ids) for output in outputs)
    return "".join(output.text for output in outputs)


async def test_each_request_gets_its_own_answer(engine: AsyncEngine) -> None:
    prompts = {f"r{i}": list(f"say:answer number {i}".encode()) for i in range(50)}
    texts = await asyncio.gather(*(collect(engine, p, i) for i, p in prompts.items()))
    assert texts == [f"answer number {i}" for i in range(50)]
    assert engine.num_active == 0


def test_several_event_loops_may_share_an_engine(engine: AsyncEngine) -> None:
    with ThreadPoolExecutor(4) as threads:
        texts = threads.map(
            lambda i: asyncio.run(collect(engine, list(f"say:loop {i}".encode()), f"r{i}")),
            range(12),
        )
        assert list(texts) == [f"loop {i}" for i in range(12)]


async def test_one_update_at_the_end_when_no_more_is_wanted(engine: AsyncEngine) -> None:
    stream = await engine.submit(PROMPT, SamplingParams(), "r", wants_updates=False)
    outputs = [output async for output in stream]
    assert [output.text for output in outputs] == [REPLY]
    assert stream.stop_reason == 258


async def test_an_event_loop_is_woken_once_a_step(
    engine: AsyncEngine, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    calls = 0
    call_soon_threadsafe = loop.call_soon_threadsafe

    def count(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return call_soon_threadsafe(*arguments)

    fake.gate.clear()
    running = [asyncio.create_task(collect(engine, PROMPT, f"r{i}")) for i in range(20)]
    await until(lambda: len(fake.added) == 20)
    monkeypatch.setattr(loop, "call_soon_threadsafe", count)
    steps = fake.num_steps
    fake.gate.set()
    await asyncio.gather(*running)
    assert calls <= fake.num_steps - steps + 2


async def test_an_idle_engine_does_nothing(engine: AsyncEngine, fake: Any) -> None:
    await collect(engine, PROMPT, "r")
    await asyncio.sleep(0.05)
    before = (fake.num_steps, fake.num_asked)
    await asyncio.sleep(0.3)
    assert (fake.num_steps, fake.num_asked) == before


async def test_leaving_the_loop_early_aborts(engine: AsyncEngine, fake: Any) -> None:
    outputs = engine.generate(PROMPT, ENDLESS, "r")
    async for _ in outputs:
        break
    await outputs.aclose()
    await until(lambda: fake.aborted == ["r"] and engine.num_active == 0)


async def test_cancelling_a_reader_aborts(engine: AsyncEngine, fake: Any) -> None:
    fake.step_s = 0.01
    reader = asyncio.create_task(collect(engine, PROMPT, "r"))
    await until(lambda: bool(fake.added))
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    await until(lambda: fake.aborted == ["r"] and engine.num_active == 0)


async def test_abort_from_outside_ends_the_stream(engine: AsyncEngine, fake: Any) -> None:
    fake.step_s = 0.005
    stream = await engine.submit(PROMPT, ENDLESS, "r")
    await anext(stream)
    assert await asyncio.to_thread(engine.abort, "r")
    last = [output async for output in stream][-1]
    assert last.finish_reason is FinishReason.ABORT
    assert not engine.abort("r")
    assert not engine.abort("unknown")


async def test_a_stop_string_does_not_depend_on_how_tokens_are_grouped(
    engine: AsyncEngine, fake: Any
) -> None:
    fake.gate.clear()
    stream = await engine.submit(
        PROMPT, SamplingParams(stop=("is the",), ignore_eos=True, max_tokens=60), "r"
    )
    fake.gate.set()
    await until(lambda: fake.num_steps >= 60)  # all tokens wait before the first is read
    outputs = [output async for output in stream]
    assert "".join(output.text for output in outputs) == "Paris "
    assert outputs[-1].num_output == len("Paris is the")
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert stream.stop_reason == "is the"


async def test_requests_that_cannot_be_served_are_refused(engine: AsyncEngine, fake: Any) -> None:
    for prompt, error in (
        ([], InvalidRequest),
        ([262], InvalidRequest),
        ([-1], InvalidRequest),
        ([1] * 200, ContextLengthExceeded),
    ):
        with pytest.raises(error):
            await engine.submit(prompt, SamplingParams(), "r")
    fake.gate.clear()
    await engine.submit(PROMPT, SamplingParams(), "r")
    with pytest.raises(InvalidRequest, match="'r' is in use"):
        await engine.submit(PROMPT, SamplingParams(), "r")
    fake.refusal = InvalidRequest("too big")
    fake.gate.set()
    with pytest.raises(InvalidRequest, match="too big"):
        await engine.submit(PROMPT, SamplingParams(), "s")
    assert "s" not in [request_id for _, _, request_id in fake.added]


async def test_a_crash_fails_every_stream(
    engine: AsyncEngine, fake: Any, caplog: pytest.LogCaptureFixture
) -> None:
    fake.gate.clear()
    streams = [await engine.submit(PROMPT, ENDLESS, f"r{i}") for i in range(3)]
    fake.crash = True
    fake.gate.set()
    for stream in streams:
        with pytest.raises(EngineDead, match="fire"):
            await anext(stream)
    assert engine.state == "dead"
    await until(lambda: fake.is_closed)
    with pytest.raises(EngineDead, match="fire"):
        await engine.submit(PROMPT, ENDLESS, "third")
    assert "caught fire" in caplog.text


async def test_draining_waits_then_aborts(engine: AsyncEngine, fake: Any) -> None:
    short = asyncio.create_task(collect(engine, PROMPT, "short"))
    await until(lambda: bool(fake.added))
    assert await engine.drain(10)
    assert await short == REPLY
    assert engine.state == "draining"
    with pytest.raises(EngineUnavailable, match="shutting down"):
        await engine.submit(PROMPT, SamplingParams(), "r")


async def test_draining_does_not_wait_longer_than_told(engine: AsyncEngine, fake: Any) -> None:
    fake.step_s = 0.02
    stream = await engine.submit(PROMPT, ENDLESS, "r")
    assert not await engine.drain(0.1)
    assert (await stream.read_all()).finish_reason is FinishReason.ABORT


async def test_closing_fails_what_runs(engine: AsyncEngine, fake: Any) -> None:
    fake.step_s = 0.01
    stream = await engine.submit(PROMPT, ENDLESS, "r")
    assert await asyncio.to_thread(engine.close)
    with pytest.raises(EngineUnavailable):
        await stream.read_all()
    with pytest.raises(EngineUnavailable):
        await engine.submit(PROMPT, ENDLESS, "s")
    assert fake.is_closed


def test_a_failed_start_is_told_to_who_waits() -> None:
    def build(progress: Any) -> Any:
        raise InvalidRequest("no such model")

    engine = AsyncEngine(build)
    with pytest.raises(InvalidRequest, match="no such model"):
        engine.wait_until_ready()
    assert engine.state == "dead"
    assert not engine.was_started
    assert engine.close()
