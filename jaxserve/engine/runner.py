"""Batches in, tokens or what was read out: padding to a bucket, the compiled step, copying back.

A bucket is compiled once, ahead of time; calling it can never compile again. Dispatch does not
wait for the device, so the next batch is prepared while this one runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.engine.compile_counter import num_fresh_compiles
from jaxserve.engine.kv_cache import StepMemory, allocate, bytes_per_device, cache_structs
from jaxserve.engine.loader import Model
from jaxserve.engine.mappings import require_mappings
from jaxserve.engine.packing import SlotColumns, fill_rank
from jaxserve.engine.step import RowState, StepLayout, forward_and_read, forward_and_sample
from jaxserve.engine.step_store import StepStore, step_key
from jaxserve.scheduler.buckets import Bucket
from jaxserve.scheduler.scheduler import Batch
from model_defs.sharding import DATA

# From so many tokens on, cuBLAS has the faster products.
CUBLAS_TOKENS = 48


def compiler_options(platform: str, bucket: Bucket) -> dict[str, str | bool] | None:
    """XLA's options for a step.

    On a GPU, everything goes into CUDA graphs: XLA's own choice leaves out branches and loops, and
    before each it waits for the device, so that no step would be prepared while another one runs.
    Products of many tokens are left to cuBLAS alone. Where XLA also tries Triton, it keeps kernels
    that are slower in a step (presumably it times both on weights that the card's cache holds); and
    it decides so late for cuBLAS that adding to the residual becomes a pass of its own over memory.
    """
    if platform != "gpu":
        return None
    commands = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
    return {
        "xla_gpu_enable_command_buffer": commands,
        "xla_gpu_enable_triton_gemm": bucket.tokens < CUBLAS_TOKENS,
    }


@dataclass(frozen=True)
class InFlight:
    """A step that was dispatched; `results` are on their way to the host."""

    batch: Batch
    results: jax.Array  # tokens i32[ranks, R], or what was read f32[ranks, R, O]


class Runner:
    """Owns the arrays on the device and the compiled steps.

    Args:
        model: definition; its arrays are set as `params` before the first dispatch.
        max_rows: rows per rank.
        max_model_len: tokens of the longest request.
        store: where compiled steps are kept between starts; None: nowhere.
    """

    def __init__(
        self,
        model: Model,
        *,
        page_size: int,
        max_rows: int,
        max_model_len: int,
        store: StepStore | None = None,
    ) -> None:
        self.model = model
        self._store = store
        self._unsaved: dict[Bucket, tuple[str, jax.stages.Compiled]] = {}
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
        self._slot_columns = [SlotColumns(max_rows) for _ in range(self.num_ranks)]
        self.compile_s: dict[Bucket, float] = {}

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of every layer on one device."""
        return bytes_per_device(self._cache_structs(2)) - bytes_per_device(self._cache_structs(1))

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The buckets that can run now."""
        return tuple(sorted(self._steps))

    def layout(self, bucket: Bucket) -> StepLayout:
        return StepLayout(bucket, self.page_size)

    def lower(self, bucket: Bucket, num_pages: int) -> jax.stages.Lowered:
        """Trace one bucket's step for a pool of `num_pages` pages a rank."""
        model, layout = self.model, self.layout(bucket)
        caches, state = self._cache_structs(num_pages), self.state_structs(self.max_rows)
        forward = forward_and_sample if model.spec.task == "generate" else forward_and_read
        shardings = jax.tree.map(lambda array: array.sharding, (state, caches))
        step = jax.jit(
            partial(forward, model.merge, layout, model.rules),
            donate_argnums=(1, 2),
            out_shardings=(self._by_rank, *shardings),
        )
        packed = self._by_rank_struct(layout.size)
        return step.lower(model.params, caches, state, packed)

    def compile(self, bucket: Bucket, num_pages: int) -> tuple[jax.stages.Compiled, StepMemory]:
        """Load one bucket's step from the store, else compile it; several threads may call this.

        Raises:
            TooManyMappings: on a CPU, when this process cannot hold another step.
        """
        if self._devices[0].platform == "cpu":
            require_mappings()
        start_s = time.perf_counter()
        key = None if self._store is None else self._step_key(bucket, num_pages)
        compiled = None if key is None else self._load(key, num_pages)
        if compiled is None:
            before = num_fresh_compiles()
            options = compiler_options(self._devices[0].platform, bucket)
            compiled = self.lower(bucket, num_pages).compile(compiler_options=options)
            if key is not None and num_fresh_compiles() > before:
                self._unsaved[bucket] = (key, compiled)
        self.compile_s[bucket] = time.perf_counter() - start_s
        return compiled, StepMemory.of(compiled, bytes_per_device(self._cache_structs(num_pages)))

    def save_compiled(self, bucket: Bucket) -> None:
        """Keep a step that had to be compiled; apart, so that serving need not wait for it."""
        unsaved = self._unsaved.pop(bucket, None)
        if unsaved is not None and self._store is not None:
            self._store.save(*unsaved)

    def _step_key(self, bucket: Bucket, num_pages: int) -> str | None:
        """Name a bucket's step by all that `lower` reads."""
        model = self.model
        parts = (
            model.spec,
            model.rules,
            [(p.shape, p.dtype, p.sharding) for p in model.params],
            [(c.shape, c.dtype, c.sharding) for c in self._cache_structs(num_pages)],
            self.layout(bucket),
            (self.num_ranks, self.max_rows, self.page_size, self.pages_per_row),
        )
        return step_key(parts, self._devices)

    def _load(self, key: str, num_pages: int) -> jax.stages.Compiled | None:
        assert self._store is not None
        caches = self._cache_structs(num_pages)
        state = self.state_structs(self.max_rows)
        in_tree = jax.tree.structure(((self.model.params, caches, state, 0), {}))
        out_tree = jax.tree.structure((0, state, caches))
        return self._store.load(key, in_tree, out_tree, self._devices)

    @property
    def _devices(self) -> list[jax.Device]:
        return list(self.model.rules.mesh.devices.flat)

    def _cache_structs(self, num_pages: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        specs = self.model.module.cache_specs
        return cache_structs(specs, self.model.rules, num_pages, self.page_size)

    def _by_rank_struct(self, *shape: int) -> jax.ShapeDtypeStruct:
        """An int32 array of which each rank has one block of `shape`."""
        return jax.ShapeDtypeStruct((self.num_ranks, *shape), jnp.int32, sharding=self._by_rank)

    def state_structs(self, num_slots: int) -> RowState:
        """Shapes and shardings of the row state for `num_slots` rows a rank."""
        struct = self._by_rank_struct
        return RowState(struct(num_slots), struct(num_slots, self.pages_per_row))

    def install(self, bucket: Bucket, compiled: jax.stages.Compiled) -> None:
        """Make a compiled bucket available to `dispatch`."""
        self._layouts[bucket] = self.layout(bucket)
        self._steps[bucket] = compiled

    def allocate(self, num_pages: int) -> None:
        """Create the caches: `num_pages` pages on each rank."""
        self.num_pages = num_pages
        self._caches = allocate(self._cache_structs(num_pages))
        self._state = jax.tree.map(
            lambda s: jnp.zeros(s.shape, s.dtype, device=s.sharding),
            self.state_structs(self.max_rows),
        )

    def dispatch(self, batch: Batch) -> InFlight:
        """Start a step; returns at once."""
        results = self._run(batch.bucket, self.pack(batch))
        results.copy_to_host_async()
        return InFlight(batch, results)

    def run_empty(self, bucket: Bucket) -> None:
        """Run a step without any row and wait for it.

        It changes nothing. The first runs of a step pay for loading its code and whatever else the
        runtime puts off, which a request should not.
        """
        self._run(bucket, self.pack(Batch(((),) * self.num_ranks, bucket))).block_until_ready()

    def _run(self, bucket: Bucket, packed: np.ndarray) -> jax.Array:
        # The call places `packed` itself, which costs the host half of what jax.device_put does.
        results, self._state, self._caches = self._steps[bucket](
            self.params, self._caches, self._state, packed
        )
        return results

    def collect(self, step: InFlight) -> list[list[int]]:
        """Wait for a step's tokens: per rank, one per scheduled row."""
        sampled = np.asarray(step.results).tolist()
        return [row[: len(rank)] for row, rank in zip(sampled, step.batch.ranks, strict=True)]

    def collect_read(self, step: InFlight) -> np.ndarray:
        """Wait for what a step of a model without output tokens gives: f32[ranks, R, O]."""
        return np.asarray(step.results)

    def close(self) -> None:
        """Free the arrays on the device; nothing can be dispatched afterwards."""
        for array in jax.tree.leaves((self.params, self._caches, self._state)):
            array.delete()
        self._steps.clear()

    def pack(self, batch: Batch) -> np.ndarray:
        """A batch as `i32[ranks, layout.size]`."""
        layout = self._layouts[batch.bucket]
        packed = np.zeros((self.num_ranks, layout.size), np.int32)
        for vector, rows, columns in zip(packed, batch.ranks, self._slot_columns, strict=True):
            fill_rank(layout, vector, rows, columns)
        return packed
