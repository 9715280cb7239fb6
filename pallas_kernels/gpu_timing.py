"""Timing kernels on a GPU, and what the card can do at most.

A program runs a call several times, on other inputs each time. The time of one call is the slope
between a short and a long program: what starting a program costs cancels out.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

REPEATS = 9
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


def median_s(call: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median seconds until the arrays that `call` returns are there, once the device is warm."""
    warm_at = time.perf_counter() + WARM_UP_S
    while time.perf_counter() < warm_at:
        jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def compile_timer(
    call: Callable[..., jax.Array],
    make: Callable[[], tuple[Sequence[Any], Any]],
    counts: tuple[int, int],
) -> Callable[[], float]:
    """Compile what times one `call(each, *shared)`; the result runs it and returns seconds.

    Compiling needs shapes alone, so that it may go on in several threads at once.

    Args:
        make: makes the inputs, of which each call takes the next, and `shared`. An input may come
            again, with so many others in between that it has left the card's cache.
        counts: calls of the shorter and of the longer program.
    """
    inputs, shared = jax.eval_shape(make)
    call = jax.jit(call)  # traced and lowered once, however often it is called

    def program(used, shared):
        # One number of each: the host takes about 10 us for every array that a program returns.
        results = jax.lax.optimization_barrier([call(each, *shared) for each in used])
        return jnp.stack([result.ravel()[0] for result in results])

    def taken(inputs: Sequence[Any], count: int) -> tuple[Any, ...]:
        return tuple(inputs[i % len(inputs)] for i in range(count))

    options = OPTIONS.get(jax.default_backend())
    programs = [jax.jit(program).lower(taken(inputs, n), shared).compile(options) for n in counts]

    def time_s() -> float:
        inputs, shared = make()
        seconds = [
            median_s(partial(compiled, taken(inputs, count), shared))
            for count, compiled in zip(counts, programs, strict=True)
        ]
        return (seconds[1] - seconds[0]) / (counts[1] - counts[0])

    return time_s


def copy_bytes_per_s(num_bytes: int = 2**31) -> float:
    """Bytes read plus written per second by a large elementwise copy: the memory's ceiling."""
    x = jax.random.normal(jax.random.key(0), (num_bytes // 2,), jnp.bfloat16)
    double = jax.jit(lambda x: x * 2)
    return 2 * num_bytes / median_s(lambda: double(x))


def matmul_flops_per_s(size: int = 8192) -> float:
    """Operations per second of a large bfloat16 matrix product: the tensor cores' ceiling."""
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product = jax.jit(lambda x: x @ x)
    return 2 * size**3 / median_s(lambda: product(x))


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
