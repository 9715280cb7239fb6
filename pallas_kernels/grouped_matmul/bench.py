"""Time the grouped matrix product over `arg_specs`.

Run as `python -m pallas_kernels.grouped_matmul.bench`. Prints one JSON line per case. On a GPU,
over GPU_SPECS: microseconds per call, and shares of what a copy (which limits decoding) and a large
matrix product (which limits prompts) reach on this card. Elsewhere, over ARG_SPECS: median and best
milliseconds per call, bytes of the matrices in use and floating-point operations per second.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.gpu_timing import (
    Card,
    all_at_once,
    compile_timer,
)
from pallas_kernels.grouped_matmul import gpu
from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.grouped_matmul.arg_specs import ARG_SPECS, GPU_SPECS, ArgSpec

GPU_IMPLEMENTATIONS = ("triton", "ragged_dot")


def time_case(spec: ArgSpec, *, repeats: int, implementation: str | None = None) -> dict:
    """Run one case; returns the JSON record."""
    arguments = spec.arguments()

    call = partial(grouped_matmul, implementation=implementation, **spec.options)
    compiled = jax.jit(call).lower(*arguments).compile()
    seconds = []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        seconds.append(time.perf_counter() - started)
    seconds = seconds[2:]
    median = statistics.median(seconds)
    used = sum(size > 0 for size in spec.group_sizes)
    matrix = spec.inner * spec.outer
    return {
        "case": spec.name,
        "median_ms": round(1e3 * median, 3),
        "best_ms": round(1e3 * min(seconds), 3),
        "weight_gb_per_s": round(used * matrix * jnp.dtype(spec.dtype).itemsize / median / 1e9, 2),
        "gflop_per_s": round(spec.flops / median / 1e9, 1),
        "temp_mb": round(compiled.memory_analysis().temp_size_in_bytes / 1e6, 2),
        "implementation": implementation or "auto",
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def gpu_timer(
    spec: ArgSpec,
    *,
    device_kind: str | None,
    implementation: str | None = "triton",
    sizes: gpu.Tiling | None = None,
) -> Callable[[], float]:
    """Compile a call, with these sizes of the kernel where they are given; see `compile_timer`.

    Calls in a row use other matrices, so that none of them is still in the card's cache.
    """
    calls = 4 if spec.num_rows > 8192 else 24

    def make():
        x, w, group_sizes, *rows = spec.device_arguments()
        return [w, w + 1, w - 1], (x, group_sizes, *rows)

    if sizes is None:
        product = partial(grouped_matmul, device_kind=device_kind, implementation=implementation)
    else:
        product = partial(gpu.grouped_matmul, tiling=sizes)

    def call(w, x, group_sizes, *rows):
        return product(x, w, group_sizes, *rows, **spec.options)

    return compile_timer(call, make, calls)


def gpu_records(match: str, implementations: tuple[str, ...]) -> Iterator[dict]:
    """Yield the JSON record of each case whose name contains `match`, by implementation."""
    card = Card.measured()
    chosen = [(spec, name) for spec in GPU_SPECS if match in spec.name for name in implementations]
    compilers = [
        partial(gpu_timer, spec, device_kind=card.kind, implementation=name)
        for spec, name in chosen
    ]
    for (spec, name), timer in zip(chosen, all_at_once(compilers), strict=True):
        try:
            seconds = timer.result()()
        except jax.errors.JaxRuntimeError as error:  # XLA's own may need more memory than there is
            print(f"{spec.name}, {name}: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        head = {"op": "grouped_matmul", "case": spec.name, "implementation": name}
        yield card.record(head, seconds, num_bytes=spec.used_bytes, flops=spec.flops)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time the grouped matrix product.")
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument("--repeats", type=int, default=15, help="timed calls; the median counts")
    parser.add_argument(
        "--implementation",
        default=None,
        help="triton, ragged_dot, blocks or reference; default: auto, on a GPU the first two",
    )
    arguments = parser.parse_args(argv)
    if jax.default_backend() == "gpu":
        chosen = arguments.implementation
        for record in gpu_records(arguments.match, (chosen,) if chosen else GPU_IMPLEMENTATIONS):
            print(json.dumps(record), flush=True)
        return
    for spec in ARG_SPECS:
        if arguments.match in spec.name:
            record = time_case(
                spec, repeats=arguments.repeats, implementation=arguments.implementation
            )
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
