"""Ragged paged attention on Hopper GPUs (compute capability 9.0): rows of one new token.

The keys of all rows, one row behind the other, are cut into pieces of equal length, one for each
program, and all programs are at work at once; what of a piece belongs to one row is an item. One
warpgroup does all of it: the tensor memory accelerator fills a ring of blocks, keys and values of a
page side by side by one copy, and a block's place is filled anew as soon as it has been used.
Reading the cache is what takes the time, so several programs share a multiprocessor: while one
computes, others wait for memory. All query heads of a kv head are multiplied at once; the rest of
the 64 rows that the matrix instruction takes is not looked at.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper_blocks import ALIGNMENT, ROWS, swizzled
from pallas_kernels.ragged_paged_attention.hopper_parts import (
    LOG2_E,
    LOWEST,
    SUMS,
    Layouts,
    refuse_attention,
    rescaled,
    softmax,
)

STATISTICS = 8  # Columns behind a head's outputs: the first half its maximum, the others its sum.


@dataclass(frozen=True)
class DecodeConfig:
    """What may be tuned without changing the result.

    keys: per step, a multiple of 64. stages: blocks of keys and values in flight.
    programs: thread blocks, as many as run at once, for all kv heads together.
    """

    keys: int = 64
    stages: int = 2
    programs: int = 264

    def shared_memory_bytes(self, head_dim: int, itemsize: int) -> int:
        """Of one thread block, barriers aside; outputs take the place of what they come from."""
        inputs = (ROWS + 2 * self.stages * self.keys) * head_dim * itemsize
        return max(inputs, ROWS * (head_dim + STATISTICS) * 4)


def default_config(head_dim: int, group: int) -> DecodeConfig:
    """Parameters for a head dim and a number of query heads per kv head."""
    del group  # Up to 64 take the same time.
    if head_dim <= 64:
        return DecodeConfig(stages=3, programs=396)
    if head_dim <= 128:
        return DecodeConfig()
    return DecodeConfig(stages=3 if head_dim <= 192 else 2, programs=132)


class Items(NamedTuple):
    """What programs do, the same for every kv head.

    fields: i32[items, 4] of row, first key, end of the keys, tokens of the row.
    firsts: i32[pieces + 1], the first item of each piece, and where the last piece ends.
    spans: i32[R, 2], each row's first item and how many it has.
    """

    fields: jax.Array
    firsts: jax.Array
    spans: jax.Array


def make_items(
    kv_lens: jax.Array,
    distribution: jax.Array,
    *,
    num_kv_heads: int,
    window: int | None,
    config: DecodeConfig,
) -> Items:
    """Cut the keys of the rows [0, distribution[0]), which have one new token each."""
    keys, num_rows = config.keys, kv_lens.shape[0]
    pieces = max(1, config.programs // num_kv_heads)
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    lens = jnp.where(rows < distribution[0], kv_lens, 0)
    first_key = jnp.zeros_like(lens)
    if window is not None:
        first_key = jnp.maximum(lens - window, 0) // keys * keys
    blocks = -(-(lens - first_key) // keys)
    stops = jnp.cumsum(blocks, dtype=jnp.int32)
    starts = stops - blocks
    size = jnp.maximum(1, -(-stops[-1] // pieces))  # blocks of a piece
    first_piece = starts // size
    counts = jnp.where(blocks > 0, (stops - 1) // size - first_piece + 1, 0)
    ends = jnp.cumsum(counts, dtype=jnp.int32)

    ids = jnp.arange(num_rows + pieces, dtype=jnp.int32)
    row = jnp.searchsorted(ends, ids, side="right", method="compare_all").astype(jnp.int32)
    row = jnp.minimum(row, num_rows - 1)
    piece = first_piece[row] + ids - (ends - counts)[row]
    start = jnp.maximum(starts[row], piece * size)
    stop = jnp.minimum(stops[row], (piece + 1) * size)
    start, stop = (first_key[row] + (block - starts[row]) * keys for block in (start, stop))
    fields = jnp.stack([row, start, jnp.minimum(stop, lens[row]), lens[row]], 1)
    piece = jnp.where(ids < ends[-1], piece, pieces)
    number = jnp.arange(pieces + 1, dtype=jnp.int32)
    firsts = (piece[None] < number[:, None]).sum(1, dtype=jnp.int32)
    return Items(fields, firsts, jnp.stack([ends - counts, counts], 1))


def decode(
    q: jax.Array,
    cache: jax.Array,
    items: Items,
    page_table: jax.Array,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    config: DecodeConfig | None = None,
    interpret: Any = None,
) -> jax.Array:
    """Attention of single tokens, row r's being q[r], over each item's keys.

    q: [T, N, H]; cache: [num_pages, K, page_size, 2H], see `layout`; items: made for this config.
    `interpret` is passed to the kernel, for tests.

    Returns f32[items, N, H + STATISTICS]: outputs before the division by the sum, maxima (base 2)
    and sums; unused items hold anything.

    Raises NotImplementedError for what it does not do.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_pages, num_kv_heads, page_size, _ = cache.shape
    if config is None:
        config = default_config(head_dim, num_heads // num_kv_heads)
    _check(q, cache, scale, config)

    width, num_items = head_dim + STATISTICS, items.fields.shape[0]
    copies = config.keys // min(page_size, config.keys)
    kernel = plgpu.kernel(
        functools.partial(
            _kernel,
            config=config,
            num_kv_heads=num_kv_heads,
            group=num_heads // num_kv_heads,
            scale=scale,
            window=window,
            softcap=softcap,
            interpret=interpret is not None,
        ),
        out_type=jax.ShapeDtypeStruct((num_items * num_heads, width), jnp.float32),
        scratch_types={
            "query_ready": plgpu.Barrier(num_arrivals=1),
            "pages_ready": plgpu.Barrier(num_arrivals=copies, num_barriers=config.stages),
        },
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,  # Each row is reduced within a warp.
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        grid=((items.firsts.size - 1) * num_kv_heads,),
        grid_names=("program",),
        **({} if interpret is None else {"interpret": interpret}),
    )
    out = kernel(
        q.reshape(num_tokens * num_heads, head_dim),
        cache.reshape(num_pages * num_kv_heads, page_size, 2 * head_dim),
        # Computed, as are the items: the kernel needs its inputs at multiples of 256 bytes, and XLA
        # gives it a slice of a larger array, as the metadata may be, where it lies.
        jnp.maximum(page_table, 0) * num_kv_heads,
        items.fields,
        items.firsts,
    )
    return out.reshape(num_items, num_heads, width)


def _check(q: jax.Array, cache: jax.Array, scale: float, config: DecodeConfig) -> None:
    """Refuse what the kernel does not do."""
    num_tokens, num_heads, head_dim = q.shape
    group, queries = num_heads // cache.shape[1], num_tokens * num_heads
    refuse_attention(
        "hopper_decode.decode",
        q,
        cache,
        keys=config.keys,
        scale=scale,
        shared_memory_bytes=config.shared_memory_bytes(head_dim, 2),
        further={
            f"{group} query heads per kv head": _copied(group) > ROWS,
            f"{queries} queries, no multiple of {ALIGNMENT} or fewer than it copies": (
                queries % ALIGNMENT != 0 or queries < _copied(group)
            ),
        },
    )


def _copied(group: int) -> int:
    """Queries that are copied to have `group` of them: whole swizzle atoms, wherever they start."""
    most_before = ALIGNMENT - math.gcd(group, ALIGNMENT)
    return -(-(most_before + group) // ALIGNMENT) * ALIGNMENT


def _kernel(
    q_ref,
    cache_ref,
    first_heads_ref,
    items_ref,
    firsts_ref,
    out_ref,
    *,
    query_ready,
    pages_ready,
    config: DecodeConfig,
    num_kv_heads: int,
    group: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    interpret: bool,
):
    keys, stages = config.keys, config.stages
    _, page_size, pair_width = cache_ref.shape
    head_dim = pair_width // 2
    num_heads = num_kv_heads * group
    unit = min(page_size, keys)
    dtype = q_ref.dtype
    program = lax.axis_index("program")
    piece, kv_head = lax.div(program, num_kv_heads), lax.rem(program, num_kv_heads)
    log2_scale = (scale if softcap is None else softcap) * LOG2_E
    transforms, layouts = swizzled(dtype), Layouts(interpret)

    def product(shape, start, a, b):
        """start + a @ b, or a @ b for None. The interpreter has no matrix instructions."""
        if interpret:
            result = jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)
            return result if start is None else start + result

        def multiply(accumulator):
            if start is not None:
                accumulator[...] = start
            plgpu.wgmma(accumulator, a, b)
            return plgpu.wgmma_accumulator_load(accumulator, wait_n=0)

        return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))

    def transposed(ref):
        return ref[...].T if interpret else ref.transpose((1, 0))

    def first_query(row):
        """Where the queries begin: a place that is copied from, and how many others precede them.

        Mosaic cuts an array into swizzle atoms before it copies, and what of one lies before the
        place is not filled up from the next.
        """
        first = row * num_heads + kv_head * group
        before = lax.rem(first, ALIGNMENT)
        return first - before, before

    def attend(query, pages, *, item):
        """Outputs f32[64, H], maxima f32[64] and sums f32[64] of an item.

        query: [64, H]; pages: [stages, keys, 2H], keys and values.
        """
        row, start, stop, kv_len = item
        blocks = lax.div(stop - start + keys - 1, keys)
        last_column = lax.div(kv_len - 1, page_size)

        def pages_of(number):
            columns = [
                jnp.minimum(lax.div(start + number * keys + i, page_size), last_column)
                for i in range(0, keys, unit)
            ]
            return [first_heads_ref[row, column] + kv_head for column in columns]

        def fetch(number, indices):
            slot = lax.rem(number, stages)
            offset = 0 if unit == page_size else lax.rem(start + number * keys, page_size)
            for i, page in enumerate(indices):
                plgpu.copy_gmem_to_smem(
                    cache_ref.at[page, pl.ds(offset, unit)],
                    pages.at[slot, pl.ds(i * unit, unit)],
                    pages_ready.at[slot],
                )

        def weigh(s, m, total, base, masked):
            if softcap is not None:
                s = jnp.tanh(s * (scale / softcap))
            if masked:
                key = layouts.iota(s.shape, 1) + base
                visible = key < stop
                if window is not None:
                    visible &= key >= kv_len - window
                s = jnp.where(visible, s, -jnp.inf)
            p, m, total, alpha = softmax(s, m, total, log2_scale)
            return p.astype(dtype), m, total, alpha

        def clean(values, count):
            """Zero the values from `count` on: what nobody wrote may be NaN, and 0 * NaN is NaN."""
            for first in range(0, keys, ROWS):

                @pl.when(count < first + ROWS)
                def _(first=first):
                    rows = values.at[pl.ds(first, ROWS)]
                    kept = layouts.iota((ROWS, head_dim), 0) < count - first
                    rows[...] = jnp.where(kept, rows[...], jnp.zeros((), dtype))

            plgpu.commit_smem()

        def block(number, state, last):
            o, m, total = state
            slot = lax.rem(number, stages)
            base = start + number * keys
            next_pages = [] if last else pages_of(number + stages)
            plgpu.barrier_wait(pages_ready.at[slot])
            values = pages.at[slot, :, pl.ds(head_dim, head_dim)]
            s = product(
                (ROWS, keys), None, query, transposed(pages.at[slot, :, pl.ds(0, head_dim)])
            )
            p, m, total, alpha = weigh(s, m, total, base, last or window is not None)
            if last:

                @pl.when(kv_len < base + keys)
                def _():
                    clean(values, kv_len - base)

            o = product((ROWS, head_dim), rescaled(o, alpha), p, values)
            if not last:
                plgpu.commit_smem()  # All warps are done with the slot.

                @pl.when(number + stages < blocks)
                def _():
                    fetch(number + stages, next_pages)

            return o, m, total

        first_pages = [pages_of(number) for number in range(stages)]
        copied = _copied(group)
        plgpu.copy_gmem_to_smem(
            q_ref.at[pl.ds(first_query(row)[0], copied)],
            query.at[pl.ds(0, copied)],
            query_ready,
        )
        for number, indices in enumerate(first_pages):

            @pl.when(number < blocks)
            def _(number=number, indices=indices):
                fetch(number, indices)

        state = (
            layouts.cast(jnp.zeros((ROWS, head_dim), jnp.float32), plgpu.Layout.WGMMA),
            layouts.cast(jnp.full((ROWS,), LOWEST, jnp.float32), plgpu.Layout.WGMMA.reduce(1)),
            layouts.cast(jnp.zeros((ROWS, SUMS), jnp.float32), plgpu.Layout.WGMMA),
        )
        plgpu.barrier_wait(query_ready)
        state = lax.fori_loop(0, blocks - 1, functools.partial(block, last=False), state)
        o, m, total = block(blocks - 1, state, last=True)
        return o, m, total.sum(axis=1)

    def write(rows, *, o, m, total, before, target):
        """Put the group's rows, which have `before` others before them, to out_ref[target:]."""
        shape = (ROWS, STATISTICS)
        statistics = jnp.where(
            layouts.iota(shape, 1) < STATISTICS // 2,
            lax.broadcast_in_dim(m, shape, [0]),
            lax.broadcast_in_dim(total, shape, [0]),
        )
        plgpu.commit_smem()  # All warps are done with what was here.
        layouts.store_plainly(rows.at[:, pl.ds(0, head_dim)], o)
        layouts.store_plainly(rows.at[:, pl.ds(head_dim, STATISTICS)], statistics)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(rows.at[pl.ds(before, group)], out_ref.at[pl.ds(target, group)])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    last_item = items_ref.shape[0] - 1

    def load_item(index):
        return tuple(items_ref[jnp.minimum(index, last_item), i] for i in range(4))

    def step(index, item):
        next_item = load_item(index + 1)
        o, m, total = pl.run_scoped(
            functools.partial(attend, item=item),
            plgpu.SMEM((ROWS, head_dim), dtype, transforms=transforms),
            plgpu.SMEM((stages, keys, 2 * head_dim), dtype, transforms=transforms),
        )
        _, before = first_query(item[0])
        target = index * num_heads + kv_head * group
        pl.run_scoped(
            functools.partial(write, o=o, m=m, total=total, before=before, target=target),
            plgpu.SMEM((ROWS, head_dim + STATISTICS), jnp.float32),
        )
        return next_item

    first = firsts_ref[piece]
    lax.fori_loop(first, firsts_ref[piece + 1], step, load_item(first))
