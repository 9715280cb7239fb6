"""Time the grouped matrix product over `arg_specs`.

Run as `python -m pallas_kernels.grouped_matmul.bench`. Prints one JSON line per case: median and
best milliseconds per call, bytes of the matrices in use and floating-point operations per second.
"""

import argparse
import json
import platform
import statistics
import time

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.grouped_matmul.arg_specs import ARG_SPECS, ArgSpec


def time_case(spec: ArgSpec, *, repeats: int, implementation: str | None = None) -> dict:
    """Run one case; returns the JSON record."""
    arguments = spec.arguments()

    def call(x, w, group_sizes):
        return grouped_matmul(x, w, group_sizes, implementation=implementation)

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
        "gflop_per_s": round(2 * sum(spec.group_sizes) * matrix / median / 1e9, 1),
        "temp_mb": round(compiled.memory_analysis().temp_size_in_bytes / 1e6, 2),
        "implementation": implementation or "auto",
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument("--repeats", type=int, default=15, help="timed calls; the median counts")
    parser.add_argument(
        "--implementation", default=None, help="ragged_dot, blocks or reference; default: auto"
    )
    arguments = parser.parse_args(argv)
    for spec in ARG_SPECS:
        if arguments.match in spec.name:
            record = time_case(
                spec, repeats=arguments.repeats, implementation=arguments.implementation
            )
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
