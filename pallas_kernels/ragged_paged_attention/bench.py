"""Time ragged paged attention over `arg_specs`.

Run as `python -m pallas_kernels.ragged_paged_attention.bench`.

Each case is one jitted step of LAYERS calls with a cache each, all donated, every call fed by the
one before: what a model's step does, without the rest of the model. Prints one JSON line per case:
median and best milliseconds per step, and the key and value bytes read per second.
"""

import argparse
import json
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.ragged_paged_attention.api import ragged_paged_attention
from pallas_kernels.ragged_paged_attention.arg_specs import ARG_SPECS, ArgSpec


def time_case(
    spec: ArgSpec, *, layers: int, repeats: int, implementation: str | None = None
) -> dict:
    """Run one case; returns the JSON record, times in milliseconds per step of `layers` calls."""
    q, k, v, cache, *metadata = spec.arguments()
    caches = [jnp.array(np.nan_to_num(np.asarray(cache))) for _ in range(layers)]
    options = spec.options()

    def step(caches, q, k, v, metadata):
        written = []
        for cache in caches:
            out, cache = ragged_paged_attention(
                q, k, v, cache, *metadata, **options, implementation=implementation
            )
            written.append(cache)
            q = q + (1e-3 * out.mean(-1, keepdims=True)).astype(q.dtype)  # In order, please.
        return q, written

    started = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(caches, q, k, v, metadata).compile()
    compile_s = time.perf_counter() - started
    seconds = []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        _, caches = jax.block_until_ready(compiled(caches, q, k, v, metadata))
        seconds.append(time.perf_counter() - started)
    seconds = seconds[2:]
    median = statistics.median(seconds)
    seen = sum(min(kv_len, spec.window or kv_len) for _, kv_len in spec.rows)
    width = spec.head_dim + (0 if spec.shared_kv else spec.v_head_dim)
    read = layers * seen * spec.num_kv_heads * width * jnp.dtype(spec.dtype).itemsize
    return {
        "case": spec.name,
        "page_size": spec.page_size,
        "layers": layers,
        "median_ms": round(1e3 * median, 3),
        "best_ms": round(1e3 * min(seconds), 3),
        "kv_gb_per_s": round(read / median / 1e9, 2),
        "temp_mb": round(compiled.memory_analysis().temp_size_in_bytes / 1e6, 2),
        "compile_s": round(compile_s, 2),
        "implementation": implementation or "auto",
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument("--layers", type=int, default=30, help="calls per step")
    parser.add_argument("--repeats", type=int, default=15, help="timed steps; the median counts")
    parser.add_argument("--implementation", default=None, help="xla or reference; default: auto")
    arguments = parser.parse_args(argv)
    for spec in ARG_SPECS:
        if arguments.match in spec.name:
            record = time_case(
                spec,
                layers=arguments.layers,
                repeats=arguments.repeats,
                implementation=arguments.implementation,
            )
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
