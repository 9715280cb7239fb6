"""Start-up: memory, errors, compiling in the background, and nothing compiled after it."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jaxserve.engine.engine as engine_module
from jaxserve.config import ConfigError, EngineConfig
from jaxserve.engine import kv_cache
from jaxserve.engine.compile_counter import CompileCounter
from jaxserve.engine.engine import DEFAULTS, step_limits
from jaxserve.engine.kv_cache import NotEnoughMemory, StepMemory, pages_that_fit
from jaxserve.engine.runner import Runner
from jaxserve.request import FinishReason, InvalidRequest, SamplingParams
from jaxserve.scheduler.buckets import Bucket, make_buckets

from .conftest import (
    CONTEXT,
    ONE_BUCKET,
    VOCAB,
    Driver,
    TinyModel,
    config_of,
    greedy,
    random_prompt,
)

MakeDriver = Callable[..., Driver]
LARGEST = Bucket(32, 4)
TIMEOUT_S = 120.0


# ---- compiling ------------------------------------------------------------------------------


def test_nothing_compiles_after_warm_up(driver: Driver) -> None:
    engine = driver.engine
    draw = random.Random(0)
    requests = []
    for seed in range(1000):
        if draw.random() < 0.7:
            sampling = greedy(draw.randint(1, 6))
        else:
            sampling = SamplingParams(
                max_tokens=draw.randint(1, 6),
                temperature=draw.choice((0.5, 1.0)),
                top_p=draw.choice((0.8, 1.0)),
                top_k=draw.choice((0, 5)),
                min_p=draw.choice((0, 0.1)),
            )
        requests.append(driver.add(random_prompt(draw.randint(1, 40), seed), sampling))
        if draw.random() < 0.05:
            engine.abort(draw.choice(requests).id)
        if draw.random() < 0.1:
            driver.drain()
    driver.drain()
    assert all(request.is_finished for request in requests)
    assert set(driver.buckets_used) == set(make_buckets(32, 4))
    assert engine.is_warm
    assert engine.compiles.count == 0
    assert engine.stats()["compiles_after_warmup"] == 0


def test_the_counter_counts_compilations() -> None:
    counter = CompileCounter()
    step = jax.jit(lambda x: x * 3 + 1)
    step(jnp.zeros(7)).block_until_ready()
    count = counter.count
    assert count > 0
    step(jnp.ones(7)).block_until_ready()
    assert counter.count == count
    step(jnp.zeros(9)).block_until_ready()
    assert counter.count > count
    counter.reset()
    assert counter.count == 0


def test_the_engine_serves_while_it_compiles(
    model: TinyModel, make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    compile_now = Runner.compile

    def slowly(self: Runner, bucket: Bucket, num_pages: int) -> Any:
        if bucket != LARGEST:
            assert gate.wait(TIMEOUT_S)
        return compile_now(self, bucket, num_pages)

    monkeypatch.setattr(Runner, "compile", slowly)
    driver = make_driver(model)
    prompt = random_prompt(40)
    expected = model.greedy(prompt, 6)
    try:
        assert driver.run((prompt, greedy(6))) == [expected]
        assert not driver.engine.is_warm
        assert set(driver.buckets_used) == {LARGEST}
        assert driver.engine.stats()["buckets_compiled"] == 1
        request = driver.add(prompt, greedy(6))
        driver.step()
    finally:
        gate.set()
    driver.engine.wait_until_warm()  # in the middle of a request
    driver.drain()
    assert request.tokens[40:] == expected
    assert Bucket(1, 1, True) in driver.buckets_used
    stats = driver.engine.stats()
    assert stats["buckets_compiled"] == stats["buckets"] == len(make_buckets(32, 4))
    assert set(stats["compile_s"]) == {str(bucket) for bucket in make_buckets(32, 4)}


def test_a_bucket_that_does_not_compile_is_done_without(
    model: TinyModel, make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_now = Runner.compile

    def partly(self: Runner, bucket: Bucket, num_pages: int) -> Any:
        if bucket == Bucket(1, 1, True):
            raise RuntimeError("the compiler gave up")
        return compile_now(self, bucket, num_pages)

    monkeypatch.setattr(Runner, "compile", partly)
    driver = make_driver(model)
    with pytest.raises(RuntimeError, match="the compiler gave up"):
        driver.engine.wait_until_warm()
    prompt = random_prompt(40)
    assert driver.run((prompt, greedy(6))) == [model.greedy(prompt, 6)]
    assert Bucket(1, 1, True) not in driver.buckets_used
    assert Bucket(2, 2, True) in driver.buckets_used
    assert driver.engine.is_warm
    assert driver.engine.stats()["compiles_after_warmup"] == 0


def test_progress_is_reported(model: TinyModel) -> None:
    seen: list[tuple[str, int, int]] = []
    engine = engine_module.Engine(
        config_of(model), progress=lambda what, done, total: seen.append((what, done, total))
    )
    engine.wait_until_warm()
    engine.close()
    engine.close()
    last = {what: (done, total) for what, done, total in seen}
    assert {"loading weights", "compiling the first bucket", "compiling further buckets"} <= set(
        last
    )
    assert all(done == total for done, total in last.values())


# ---- memory ---------------------------------------------------------------------------------


def test_pages_fill_the_memory_that_the_step_leaves(
    model: TinyModel, make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make_driver(model, **ONE_BUCKET, max_total_tokens=None).engine.runner
    assert runner.num_pages == 4 * runner.pages_per_row  # no more can ever be used
    _, memory = runner.compile(LARGEST, runner.num_pages)
    page_bytes = 2 * 2 * 2 * 16 * 4 * 8  # layers, k and v, heads, head_dim, float32, page_size
    assert runner.page_bytes == page_bytes
    wanted = runner.pages_per_row + 5
    budget = memory.fixed + wanted * page_bytes + page_bytes // 2
    monkeypatch.setattr(engine_module, "memory_budget_bytes", lambda *_: budget)
    driver = make_driver(model, **ONE_BUCKET, max_total_tokens=None)
    # Temporaries may depend a little on the size of the pool.
    assert wanted - 2 <= driver.engine.model_info.num_pages <= wanted + 2
    prompt = random_prompt(40)
    assert driver.run((prompt, greedy(6))) == [model.greedy(prompt, 6)]


def test_too_little_memory_says_what_to_do(
    model: TinyModel, make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "memory_budget_bytes", lambda *_: 300_000)
    with pytest.raises(NotEnoughMemory, match="needs 16 KV pages, 0 fit") as caught:
        make_driver(model, **ONE_BUCKET)
    for remedy in (
        "--context-length",
        "--chunked-prefill-size",
        "--mem-fraction-static",
        "--tp-size",
    ):
        assert remedy in str(caught.value)


def test_pages_that_fit() -> None:
    memory = StepMemory(fixed=1000, pages=0)
    assert pages_that_fit(2099, memory, 100, max_pages=50, min_pages=3) == 10
    assert pages_that_fit(2099, memory, 100, max_pages=7, min_pages=3) == 7
    with pytest.raises(NotEnoughMemory, match="needs 11 KV pages, 10 fit"):
        pages_that_fit(2099, memory, 100, max_pages=50, min_pages=11)
    with pytest.raises(NotEnoughMemory, match="0 fit"):
        pages_that_fit(500, memory, 100, max_pages=50, min_pages=1)


def test_memory_budget_of_accelerators_and_hosts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu: Any = SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 1000})
    assert kv_cache.memory_budget_bytes(gpu, None, 4) == 920
    assert kv_cache.memory_budget_bytes(gpu, 0.5, 4) == 500
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9999 kB\nMemAvailable:    4096 kB\n", "utf-8")
    monkeypatch.setattr(kv_cache, "MEMINFO", meminfo)
    cpu: Any = SimpleNamespace(platform="cpu", memory_stats=lambda: None)
    assert kv_cache.memory_budget_bytes(cpu, 0.5, 4) == 4096 * 1024 // 8


# ---- what is refused ------------------------------------------------------------------------


def test_a_pool_too_small_for_the_context_is_refused(
    model: TinyModel, make_driver: MakeDriver
) -> None:
    with pytest.raises(
        ConfigError, match=r"--max-total-tokens 100 is 13 pages of 8 tokens; .* needs 16\. Raise it"
    ):
        make_driver(model, **ONE_BUCKET, max_total_tokens=100)


def test_a_context_longer_than_the_models_is_refused(
    model: TinyModel, make_driver: MakeDriver
) -> None:
    with pytest.raises(ConfigError, match="--context-length is 161; this model was made for 160"):
        make_driver(model, context_length=161)


def test_more_devices_than_there_are_is_refused(model: TinyModel, make_driver: MakeDriver) -> None:
    with pytest.raises(ConfigError, match="--tp-size"):
        make_driver(model, tp_size=16)


def test_requests_that_cannot_be_served_are_refused(driver: Driver) -> None:
    prompt = random_prompt(5)
    for tokens, message in (
        ([1, VOCAB], rf"must lie in 0\.\.{VOCAB - 1}; found 1\.\.{VOCAB}"),
        ([-1, 5], r"found -1\.\.5"),
        ([], "the prompt has no tokens"),
        ([1] * CONTEXT, f"the prompt has {CONTEXT} tokens, but the context is {CONTEXT}"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            driver.engine.add(tokens, greedy(1), "refused")
    assert not driver.engine.has_work
    request = driver.engine.add(prompt, greedy(4), "taken")
    with pytest.raises(InvalidRequest, match="request id 'taken' is in use"):
        driver.engine.add(prompt, greedy(4), "taken")
    assert driver.engine.abort("taken")
    assert not driver.engine.abort("taken")
    driver.drain()
    assert request.finish_reason is FinishReason.ABORT


def test_model_info(driver: Driver) -> None:
    info = driver.engine.model_info
    assert (info.architecture, info.dtype, info.platform) == ("LlamaForCausalLM", "float32", "cpu")
    assert (info.vocab_size, info.num_layers, info.max_model_len) == (VOCAB, 2, CONTEXT)
    assert (info.num_pages, info.page_size, info.max_running_requests) == (32, 8, 4)
    assert (info.tp_size, info.dp_size) == (1, 1)


@pytest.mark.parametrize(
    ("rows", "tokens", "expected"),
    [(None, None, (16, 512)), (1000, None, (1000, 1000)), (None, 8, (8, 8)), (4, 8, (4, 8))],
)
def test_step_limits_follow_what_is_given(rows, tokens, expected) -> None:
    config = EngineConfig("m", max_running_requests=rows, chunked_prefill_size=tokens)
    assert step_limits(config, DEFAULTS["cpu"]) == expected


def test_more_rows_than_tokens_are_refused_by_name() -> None:
    config = EngineConfig("m", max_running_requests=9, chunked_prefill_size=8)
    with pytest.raises(ConfigError, match=r"--max-running-requests 9.*--chunked-prefill-size 8"):
        step_limits(config, DEFAULTS["cpu"])
