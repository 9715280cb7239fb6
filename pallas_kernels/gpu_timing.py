"""Timing kernels on a GPU, and what the card can do at most.

A program runs a call many times, on other inputs each time, and is run many times; the host is
ahead of the device all the time, so that neither starting a program nor waiting for its end counts.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

SAMPLES, SAMPLE_S = 5, 0.04  # The median of so many counts; each lasts so long at least.
AHEAD = 4  # Runs that the host starts before it waits for the first of them.
# Without CUDA graphs: updating one takes the host longer than a small kernel runs, 15 us a node.
OPTIONS = {"gpu": {"xla_gpu_enable_command_buffer": ""}}


WARM_UP_S = 0.2  # before anything is timed: a card that idled runs at a lower clock
T = TypeVar("T")


def all_at_once(compilers: Sequence[Callable[[], T]]) -> list[Future[T]]:
    """Compile on all cores, and wait: what is timed then has the machine to itself."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = [pool.submit(each) for each in compilers]
        wait(futures)
    return futures


def seconds_per_run(call: Callable[[], object]) -> float:
    """Seconds that a run of `call`, which returns arrays, takes the device, once it is warm."""

    def run(enough: Callable[[int], bool]) -> tuple[int, float]:
        """Run until `enough`, given the number of runs; returns it and the seconds a run took."""
        started, done, running = time.perf_counter(), 0, deque()
        while not enough(done):
            running.append(call())
            done += 1
            if len(running) > AHEAD:
                jax.block_until_ready(running.popleft())
        jax.block_until_ready(list(running))
        return done, (time.perf_counter() - started) / done

    warm_at = time.perf_counter() + WARM_UP_S
    _, seconds = run(lambda done: done > AHEAD and time.perf_counter() > warm_at)
    runs = max(AHEAD, math.ceil(SAMPLE_S / seconds))
    return statistics.median(run(lambda done: done == runs)[1] for _ in range(SAMPLES))


def compile_timer(
    call: Callable[..., jax.Array],
    make: Callable[[], tuple[Sequence[Any], Any]],
    calls: int,
) -> Callable[[], float]:
    """Compile what times one `call(each, *shared)`; the result runs it and returns seconds.

    Compiling needs shapes alone, so that it may go on in several threads at once.

    Args:
        make: makes the inputs, of which each call takes the next, and `shared`. An input may come
            again, with so many others in between that it has left the card's cache.
        calls: of a program. What depends on `shared` alone is computed once for all of them.
    """
    inputs, shared = jax.eval_shape(make)
    call = jax.jit(call)  # traced and lowered once, however often it is called

    def program(used, shared):
        # One number of each: the host takes about 10 us for every array that a program returns.
        results = jax.lax.optimization_barrier([call(each, *shared) for each in used])
        return jnp.stack([result.ravel()[0] for result in results])

    def taken(inputs: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(inputs[i % len(inputs)] for i in range(calls))

    options = OPTIONS.get(jax.default_backend())
    compiled = jax.jit(program).lower(taken(inputs), shared).compile(options)

    def time_s() -> float:
        inputs, shared = make()
        return seconds_per_run(partial(compiled, taken(inputs), shared)) / calls

    return time_s


def copy_bytes_per_s(num_bytes: int = 2**31) -> float:
    """Bytes read plus written per second by a large elementwise copy: the memory's ceiling."""
    x = jax.random.normal(jax.random.key(0), (num_bytes // 2,), jnp.bfloat16)
    double = jax.jit(lambda x: x * 2)
    return 2 * num_bytes / seconds_per_run(lambda: double(x))


def matmul_flops_per_s(size: int = 8192) -> float:
    """Operations per second of a large bfloat16 matrix product: the tensor cores' ceiling."""
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product = jax.jit(lambda x: x @ x)
    return 2 * size**3 / seconds_per_run(lambda: product(x))


@dataclass(frozen=True)
class Card:
    """A GPU and what it can do at most, for the records of benches.

    kind: as JAX names it. bytes_per_s, flops_per_s: of a copy and of a large matrix product.
    """

    kind: str
    bytes_per_s: float
    flops_per_s: float

    @classmethod
    def measured(cls) -> Card:
        """The first device, with its ceilings as measured now."""
        return cls(jax.devices()[0].device_kind, copy_bytes_per_s(), matmul_flops_per_s())

    def record(
        self,
        head: Mapping[str, Any],
        seconds: float,
        *,
        num_bytes: int | None = None,
        flops: int | None = None,
    ) -> dict[str, Any]:
        """One call's time, rates and shares of the ceilings, behind `head`."""
        record = {**head, "us": round(1e6 * seconds, 1)}
        if num_bytes is not None:
            rate = num_bytes / seconds
            record["tb_per_s"] = round(rate / 1e12, 3)
            record["share_of_copy"] = round(rate / self.bytes_per_s, 3)
        if flops is not None:
            rate = flops / seconds
            record["tflop_per_s"] = round(rate / 1e12, 1)
            record["share_of_matmul"] = round(rate / self.flops_per_s, 3)
        return {**record, "device": self.kind, "jax": jax.__version__}
