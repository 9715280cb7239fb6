"""KV memory: how large the page pool may be, and the arrays it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from model_defs.interface import CacheSpec
from model_defs.sharding import ShardingRules
from pallas_kernels.ragged_paged_attention import cache_axes, cache_shape

CPU_FRACTION, ACCELERATOR_FRACTION = 0.8, 0.92
MEMINFO = Path("/proc/meminfo")


class NotEnoughMemory(ValueError):
    """The device cannot hold the model, its temporaries and enough KV pages."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes one device needs for a compiled step, as the compiler reports them.

    `fixed` is everything but the KV pages: weights, inputs, temporaries, outputs.
    """

    fixed: int
    pages: int

    @classmethod
    def of(cls, compiled: jax.stages.Compiled, caches_bytes: int) -> StepMemory:
        stats = compiled.memory_analysis()
        total = (
            stats.argument_size_in_bytes
            + stats.temp_size_in_bytes
            + stats.output_size_in_bytes
            - stats.alias_size_in_bytes
        )
        return cls(total - caches_bytes, caches_bytes)


def cache_structs(
    specs: Sequence[CacheSpec], rules: ShardingRules, num_pages: int, page_size: int
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shape, dtype and sharding of every layer's cache; `num_pages` counts one rank's pages."""
    ranks = rules.shards("pages")
    platform = rules.mesh.devices.flat[0].platform
    return tuple(
        jax.ShapeDtypeStruct(
            cache_shape(
                num_pages * ranks,
                page_size,
                s.num_kv_heads,
                s.head_dim,
                s.v_head_dim,
                s.dtype,
                shared_kv=s.shared_kv,
                platform=platform,
            ),
            s.dtype,
            sharding=rules.sharding(*cache_axes()),
        )
        for s in specs
    )


def bytes_per_device(structs: Sequence[jax.ShapeDtypeStruct]) -> int:
    """Bytes of these arrays on one device."""
    return sum(int(np.prod(s.sharding.shard_shape(s.shape))) * s.dtype.itemsize for s in structs)


def allocate(structs: Sequence[jax.ShapeDtypeStruct]) -> tuple[jax.Array, ...]:
    """Zeroed caches on the mesh."""
    return tuple(jnp.zeros(s.shape, s.dtype, device=s.sharding) for s in structs)


def memory_budget_bytes(device: jax.Device, fraction: float | None, num_devices: int) -> int:
    """Bytes one device may use: a share of an accelerator's memory, or of the host's free RAM."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"] * (fraction or ACCELERATOR_FRACTION))
    return int(_free_host_bytes() * (fraction or CPU_FRACTION)) // num_devices


def _free_host_bytes() -> int:
    for line in MEMINFO.read_text().splitlines() if MEMINFO.exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 8 * 2**30


def pages_that_fit(
    budget_bytes: int, memory: StepMemory, page_bytes: int, max_pages: int, min_pages: int
) -> int:
    """How many pages the budget leaves room for, at most `max_pages`.

    Raises:
        NotEnoughMemory: fewer than `min_pages`, which one request of the full context needs.
    """
    pages = min(max_pages, (budget_bytes - memory.fixed) // page_bytes)
    if pages < min_pages:
        need = memory.fixed + min_pages * page_bytes
        raise NotEnoughMemory(
            f"one request of the full context needs {min_pages} KV pages, {max(pages, 0)} fit: "
            f"{need / 2**30:.2f} GiB a device are needed ({memory.fixed / 2**30:.2f} GiB of it for "
            f"weights and the step itself), {budget_bytes / 2**30:.2f} GiB are allowed. Lower "
            f"--context-length or --chunked-prefill-size, raise --mem-fraction-static, or split "
            f"the model with --tp-size."
        )
    return pages
