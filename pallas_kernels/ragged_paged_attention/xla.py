"""Ragged paged attention in plain JAX, for CPUs and as the fallback everywhere.

Two loops whose trip counts are computed on the device, so that the cost follows the tokens in use
and not the pool, the page table or the bucket:

- rows with one token: their pages are laid end to end into one list of work items; each trip
  takes the next few items, whichever rows they belong to, and folds the partial softmax of each
  into its row's running (maximum, sum, output);
- other rows: one trip per tile of queries, and inside it one per block of keys that the tile can
  see, from the window's start to the causal limit.

A loop with nothing to do makes no trips. Pages are copied out before they are multiplied (XLA
cannot multiply in place through a page table), so a trip takes few enough to stay in the
last-level cache.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.ragged_paged_attention.block_sparse import BlockSparse
from pallas_kernels.ragged_paged_attention.layout import (
    num_pages_of,
    page_size_of,
    read_shared,
    read_slabs,
    shape_slabs,
    write_tokens,
)

_CHUNK_BYTES = 3 << 20  # Keys and values one trip of the one-token loop copies, at most.
_TILE_ROWS = 768  # Rows of a tile's matrix product (queries * group): fewer use only one core.
_TILE_MAX = 256  # Queries per tile, at most.
_SMALL_TILE = 64  # Queries per tile for what large tiles would fit badly.
_BLOCK = 256  # Keys per trip of a large tile, at most.
_SMALL_BLOCK = 64  # Keys per trip of a small tile.
_MASKED = -1e30  # Finite, so that a fully masked row makes no NaN.


class WorkItems(NamedTuple):
    """What a step has to do, per row: i32[R] each.

    pages: pages a row with one token reads. first_page: the first of them.
    tiles: query tiles of any other row. small_tiles: small ones that follow them.
    """

    pages: jax.Array
    first_page: jax.Array
    tiles: jax.Array
    small_tiles: jax.Array


def work_items(
    kv_lens: jax.Array,
    query_starts: jax.Array,
    distribution: jax.Array,
    *,
    page_size: int,
    tile: int,
    small_tile: int,
    window: int | None,
) -> WorkItems:
    """Count the work of a step; the loops take their trip counts from here.

    Tokens left over by whole tiles go to one more tile if they fill more than half of it, else
    to small ones. small_tile equal to tile: no small ones.
    """
    rows = jnp.arange(kv_lens.shape[0], dtype=jnp.int32)
    is_single = rows < distribution[0]
    is_other = ~is_single & (rows < distribution[2])
    first_seen = jnp.zeros_like(kv_lens) if window is None else jnp.maximum(kv_lens - window, 0)
    first_page = first_seen // page_size
    pages = jnp.where(is_single, _ceil_div(kv_lens, page_size) - first_page, 0)
    num_new = jnp.where(is_other, query_starts[1:] - query_starts[:-1], 0)
    tiles, left = num_new // tile, num_new % tile
    one_more = left > (0 if small_tile == tile else tile // 2)
    small_tiles = jnp.where(one_more, 0, _ceil_div(left, small_tile))
    return WorkItems(pages, first_page, tiles + one_more, small_tiles)


def tile_sizes(num_tokens: int, group: int) -> tuple[int, int]:
    """Queries per tile and per small tile for a step of num_tokens; equal: one size is enough."""
    tile = min(num_tokens, _TILE_MAX, max(_SMALL_TILE, _TILE_ROWS // group))
    return tile, _SMALL_TILE if tile >= 2 * _SMALL_TILE else tile


def tile_blocks(
    first_position: jax.Array, end_position: jax.Array, *, block: int, window: int | None
) -> tuple[jax.Array, jax.Array]:
    """Key blocks [first, end) seen by queries at positions [first_position, end_position)."""
    first = jnp.zeros_like(first_position)
    if window is not None:
        first = jnp.maximum(first_position - window + 1, 0) // block
    return first, _ceil_div(end_position, block)


def ragged_paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    cache: jax.Array,
    kv_lens: jax.Array,
    page_table: jax.Array,
    query_starts: jax.Array,
    distribution: jax.Array,
    alibi_slopes: jax.Array | None,
    block_offsets: jax.Array | None,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    block_sparse: BlockSparse | None,
    v_head_dim: int,
    decode_only: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `api.ragged_paged_attention`."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    page_size = page_size_of(cache, head_dim, v_head_dim)
    group = num_heads // num_kv_heads
    tile, small_tile = tile_sizes(num_tokens, group)
    cache = write_tokens(cache, k, v, kv_lens, page_table, query_starts, distribution)
    items = work_items(
        kv_lens,
        query_starts,
        distribution,
        page_size=page_size,
        tile=tile,
        small_tile=small_tile,
        window=window,
    )
    queries = q.astype(jnp.float32).reshape(num_tokens, num_kv_heads, group, head_dim)
    if v is None:
        queries *= scale  # Keys that are values too cannot be scaled while they are copied.
    slopes, offsets = (
        None if each is None else each.reshape(num_kv_heads, group)
        for each in (alibi_slopes, block_offsets)
    )
    score = _Score(
        zero=_zero_of(q, cache, kv_lens, page_table, query_starts, distribution),
        scale=scale,
        window=window,
        softcap=softcap,
        slopes=slopes,
        sparse=block_sparse,
        offsets=offsets,
        shared_kv=v is None,
        precision=lax.Precision.HIGHEST if q.dtype == jnp.float32 else lax.Precision.DEFAULT,
    )
    out = _attend_singles(queries, v_head_dim, cache, kv_lens, page_table, items, score)
    passes = [(tile, max(_SMALL_BLOCK, min(tile, _BLOCK)), query_starts[:-1], items.tiles)]
    if small_tile < tile:
        after_tiles = query_starts[:-1] + items.tiles * tile
        passes.append((small_tile, _SMALL_BLOCK, after_tiles, items.small_tiles))
    for size, block, starts, tiles in [] if decode_only else passes:
        out = _attend_tiles(
            queries,
            out,
            cache,
            kv_lens,
            page_table,
            starts,
            query_starts[1:],
            tiles,
            score,
            size,
            block,
        )
    return out.reshape(num_tokens, num_heads, v_head_dim).astype(q.dtype), cache


class _Score(NamedTuple):
    """How scores are made from queries and scaled keys; slopes f32[K, G] or None.

    sparse, offsets: the block-sparse mask and its i32[K, G], or None. shared_kv: values are part
    of their key, and queries come scaled instead of keys.
    zero: f32[], see _zero_of; starts every accumulator.
    """

    zero: jax.Array
    scale: float
    window: int | None
    softcap: float | None
    slopes: jax.Array | None
    sparse: BlockSparse | None
    offsets: jax.Array | None
    shared_kv: bool
    precision: lax.Precision

    def start(self, shape: tuple[int, ...], v_head_dim: int) -> tuple[jax.Array, ...]:
        """Running maximum [*shape], sum [*shape] and output [*shape, Hv] before any key."""
        zeros = jnp.broadcast_to(self.zero, shape)
        return zeros + _MASKED, zeros, jnp.broadcast_to(self.zero, (*shape, v_head_dim))

    def products(self, pattern: str, left: jax.Array, right: jax.Array) -> jax.Array:
        return jnp.einsum(
            pattern, left, right, precision=self.precision, preferred_element_type=jnp.float32
        )

    def visible(self, distance: jax.Array) -> jax.Array:
        """Which keys, `distance` tokens before the query, it sees."""
        seen = distance >= 0
        return seen if self.window is None else seen & (distance < self.window)

    def finish(
        self,
        scores: jax.Array,
        distance: jax.Array,
        key_positions: jax.Array,
        heads: tuple[slice | None, ...],
    ) -> jax.Array:
        """Apply softcap, ALiBi and mask; distance broadcasts against scores.

        key_positions: along the last, or the first and the last axis of distance. heads: index
          that lays a [K, G] array along the axes of scores.
        """
        if self.softcap is not None:
            scores = self.softcap * jnp.tanh(scores / self.softcap)
        if self.slopes is not None:
            scores -= self.slopes[heads] * distance
        visible = self.visible(distance)
        if self.sparse is not None and self.offsets is not None:
            key_positions = jnp.expand_dims(key_positions, tuple(range(1, distance.ndim - 1)))
            positions = key_positions + distance
            visible &= self.sparse.visible(positions, key_positions, self.offsets[heads])
        return jnp.where(visible, scores, _MASKED)


def _attend_singles(
    queries: jax.Array,
    v_head_dim: int,
    cache: jax.Array,
    kv_lens: jax.Array,
    page_table: jax.Array,
    items: WorkItems,
    score: _Score,
) -> jax.Array:
    """Attention of the rows with one token; queries f32[T,K,G,H] -> f32[T,K,G,Hv], else zeros.

    Those rows come first and have one token each, so row r's query is token r.
    """
    num_tokens, num_kv_heads, group, head_dim = queries.shape
    num_rows = min(kv_lens.shape[0], num_tokens)
    max_pages = page_table.shape[1]
    page_size = page_size_of(cache, head_dim, v_head_dim)
    width = _items_per_trip(num_rows, max_pages, page_size, cache)
    span = min(width, num_rows)  # Rows one trip can touch: they are consecutive.

    ends = jnp.cumsum(items.pages[:num_rows])
    total = ends[-1]
    column_shift = items.first_page[:num_rows] - (ends - items.pages[:num_rows])

    def pick(rows):
        # kv_lens[rows] and column_shift[rows] as sums: XLA for CPU keeps a sum's result, but would
        # redo a gather for every element of the pages it masks.
        member = rows[:, None] == jnp.arange(num_rows, dtype=jnp.int32)
        lens = jnp.where(member, kv_lens[:num_rows], 0).sum(1, dtype=jnp.int32)
        return lens, jnp.where(member, column_shift, 0).sum(1, dtype=jnp.int32)

    def trip(index, state):
        ids = index * width + jnp.arange(width, dtype=jnp.int32)
        rows = jnp.searchsorted(ends, ids, side="right", method="compare_all").astype(jnp.int32)
        rows = jnp.minimum(rows, num_rows - 1)
        kv_len, column_shift = pick(rows)
        columns = ids + column_shift
        first_row = jnp.minimum(rows[0], num_rows - span)
        belongs = (rows - first_row == jnp.arange(span)[:, None]) & (ids < total)  # [span, W]

        pages = page_table.at[rows, columns].get(mode="clip")
        known = jnp.where(ids < total, kv_len - columns * page_size, 0)
        keys, values = _load(cache, pages, known, score, head_dim, v_head_dim)
        positions = columns[:, None] * page_size + jnp.arange(page_size, dtype=jnp.int32)
        distance = kv_len[:, None] - 1 - positions  # [W, page_size]

        scores = score.products("wkgh,wkhs->wkgs", queries.at[rows].get(mode="clip"), keys)
        scores = score.finish(
            scores,
            distance[:, None, None, :],
            positions,
            (None, slice(None), slice(None), None),
        )
        old = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, first_row, span), state)
        old_max, old_sum, old_out = old
        peak = jnp.where(belongs[:, :, None, None], scores.max(-1)[None], _MASKED).max(1)
        new_max = jnp.maximum(old_max, peak)  # [span, K, G]
        weights = jnp.exp(scores - new_max[rows - first_row][..., None])
        weights = jnp.where(belongs.any(0)[:, None, None, None], weights, 0.0)
        part = score.products("wkgs,wksh->wkgh", weights, values)
        fade = jnp.exp(old_max - new_max)
        members = belongs.astype(jnp.float32)
        new_sum = old_sum * fade + jnp.einsum("rw,wkg->rkg", members, weights.sum(-1))
        new_out = old_out * fade[..., None] + jnp.einsum("rw,wkgh->rkgh", members, part)
        return jax.tree.map(
            lambda x, y: lax.dynamic_update_slice_in_dim(x, y, first_row, 0),
            state,
            (new_max, new_sum, new_out),
        )

    heads = (num_rows, num_kv_heads, group)
    state = score.start(heads, v_head_dim)
    _, total_weight, out = lax.fori_loop(0, _ceil_div(total, width), trip, state)
    out /= jnp.where(total_weight == 0.0, 1.0, total_weight)[..., None]
    return jnp.pad(out, ((0, num_tokens - num_rows), (0, 0), (0, 0), (0, 0)))


def _attend_tiles(
    queries: jax.Array,
    out: jax.Array,
    cache: jax.Array,
    kv_lens: jax.Array,
    page_table: jax.Array,
    starts: jax.Array,
    ends: jax.Array,
    tiles: jax.Array,
    score: _Score,
    tile: int,
    block: int,
) -> jax.Array:
    """Attention of tokens [starts, ends) i32[R], in tiles i32[R] per row, put into `out`.

    queries f32[T,K,G,H] and out f32[T,K,G,Hv]. tile: queries per tile; block: keys per trip of
    the inner loop, rounded to whole pages.
    """
    num_tokens, num_kv_heads, group, head_dim = queries.shape
    v_head_dim = out.shape[-1]
    num_rows = kv_lens.shape[0]
    page_size = page_size_of(cache, head_dim, v_head_dim)
    block_pages = min(max(1, block // page_size), page_table.shape[1])
    block = block_pages * page_size
    tile_ends = jnp.cumsum(tiles)

    def each_tile(index, out):
        row = jnp.searchsorted(tile_ends, index, side="right", method="compare_all")
        row = jnp.minimum(row.astype(jnp.int32), num_rows - 1)
        kv_len, end_token = kv_lens[row], ends[row]
        start = starts[row] + (index - tile_ends[row] + tiles[row]) * tile
        # The last tile may stick out of the array: slide it back, and write only its own tokens.
        slice_start = jnp.minimum(start, num_tokens - tile)
        tokens = slice_start + jnp.arange(tile, dtype=jnp.int32)
        own = (tokens >= start) & (tokens < end_token)
        positions = kv_len - end_token + tokens
        tile_queries = lax.dynamic_slice_in_dim(queries, slice_start, tile)
        tile_queries = tile_queries.transpose(1, 2, 0, 3).reshape(num_kv_heads, -1, head_dim)
        first_position = kv_len - end_token + start
        first_block, end_block = tile_blocks(
            first_position,
            jnp.minimum(first_position + tile, kv_len),
            block=block,
            window=score.window,
        )

        def each_block(index, state):
            old_max, old_sum, old_out = state
            columns = index * block_pages + jnp.arange(block_pages, dtype=jnp.int32)
            pages = page_table.at[row, columns].get(mode="clip")
            known = kv_len - columns * page_size
            keys, values = _load(cache, pages, known, score, head_dim, v_head_dim)
            key_positions = index * block + jnp.arange(block, dtype=jnp.int32)
            keys = keys.transpose(1, 2, 0, 3).reshape(num_kv_heads, head_dim, block)
            values = values.transpose(1, 0, 2, 3).reshape(num_kv_heads, block, v_head_dim)

            scores = score.products("kqh,khs->kqs", tile_queries, keys)
            shape = scores.shape
            distance = positions[:, None] - key_positions
            scores = scores.reshape(num_kv_heads, group, tile, block)
            heads = (slice(None), slice(None), None, None)
            scores = score.finish(scores, distance, key_positions, heads).reshape(shape)
            new_max = jnp.maximum(old_max, scores.max(-1))
            weights = jnp.exp(scores - new_max[..., None])
            fade = jnp.exp(old_max - new_max)
            new_sum = old_sum * fade + weights.sum(-1)
            part = score.products("kqs,ksh->kqh", weights, values)
            return new_max, new_sum, old_out * fade[..., None] + part

        heads = (num_kv_heads, group * tile)
        state = score.start(heads, v_head_dim)
        _, total_weight, tile_out = lax.fori_loop(first_block, end_block, each_block, state)
        tile_out /= total_weight[..., None]
        tile_out = tile_out.reshape(num_kv_heads, group, tile, v_head_dim).transpose(2, 0, 1, 3)
        before = lax.dynamic_slice_in_dim(out, slice_start, tile)
        tile_out = jnp.where(own[:, None, None, None], tile_out, before)
        return lax.dynamic_update_slice_in_dim(out, tile_out, slice_start, 0)

    return lax.fori_loop(0, tile_ends[-1], each_tile, out)


def _load(
    cache: jax.Array,
    pages: jax.Array,
    known: jax.Array,
    score: _Score,
    head_dim: int,
    v_head_dim: int,
) -> tuple[jax.Array, jax.Array]:
    """Scaled keys f32[W,K,H,page_size] and values f32[W,K,page_size,Hv] of pages i32[W].

    known: i32[W], how many of a page's slots count; values of others read as zero, because a
    weight of zero does not silence a NaN. Keys that hold their values are not scaled.
    """
    if score.shared_kv:
        keys = read_shared(cache, pages, head_dim)
        counts = jnp.arange(keys.shape[2], dtype=jnp.int32) < known[:, None]
        keys = jnp.where(counts[:, None, :, None], keys.astype(jnp.float32), 0.0)
        return keys.swapaxes(2, 3), keys[..., :v_head_dim]
    keys, values = read_slabs(cache, pages, head_dim, v_head_dim)
    # Done on the flat slabs: XLA for CPU vectorises a long last axis, and copies a short one
    # (64) element by element.
    keys = keys.astype(jnp.float32) * score.scale
    width = max(head_dim, v_head_dim)
    element = jnp.arange(values.shape[-1], dtype=jnp.int32)
    counts = element < known[:, None, None] * width
    values = jnp.where(counts, values.astype(jnp.float32), 0.0)
    return shape_slabs(keys, values, head_dim, v_head_dim)


def _zero_of(*arrays: jax.Array) -> jax.Array:
    """A float32 zero that varies over the same mesh axes as any of `arrays`.

    Inside `jax.shard_map` a loop's state must say from the start over which axes it varies. XLA
    folds this into a constant.
    """
    zero = jnp.float32(0.0)
    for array in arrays:
        first = array[(0,) * array.ndim].astype(jnp.float32)
        zero = jnp.where(False, first, zero)
    return zero


def _items_per_trip(num_rows: int, max_pages: int, page_size: int, cache: jax.Array) -> int:
    """Pages one trip of the one-token loop takes."""
    tokens = min(256 * num_rows, 2048)
    page_bytes = 4 * cache.size // num_pages_of(cache)  # As float32.
    pages = min(tokens // page_size, _CHUNK_BYTES // page_bytes, num_rows * max_pages)
    return max(1, pages)


def _ceil_div(numerator, denominator: int):
    return -(-numerator // denominator)
