"""Ragged paged attention on Hopper GPUs (compute capability 9.0): rows of several new tokens.

The schedule is that of FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608), applied to pages:
one warpgroup copies pages into a ring of key and value blocks with the tensor memory accelerator,
each of its warps a part of them, two others compute, each on 64 queries. The product of a block's
keys is started before the one of the last block's values, and while one warpgroup is in its softmax
the other multiplies. Two thread blocks (a cluster) take neighbouring heads of the same kv head;
each copies half of its keys and values into the shared memory of both.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper_blocks import ALIGNMENT, ROWS, SWIZZLE_BYTES, swizzled
from pallas_kernels.ragged_paged_attention.hopper_parts import (
    LOG2_E,
    LOWEST,
    SUMS,
    Layouts,
    refuse_attention,
    rescaled,
    softmax,
)

_COMPUTE_WARPGROUPS = 2
_REGISTERS = 65536  # Of one multiprocessor.


@dataclass(frozen=True)
class PrefillConfig:
    """What may be tuned without changing the result.

    heads_per_tile: query heads of one kv head that share a tile of 128 queries, a power of two;
        1 makes tiles of 128 tokens, 2 of 64 tokens and two heads, and so on.
    block_kv: keys per step, a multiple of 64.
    stages: key and value blocks in flight.
    query_stages: tiles of queries in shared memory; 2 fetches the next while one is computed.
    take_turns: whether the two compute warpgroups alternate between products and softmax.
    num_programs: thread blocks, each taking tiles in turn; None starts one for every tile.
    cluster: thread blocks that take tiles of the same tokens and kv head together, each copying
        its share of the keys and values to all of them.
    compute_registers, copy_registers: per thread of each kind of warpgroup, multiples of 8.
    """

    heads_per_tile: int = 2
    block_kv: int = 128
    stages: int = 2
    query_stages: int = 2
    take_turns: bool = False
    num_programs: int | None = 132
    cluster: int = 1
    compute_registers: int = 240
    copy_registers: int = 24

    @property
    def tile_tokens(self) -> int:
        """Tokens of a tile."""
        return _COMPUTE_WARPGROUPS * ROWS // self.heads_per_tile

    @property
    def copy_tokens(self) -> int:
        """Tokens of one head that lie together in a warpgroup's queries."""
        return min(ROWS, self.tile_tokens)

    def shared_memory_bytes(self, head_dim: int, itemsize: int) -> int:
        """Of one thread block, barriers aside."""
        rows = 2 * self.stages * self.block_kv + self.query_stages * _COMPUTE_WARPGROUPS * ROWS
        return rows * head_dim * itemsize + _COMPUTE_WARPGROUPS * ROWS * SWIZZLE_BYTES


def default_config(head_dim: int, group: int) -> PrefillConfig:
    """Parameters for a head dim and a number of query heads per kv head."""
    heads_per_tile = 2 if group % 2 == 0 else 1
    cluster = 2 if group % (2 * heads_per_tile) == 0 else 1
    if head_dim <= 128:
        return PrefillConfig(heads_per_tile, cluster=cluster)
    return PrefillConfig(heads_per_tile, block_kv=64, query_stages=1, cluster=cluster)


class Tiles(NamedTuple):
    """Tiles of queries, most work first; those from `count` on are empty.

    fields: i32[num_tiles, 8] of row, first token, first and last + 1 live token relative to it,
        position of the first token, first key position, number of key blocks, tokens of the row.
    count: i32[1].
    """

    fields: jax.Array
    count: jax.Array


_ROW, _TOKEN, _LOW, _HIGH, _POSITION, _KEY, _BLOCKS, _KV_LEN = range(8)


def make_tiles(
    kv_lens: jax.Array,
    query_starts: jax.Array,
    distribution: jax.Array,
    num_tokens: int,
    *,
    tile_tokens: int,
    block_kv: int,
    key_alignment: int,
    window: int | None,
) -> Tiles:
    """Cut the tokens of rows [distribution[0], distribution[2]) into tiles of one row each.

    A tile starts at a multiple of 8 tokens, which may lie before its row's first token.
    """
    num_rows = kv_lens.shape[0]
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    starts, ends = query_starts[:-1], query_starts[1:]
    live = (rows >= distribution[0]) & (rows < distribution[2]) & (ends > starts)
    aligned = starts // ALIGNMENT * ALIGNMENT
    counts = jnp.where(live, -(-(ends - aligned) // tile_tokens), 0)
    past = jnp.cumsum(counts)
    # A row of n tokens has at most (n + 7 + tile_tokens - 1) / tile_tokens tiles.
    busy_rows = min(num_rows, num_tokens)
    num_tiles = (num_tokens + busy_rows * (tile_tokens + ALIGNMENT - 2)) // tile_tokens
    tiles = jnp.arange(num_tiles, dtype=jnp.int32)
    row = jnp.searchsorted(past, tiles, side="right", method="compare_all").astype(jnp.int32)
    row = jnp.minimum(row, num_rows - 1)
    token = aligned[row] + (tiles - past[row] + counts[row]) * tile_tokens
    low = jnp.maximum(starts[row] - token, 0)
    high = jnp.minimum(ends[row] - token, tile_tokens)
    position = kv_lens[row] - ends[row] + token
    key = jnp.zeros_like(position)
    if window is not None:
        key = jnp.maximum(position + low - window + 1, 0) // key_alignment * key_alignment
    blocks = -(-(position + high - key) // block_kv)
    blocks = jnp.where(tiles < past[-1], blocks, 0)
    fields = jnp.stack([row, token, low, high, position, key, blocks, kv_lens[row]], 1)
    earlier = (blocks[None] > blocks[:, None]) | (
        (blocks[None] == blocks[:, None]) & (tiles[None] < tiles[:, None])
    )
    order = earlier.sum(1, dtype=jnp.int32)
    fields = jnp.zeros_like(fields).at[order].set(fields, unique_indices=True)
    return Tiles(fields, counts.sum(keepdims=True, dtype=jnp.int32))


def prefill(
    q: jax.Array,
    cache: jax.Array,
    kv_lens: jax.Array,
    page_table: jax.Array,
    query_starts: jax.Array,
    distribution: jax.Array,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    config: PrefillConfig | None = None,
    interpret: Any = None,
) -> jax.Array:
    """Attention of the rows [distribution[0], distribution[2]) over a cache that holds their keys.

    q: [T, N, H]; cache: [num_pages, K, page_size, 2H], see `layout`; the rest as in
    `api.ragged_paged_attention`. Returns [T, N, H]; tokens of no such row hold anything.
    `interpret` is passed to the kernel, for tests.

    Raises NotImplementedError for what it does not do.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_pages, num_kv_heads, page_size, _ = cache.shape
    group = num_heads // num_kv_heads
    if config is None:
        config = default_config(head_dim, group)
    if interpret is not None:  # The interpreter has no clusters.
        config = replace(config, cluster=1)
    _check(q, cache, scale, config)

    unit = min(page_size, config.block_kv)
    tiles = make_tiles(
        kv_lens,
        query_starts,
        distribution,
        num_tokens,
        tile_tokens=config.tile_tokens,
        block_kv=config.block_kv,
        key_alignment=unit,
        window=window,
    )
    # The kernel needs its inputs at multiples of 256 bytes, and XLA gives it a slice of a larger
    # array, as the metadata may be, where it lies. So everything passed on is computed here; the
    # maximum sees to it that there is something to compute.
    first_heads = jnp.maximum(page_table, 0) * num_kv_heads
    most_items = tiles.fields.shape[0] * num_heads // (config.heads_per_tile * config.cluster)
    wanted = most_items if config.num_programs is None else config.num_programs // config.cluster
    num_programs = min(wanted, most_items)

    transforms = swizzled(q.dtype)
    keys = (config.stages, config.block_kv, head_dim)
    columns = SWIZZLE_BYTES // q.dtype.itemsize
    copies = config.block_kv // unit
    barriers = {
        "query_ready": (max(config.heads_per_tile, _COMPUTE_WARPGROUPS), config.query_stages),
        "query_free": (_COMPUTE_WARPGROUPS, config.query_stages),
        "keys_ready": (copies, config.stages),
        "values_ready": (copies, config.stages),
        "turn": (1, _COMPUTE_WARPGROUPS),
        "cleaned": (_COMPUTE_WARPGROUPS, 1),
    }
    free, clusters = plgpu.Barrier, {}
    if config.cluster > 1:
        free = functools.partial(plgpu.ClusterBarrier, collective_axes=("share",))
        clusters = {"cluster": (config.cluster,), "cluster_names": ("share",)}
    kernel = plgpu.kernel(
        functools.partial(
            _kernel,
            config=config,
            num_programs=num_programs,
            num_kv_heads=num_kv_heads,
            scale=scale,
            window=window,
            softcap=softcap,
            interpret=interpret is not None,
        ),
        out_type=jax.ShapeDtypeStruct((num_tokens, num_heads * head_dim), q.dtype),
        scratch_types={
            "query_smem": plgpu.SMEM(
                (config.query_stages, _COMPUTE_WARPGROUPS, ROWS, head_dim),
                q.dtype,
                transforms=transforms,
            ),
            "keys_smem": plgpu.SMEM(keys, q.dtype, transforms=transforms),
            "values_smem": plgpu.SMEM(keys, q.dtype, transforms=transforms),
            "rows_smem": plgpu.SMEM((_COMPUTE_WARPGROUPS, ROWS, columns), q.dtype),
            **{
                name: plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)
                for name, (arrivals, count) in barriers.items()
            },
            **{
                name: free(num_arrivals=_COMPUTE_WARPGROUPS, num_barriers=config.stages)
                for name in ("keys_free", "values_free")
            },
        },
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        grid=(num_programs,),
        grid_names=("program",),
        **clusters,
        num_threads=_COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        **({} if interpret is None else {"interpret": interpret}),
    )
    out = kernel(
        q.reshape(num_tokens, num_heads * head_dim),
        cache.reshape(num_pages * num_kv_heads, page_size, 2 * head_dim),
        first_heads,
        tiles.fields,
        tiles.count,
    )
    return out.reshape(q.shape)


def _check(q: jax.Array, cache: jax.Array, scale: float, config: PrefillConfig) -> None:
    """Refuse what the kernel does not do."""
    num_tokens, num_heads, head_dim = q.shape
    group = num_heads // cache.shape[1]
    registers = 128 * (_COMPUTE_WARPGROUPS * config.compute_registers + config.copy_registers)
    refuse_attention(
        "hopper.prefill",
        q,
        cache,
        keys=config.block_kv,
        scale=scale,
        shared_memory_bytes=config.shared_memory_bytes(head_dim, 2),
        further={
            f"{group} query heads per kv head in tiles of {config.heads_per_tile}": (
                group % config.heads_per_tile != 0 or config.heads_per_tile not in (1, 2, 4, 8, 16)
            ),
            f"{num_tokens} tokens, no multiple of {ALIGNMENT} or fewer than {config.tile_tokens}": (
                num_tokens % ALIGNMENT != 0 or num_tokens < config.tile_tokens
            ),
            f"{group} query heads per kv head in clusters of {config.cluster}": (
                group % (config.heads_per_tile * config.cluster) != 0
            ),
            f"{registers} registers": registers > _REGISTERS,
        },
    )


def _kernel(
    q_ref,
    cache_ref,
    first_heads_ref,
    fields_ref,
    count_ref,
    out_ref,
    *,
    query_smem,
    keys_smem,
    values_smem,
    rows_smem,
    query_ready,
    query_free,
    keys_ready,
    keys_free,
    values_ready,
    values_free,
    turn,
    cleaned,
    config: PrefillConfig,
    num_programs: int,
    num_kv_heads: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    interpret: bool,
):
    _, _, _, head_dim = query_smem.shape
    block_kv, stages, query_stages = config.block_kv, config.stages, config.query_stages
    page_size = cache_ref.shape[1]
    num_heads = q_ref.shape[1] // head_dim
    group = num_heads // num_kv_heads
    item_heads = config.heads_per_tile * config.cluster
    tile_items = num_heads // item_heads
    unit = min(page_size, block_kv)
    dtype = q_ref.dtype
    chunk = config.copy_tokens
    chunks = ROWS // chunk  # Heads of one warpgroup.
    program = lax.axis_index("program")
    share_axis = "share" if config.cluster > 1 else None
    share_heads = lax.axis_index("share") * config.heads_per_tile if share_axis else 0
    warpgroup = lax.axis_index("warpgroup")

    layouts = Layouts(interpret)

    def in_order(x):
        """Keep x, and what is computed from it, where it is among waits, which x does not name."""
        return x if interpret else lax.optimization_barrier(x)

    def for_each_item(body):
        """body(index, tile, first head, key blocks before) for this program's items, in order.

        Returns how many items and blocks there were.
        """
        items = count_ref[0] * tile_items
        rounds, rest = lax.div(items, num_programs), lax.rem(items, num_programs)

        def place(index):  # To and fro, so that no program always gets the heaviest.
            return jnp.where(lax.rem(index, 2) == 0, program, num_programs - 1 - program)

        def step(index, done):
            item = index * num_programs + place(index)
            tile = lax.div(item, tile_items)
            body(index, tile, lax.rem(item, tile_items) * item_heads + share_heads, done)
            return done + fields_ref[tile, _BLOCKS]

        rounds += (place(rounds) < rest).astype(jnp.int32)
        return rounds, lax.fori_loop(0, rounds, step, jnp.int32(0))

    def chunk_origin(compute_warpgroup, index):
        """Head and token of the tile that a warpgroup's chunk of rows starts at."""
        if config.heads_per_tile == 1:
            return 0, compute_warpgroup * ROWS
        return compute_warpgroup * chunks + index, 0

    def copy_pages(blocks_of, share, with_queries):
        """Fill rings of blocks, and of tiles of queries where asked for.

        blocks_of: of each ring to fill, its memory, its barriers, and the column to copy from.
        share: (index, count); of a block's pages every `count`-th is copied, from `index` on.
        """

        def item(index, tile, first_head, done):
            row, token = fields_ref[tile, _ROW], fields_ref[tile, _TOKEN]
            key, blocks = fields_ref[tile, _KEY], fields_ref[tile, _BLOCKS]
            last_column = lax.div(fields_ref[tile, _KV_LEN] - 1, page_size)
            kv_head = lax.div(first_head, group)
            mine = range(share[0], block_kv // unit, share[1])
            if with_queries:
                copy_queries(index, token, first_head)

            def pages_of(number):
                """Where the pages of a block's keys begin; looked up before they are needed."""
                base = key + number * block_kv
                columns = [
                    jnp.minimum(lax.div(base + i * unit, page_size), last_column) for i in mine
                ]
                return tuple(first_heads_ref[row, column] + kv_head for column in columns)

            def block(number, pages):
                step = done + number
                slot = lax.rem(step, stages)
                next_pages = pages_of(number + 1)
                base = key + number * block_kv
                offset = 0 if unit == page_size else lax.rem(base, page_size)
                for smem, ready, free, first in blocks_of:

                    @pl.when(step >= stages)
                    def _(free=free):
                        plgpu.barrier_wait(free.at[slot])

                    for i, page in zip(mine, pages, strict=True):
                        plgpu.copy_gmem_to_smem(
                            cache_ref.at[page, pl.ds(offset, unit), pl.ds(first, head_dim)],
                            smem.at[slot, pl.ds(i * unit, unit)],
                            ready.at[slot],
                            collective_axes=share_axis,
                        )
                return next_pages

            lax.fori_loop(0, blocks, block, pages_of(0))

        def drain(count, slots, barrier):
            """Wait until the last `slots` of `count` uses are over."""

            def use(index, _):
                plgpu.barrier_wait(barrier.at[lax.rem(index, slots)])

            lax.fori_loop(jnp.maximum(count - slots, 0), count, use, None)

        num_items, num_blocks = for_each_item(item)
        if with_queries:
            drain(num_items, query_stages, query_free)
        for _, _, free, _ in blocks_of:
            drain(num_blocks, stages, free)

    def copy_queries(index, token, first_head):
        slot = lax.rem(index, query_stages)

        @pl.when(index >= query_stages)
        def _():
            plgpu.barrier_wait(query_free.at[slot])

        for compute_warpgroup in range(_COMPUTE_WARPGROUPS):
            for i in range(chunks):
                head, offset = chunk_origin(compute_warpgroup, i)
                plgpu.copy_gmem_to_smem(
                    q_ref.at[
                        pl.ds(token + offset, chunk),
                        pl.ds((first_head + head) * head_dim, head_dim),
                    ],
                    query_smem.at[slot, compute_warpgroup, pl.ds(i * chunk, chunk)],
                    query_ready.at[slot],
                )

    def copy():
        """Every warp copies on its own: half of a block's keys, or half of its values."""
        keys = keys_smem, keys_ready, keys_free, 0
        values = values_smem, values_ready, values_free, head_dim
        if interpret:  # It has no warps.
            copy_pages((keys, values), (0, 1), True)
            return
        halves = min(2, block_kv // unit)

        @plgpu.warp_map
        def _(warp):
            for number in range(2 * halves):
                ring, index = divmod(number, halves)

                @pl.when(warp == number)
                def _(ring=ring, index=index):
                    copy_pages(((keys, values)[ring],), (index, halves), ring + index == 0)

    def compute():
        log2_scale = (scale if softcap is None else softcap) * LOG2_E
        row_layout = plgpu.Layout.WGMMA.reduce(1)

        def item(index, tile, first_head, done):
            token = fields_ref[tile, _TOKEN]
            low, high = fields_ref[tile, _LOW], fields_ref[tile, _HIGH]
            position, key = fields_ref[tile, _POSITION], fields_ref[tile, _KEY]
            blocks = fields_ref[tile, _BLOCKS]
            kv_len = fields_ref[tile, _KV_LEN]
            query_slot = lax.rem(index, query_stages)
            query = query_smem.at[query_slot, warpgroup]
            first_row = warpgroup * ROWS if config.heads_per_tile == 1 else 0

            def await_keys(number):
                @pl.when(number < blocks)
                def _():
                    plgpu.barrier_wait(keys_ready.at[lax.rem(done + number, stages)])

            # The interpreter has neither stores to accumulators nor operands in registers, and the
            # one of JAX 0.10 no transposed operands: there, a product is done where it starts.
            def start_scores(scores, slot):
                """Start query @ keys.T in `scores`; returns what finish_scores takes."""
                keys = keys_smem.at[slot]
                if interpret:
                    return jnp.dot(query[...], keys[...].T, preferred_element_type=jnp.float32)
                plgpu.wgmma(scores, query, keys.transpose((1, 0)))
                return scores

            def finish_scores(scores, slot, wait_n):
                if interpret:
                    s = scores
                else:
                    s = in_order(plgpu.wgmma_accumulator_load(scores, wait_n=wait_n))
                plgpu.barrier_arrive(keys_free.at[slot])
                return s

            # Blocks [free, masked) are seen whole by every query of the tile.
            free = 0
            masked = lax.div(jnp.maximum(position + low + 1 - key, 0), block_kv)
            if window is not None:
                hidden = jnp.maximum(position + high - window - key, 0)
                free = lax.div(hidden + block_kv - 1, block_kv)

            def weigh(s, m, total, number):
                if softcap is not None:
                    s = jnp.tanh(s * (scale / softcap))

                def mask(s):
                    queries, keys = layouts.iota(s.shape, 0), layouts.iota(s.shape, 1)
                    if chunks > 1:
                        queries = queries & (chunk - 1)
                    last = queries + (position + first_row - key - number * block_kv)
                    visible = keys <= last
                    if window is not None:
                        visible &= keys > last - window
                    return jnp.where(visible, s, -jnp.inf)

                partly = (number < free) | (number >= masked)
                return softmax(lax.cond(partly, mask, lambda s: s, s), m, total, log2_scale)

            def take_turn():
                if config.take_turns:
                    plgpu.barrier_wait(turn.at[warpgroup])

            def end_turn():
                if config.take_turns:
                    plgpu.barrier_arrive(turn.at[1 - warpgroup])

            def start_product(out, o, p, values):
                """Start o + p @ values in `out`; returns what finish_product takes."""
                if interpret:
                    return o + jnp.dot(p, values[...], preferred_element_type=jnp.float32)
                out[...] = o
                plgpu.wgmma(out, p, values)
                return out

            def finish_product(out):
                return out if interpret else plgpu.wgmma_accumulator_load(out, wait_n=0)

            scores_type = plgpu.WGMMAAccumulatorRef((ROWS, block_kv), jnp.float32)
            out_type = plgpu.WGMMAAccumulatorRef((ROWS, head_dim), jnp.float32)

            plgpu.barrier_wait(query_ready.at[query_slot])
            m = layouts.cast(jnp.full((ROWS,), LOWEST, jnp.float32), row_layout)
            total = layouts.cast(jnp.zeros((ROWS, SUMS), jnp.float32), plgpu.Layout.WGMMA)
            o = layouts.cast(jnp.zeros((ROWS, head_dim), jnp.float32), plgpu.Layout.WGMMA)

            def first_scores(scores):
                slot = lax.rem(done, stages)
                plgpu.barrier_wait(keys_ready.at[slot])
                scores = start_scores(scores, slot)
                if query_stages > 1:
                    pl.when(index > 0)(lambda: finish_store(index - 1))
                return finish_scores(scores, slot, 0)

            s = pl.run_scoped(first_scores, scores_type)
            p, m, total = weigh(s, m, total, 0)[:3]
            p = p.astype(dtype)
            await_keys(1)

            def block(number, carry):
                o, m, total, p = carry

                def products(scores, out):
                    if not interpret:
                        out[...] = o
                    key_slot = lax.rem(done + number, stages)
                    slot = lax.rem(done + number - 1, stages)
                    take_turn()
                    scores = start_scores(scores, key_slot)
                    plgpu.barrier_wait(values_ready.at[slot])
                    out = start_product(out, o, p, values_smem.at[slot])
                    end_turn()
                    s = finish_scores(scores, key_slot, 1)
                    new_p, new_m, new_total, alpha = in_order(weigh(s, m, total, number))
                    # A branch: without one ptxas moves the softmax behind the wait below.
                    await_keys(number + 1)
                    # The product reads p until it is awaited, so the next p starts after that.
                    new_o, new_p = in_order((finish_product(out), new_p))
                    plgpu.barrier_arrive(values_free.at[slot])
                    return rescaled(new_o, alpha), new_m, new_total, new_p.astype(dtype)

                return pl.run_scoped(products, scores_type, out_type)

            o, m, total, p = lax.fori_loop(1, blocks, block, (o, m, total, p))

            slot = lax.rem(done + blocks - 1, stages)
            values = values_smem.at[slot]
            plgpu.barrier_wait(values_ready.at[slot])
            rest = kv_len - (key + (blocks - 1) * block_kv)

            @pl.when(rest < block_kv)
            def _():
                clean(values, rest)

            def last_product(out):
                return finish_product(start_product(out, o, p, values))

            o = pl.run_scoped(last_product, out_type)
            plgpu.barrier_arrive(values_free.at[slot])
            o = rescaled(o, 1.0 / total.sum(axis=1)).astype(dtype)
            store(o, query, first_head, token, low, high)
            if query_stages == 1:
                finish_store(index)

        def finish_store(index):
            """Let the queries' memory go, which outputs are stored from."""
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(query_free.at[lax.rem(index, query_stages)])

        def clean(values, count):
            """Zero the values from `count` on: what nobody wrote may be NaN, and 0 * NaN is NaN."""
            for first in range(0, block_kv, ROWS):
                mine = warpgroup == first // ROWS % _COMPUTE_WARPGROUPS

                @pl.when(mine & (count < first + ROWS))
                def _(first=first):
                    rows = values.at[pl.ds(first, ROWS)]
                    kept = layouts.iota((ROWS, head_dim), 0) < count - first
                    rows[...] = jnp.where(kept, rows[...], jnp.zeros((), dtype))

            plgpu.commit_smem()
            plgpu.barrier_arrive(cleaned.at[0])
            plgpu.barrier_wait(cleaned.at[0])

        def copy_rows(smem, gmem, start, count):
            """Copy `count` rows from `start` on, in powers of two: copies have a static size."""
            size = chunk
            while size:

                @pl.when((count & size) != 0)
                def _(start=start, size=size):
                    plgpu.copy_smem_to_gmem(
                        smem.at[pl.ds(start, size)], gmem.at[pl.ds(start, size)]
                    )

                start += count & size
                size //= 2

        def store(o, query, first_head, token, low, high):
            """Write the live rows of o; `query` is shared memory that is free by now."""
            whole = (low == 0) & (high == config.tile_tokens)

            def target(index, column, width):
                head, offset = chunk_origin(warpgroup, index)
                return token + offset, pl.ds((first_head + head) * head_dim + column, width)

            @pl.when(whole)
            def _():
                query[...] = o
                plgpu.commit_smem()
                for i in range(chunks):
                    first, columns = target(i, 0, head_dim)
                    plgpu.copy_smem_to_gmem(
                        query.at[pl.ds(i * chunk, chunk)],
                        out_ref.at[pl.ds(first, chunk), columns],
                    )

            @pl.when(jnp.logical_not(whole))
            def _():
                rows = rows_smem.at[warpgroup]
                width = rows_smem.shape[-1]
                for column in range(0, head_dim, width):
                    layouts.store_plainly(rows, o[:, column : column + width])
                    plgpu.commit_smem()
                    for i in range(chunks):
                        first, columns = target(i, column, width)
                        offset = chunk_origin(warpgroup, i)[1]
                        start = jnp.clip(low - offset, 0, chunk)
                        count = jnp.clip(high - offset, 0, chunk) - start
                        copy_rows(
                            rows.at[pl.ds(i * chunk, chunk)],
                            out_ref.at[pl.ds(first, chunk), columns],
                            start,
                            count,
                        )
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        if config.take_turns:

            @pl.when(warpgroup == 1)
            def _():
                plgpu.barrier_arrive(turn.at[0])

        num_items, _ = for_each_item(item)
        if query_stages > 1:
            pl.when(num_items > 0)(lambda: finish_store(num_items - 1))

        if config.take_turns:

            @pl.when(warpgroup == 0)
            def _():
                plgpu.barrier_wait(turn.at[0])

        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup < _COMPUTE_WARPGROUPS)
    def _():
        plgpu.set_max_registers(config.compute_registers, action="increase")
        compute()

    @pl.when(warpgroup == _COMPUTE_WARPGROUPS)
    def _():
        plgpu.set_max_registers(config.copy_registers, action="decrease")
        copy()
