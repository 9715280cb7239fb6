"""Batches in, tokens out: padding to a bucket, the compiled step, results copied back.

A bucket is compiled once, ahead of time; calling it can never compile again. Dispatch does not
wait for the device, so the next batch is prepared while this one runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.engine.kv_cache import StepMemory, allocate, bytes_per_device, cache_structs
from jaxserve.engine.loader import Model
from jaxserve.engine.step import ON_DEVICE, SAMPLES, StepLayout, forward_and_sample
from jaxserve.sampling import pack_into
from jaxserve.scheduler.buckets import Bucket
from jaxserve.scheduler.scheduler import Batch, Scheduled
from model_defs.sharding import DATA


@dataclass(frozen=True)
class InFlight:
    """A step that was dispatched; `sampled` is on its way to the host."""

    batch: Batch
    sampled: jax.Array  # i32[ranks, R]


class Runner:
    """Owns the arrays on the device and the compiled steps.

    Args:
        model: definition; its arrays are set as `params` before the first dispatch.
        max_rows: rows per rank.
        max_model_len: tokens of the longest request.
    """

    def __init__(
        self,
        model: Model,
        *,
        page_size: int,
        max_rows: int,
        max_model_len: int,
    ) -> None:
        self.model = model
        self.params: tuple[jax.Array, ...] = ()  # loaded while the first bucket compiles
        self.page_size = page_size
        self.max_rows = max_rows
        self.pages_per_row = -(-max_model_len // page_size)
        self.num_ranks = model.rules.shards("rows")
        self.num_pages = 0
        self._by_rank = jax.sharding.NamedSharding(
            model.rules.mesh, jax.sharding.PartitionSpec(DATA)
        )
        self._steps: dict[Bucket, Callable] = {}
        self._layouts: dict[Bucket, StepLayout] = {}
        self._caches: tuple[jax.Array, ...] = ()
        self.compile_s: dict[Bucket, float] = {}

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of every layer on one device."""
        specs = self.model.module.cache_specs
        two = cache_structs(specs, self.model.rules, 2, self.page_size)
        one = cache_structs(specs, self.model.rules, 1, self.page_size)
        return bytes_per_device(two) - bytes_per_device(one)

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The buckets that can run now."""
        return tuple(sorted(self._steps))

    def layout(self, bucket: Bucket) -> StepLayout:
        return StepLayout(bucket, self.pages_per_row)

    def lower(self, bucket: Bucket, num_pages: int) -> jax.stages.Lowered:
        """Trace one bucket's step for a pool of `num_pages` pages a rank."""
        model, layout = self.model, self.layout(bucket)
        caches = cache_structs(model.module.cache_specs, model.rules, num_pages, self.page_size)
        by_rank = partial(jax.ShapeDtypeStruct, dtype=jnp.int32, sharding=self._by_rank)
        step = jax.jit(
            partial(forward_and_sample, model.merge, layout, model.rules),
            donate_argnums=(1, 2),
            out_shardings=(self._by_rank, self._by_rank, tuple(c.sharding for c in caches)),
        )
        return step.lower(
            model.params,
            caches,
            by_rank((self.num_ranks, self.max_rows)),
            by_rank((self.num_ranks, layout.size)),
        )

    def compile(self, bucket: Bucket, num_pages: int) -> tuple[jax.stages.Compiled, StepMemory]:
        """Compile one bucket; may be called from several threads."""
        start_s = time.perf_counter()
        compiled = self.lower(bucket, num_pages).compile()
        self.compile_s[bucket] = time.perf_counter() - start_s
        caches = cache_structs(
            self.model.module.cache_specs, self.model.rules, num_pages, self.page_size
        )
        return compiled, StepMemory.of(compiled, bytes_per_device(caches))

    def install(self, bucket: Bucket, compiled: jax.stages.Compiled) -> None:
        """Make a compiled bucket available to `dispatch`."""
        self._layouts[bucket] = self.layout(bucket)
        self._steps[bucket] = compiled

    def allocate(self, num_pages: int) -> None:
        """Create the caches: `num_pages` pages on each rank."""
        self.num_pages = num_pages
        specs = self.model.module.cache_specs
        self._caches = allocate(cache_structs(specs, self.model.rules, num_pages, self.page_size))
        self._last_tokens = jax.device_put(
            np.zeros((self.num_ranks, self.max_rows), np.int32), self._by_rank
        )

    def dispatch(self, batch: Batch) -> InFlight:
        """Start a step; returns at once."""
        packed = self.pack(batch)
        sampled, self._last_tokens, self._caches = self._steps[batch.bucket](
            self.params, self._caches, self._last_tokens, jax.device_put(packed, self._by_rank)
        )
        sampled.copy_to_host_async()
        return InFlight(batch, sampled)

    def collect(self, step: InFlight) -> list[list[int]]:
        """Wait for a step's tokens: per rank, one per scheduled row."""
        sampled = np.asarray(step.sampled).tolist()
        return [row[: len(rank)] for row, rank in zip(sampled, step.batch.ranks, strict=True)]

    def close(self) -> None:
        """Free the arrays on the device; nothing can be dispatched afterwards."""
        for array in (*self.params, *self._caches, self._last_tokens):
            array.delete()
        self._steps.clear()

    def pack(self, batch: Batch) -> np.ndarray:
        """A batch as `i32[ranks, layout.size]`."""
        layout = self._layouts[batch.bucket]
        packed = np.zeros((self.num_ranks, layout.size), np.int32)
        for vector, rows in zip(packed, batch.ranks, strict=True):
            fill_rank(layout.views(vector), rows)
        return packed


def fill_rank(fields: dict[str, np.ndarray], rows: Sequence[Scheduled]) -> None:
    """Write one rank's rows into the views of its vector."""
    num = len(rows)
    new = [row.num_new for row in rows]
    starts = fields["query_starts"]
    np.cumsum(new, out=starts[1 : num + 1])
    starts[num + 1 :] = starts[num]
    fields["kv_lens"][:num] = [row.start + row.num_new for row in rows]
    fields["prompt_lens"][:num] = [row.request.num_prompt for row in rows]
    fields["slots"][:num] = [row.request.row for row in rows]
    fields["flags"][:num] = [
        ON_DEVICE * row.token_on_device + SAMPLES * row.samples for row in rows
    ]
    num_decode = next((i for i, n in enumerate(new) if n != 1), num)
    fields["distribution"][:] = (num_decode, num_decode, num)
    table, tokens, at = fields["page_table"], fields["tokens"], 0
    for i, row in enumerate(rows):
        pages = row.request.pages
        table[i, : len(pages)] = pages
        if not row.token_on_device:
            stop = row.start + row.num_new
            tokens[at : at + row.num_new] = row.request.tokens[row.start : stop]
        at += row.num_new
    pack_into(
        fields["sampling"],
        [(row.request.sampling, row.request.seed, row.start + row.num_new) for row in rows],
    )
