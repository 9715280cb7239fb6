"""Ragged paged attention for GPUs: Pallas kernels that are lowered through Triton.

Rows with one token (decoding) and rows with several (prompts and their chunks) have a kernel each;
both run the same loop over blocks of keys, a tile of queries at a time. A tile holds the queries of
one kv head: all heads of its group, for one token or for several, so that every key is read once
for the group.

- decode: the tokens of all rows are cut into items of about equal length, whatever row they belong
  to, one program per item and kv head; rows too many to be cut start longest first. The last
  program of a row to finish merges its items.
- prefill: one program per tile and kv head, the longest first.

Which program does what is worked out on the device from the step's metadata, once for all layers.
Grids are bounded by the bucket; programs with nothing to do end at once.

Softmax in float32 with base-2 exponentials; products in the dtype of q with float32 sums.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.ragged_paged_attention import hopper, hopper_decode
from pallas_kernels.ragged_paged_attention.block_sparse import BlockSparse
from pallas_kernels.ragged_paged_attention.layout import (
    TOKEN_MINOR_RANK,
    page_size_of,
    token_rows,
)
from pallas_kernels.triton_blocks import block_mask, load_block
from pallas_kernels.tuning import is_hopper, multiprocessors, shape_key, tuned

DECODE, PREFILL = "ragged_paged_attention.decode", "ragged_paged_attention.prefill"
HOPPER_PREFILL = "ragged_paged_attention.hopper_prefill"
HOPPER_DECODE = "ragged_paged_attention.hopper_decode"
LOG2_E = math.log2(math.e)
_MASKED = -1e30  # Finite, so that a fully masked row makes no NaN.
_MANY_TOKENS, _TOKENS_TO_WRITE = 1024, 8  # from so many on, a program writes several
_CLEARING_PROGRAMS = 528
_TO_MERGE = 2048, 4096, 8192  # elements of a trip of the merge: items times heads times columns
_SMALLEST = 16  # Rows, columns and inner sizes of a tensor-core product, at least.


@dataclass(frozen=True)
class Tiling:
    """How a kernel is cut into programs.

    rows: of the query tile, tokens times heads of a group. keys: tokens per trip of the loop.
    programs: for decode, how many items times kv heads to aim at. num_warps, num_stages: Triton's.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    programs: int = 0


@dataclass(frozen=True)
class Piece:
    """Some columns of a head: `size`, a power of two, from `start` on, of which `valid` exist.

    as_slice: address them as a slice; else one by one, as incomplete ones must be.
    """

    start: int
    size: int
    valid: int
    as_slice: bool


def pieces(width: int, interpret: bool) -> tuple[Piece, ...]:
    """Cut `width` columns into powers of two, each at least 16; only the last may be incomplete.

    interpret: Pallas's interpreter cannot mix slices with arrays of indices.
    """
    cut, start = [], 0
    while start < width:
        left = width - start
        size = max(_SMALLEST, 1 << (left.bit_length() - 1))
        cut.append(Piece(start, size, min(size, left), size <= left and not interpret))
        start += size
    return tuple(cut)


@dataclass(frozen=True)
class Problem:
    """What is static about a call."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    page_size: int
    shared_kv: bool
    scale: float
    window: int | None
    softcap: float | None
    sparse: BlockSparse | None
    alibi: bool
    precise: bool
    interpret: bool

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    def heads_per_tile(self, rows: int) -> int:
        """Query heads of one kv head in a tile of `rows`: a power of two, padding included."""
        return min(rows, pl.next_power_of_2(self.group))

    def head_tiles(self, rows: int) -> int:
        """Tiles that the heads of one kv head take."""
        return -(-self.group // self.heads_per_tile(rows))

    @property
    def k_pieces(self) -> tuple[Piece, ...]:
        return pieces(self.head_dim, self.interpret)

    @property
    def v_pieces(self) -> tuple[Piece, ...]:
        return pieces(self.v_head_dim, self.interpret)

    @property
    def v_start(self) -> int:
        return 0 if self.shared_kv else self.head_dim


def decode_tiling(problem: Problem, device_kind: str | None = None) -> Tiling:
    """Sizes of the decode kernel: those measured on the device, else what suits most."""
    measured = tuned(device_kind, DECODE, tuning_key(problem))
    if measured is not None:
        return Tiling(**measured)
    rows = max(_SMALLEST, min(64, pl.next_power_of_2(problem.group)))
    width = problem.head_dim + (0 if problem.shared_kv else problem.v_head_dim)
    keys = 128 if width <= 256 else 32
    num_warps = 4 if rows * problem.v_head_dim <= 64 * 128 else 8
    return Tiling(rows, keys, num_warps, 3, programs=528)


def prefill_tiling(problem: Problem, device_kind: str | None = None) -> Tiling:
    """Sizes of the prefill kernel: those measured on the device, else what suits most."""
    measured = tuned(device_kind, PREFILL, tuning_key(problem))
    if measured is not None:
        return Tiling(**measured)
    width = max(problem.head_dim, problem.v_head_dim)
    if problem.precise or width > 256:
        return Tiling(64, 32, 8 if width > 256 else 4, 2)
    if width > 128:
        return Tiling(128, 32, 8, 2)
    return Tiling(128, 64, 8, 3)


def hopper_config(problem: Problem, device_kind: str | None) -> hopper.PrefillConfig | None:
    """Sizes of the kernel for Hopper GPUs; None where the device is none, or unknown."""
    if not is_hopper(device_kind) or problem.interpret:
        return None
    measured = tuned(device_kind, HOPPER_PREFILL, tuning_key(problem))
    config = hopper.default_config(problem.head_dim, problem.group)
    if measured is not None:
        config = hopper.PrefillConfig(**measured)
    if config.num_programs is None:
        return config
    return replace(config, num_programs=min(config.num_programs, multiprocessors(device_kind)))


def tuning_key(problem: Problem) -> str:
    """What the best sizes depend on; pages of 16 tokens and more behave alike."""
    return shape_key(
        head_dim=problem.head_dim,
        v_head_dim=problem.v_head_dim,
        group=problem.group,
        itemsize=4 if problem.precise else 2,
    )


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
    device_kind: str | None = None,
    decode: Tiling | hopper_decode.DecodeConfig | None = None,
    prefill: Tiling | hopper.PrefillConfig | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `api.ragged_paged_attention`; tilings are chosen here where they are None."""
    if cache.ndim == TOKEN_MINOR_RANK:
        raise NotImplementedError("the cache is laid out for a CPU")
    metadata = kv_lens, page_table, query_starts, distribution
    cache = write(cache, k, v, *metadata, interpret=interpret)
    out = attend(
        q,
        cache,
        *metadata,
        alibi_slopes,
        block_offsets,
        shared_kv=v is None,
        scale=scale,
        window=window,
        softcap=softcap,
        block_sparse=block_sparse,
        v_head_dim=v_head_dim,
        decode_only=decode_only,
        device_kind=device_kind,
        decode=decode,
        prefill=prefill,
        interpret=interpret,
    )
    return out, cache


def attend(
    q: jax.Array,
    cache: jax.Array,
    kv_lens: jax.Array,
    page_table: jax.Array,
    query_starts: jax.Array,
    distribution: jax.Array,
    alibi_slopes: jax.Array | None = None,
    block_offsets: jax.Array | None = None,
    *,
    shared_kv: bool,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    block_sparse: BlockSparse | None = None,
    v_head_dim: int,
    decode_only: bool = False,
    device_kind: str | None = None,
    decode: Tiling | hopper_decode.DecodeConfig | None = None,
    prefill: Tiling | hopper.PrefillConfig | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attention over pages that hold the step's keys and values already: [T, N, Hv].

    Arguments as of `api.ragged_paged_attention`.
    decode, prefill: sizes, chosen here where they are None; their type is that of the kernel. For
      rows of several tokens the one in `hopper` is chosen wherever the device is such a GPU and it
      takes the call; for single tokens Triton's, which is no slower there than `hopper_decode`.

    Raises NotImplementedError where a `PrefillConfig` or a `DecodeConfig` is given for what its
    kernel does not do.
    """
    _, num_heads, head_dim = q.shape
    problem = Problem(
        num_heads=num_heads,
        num_kv_heads=cache.shape[1],
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        page_size=page_size_of(cache, head_dim, v_head_dim),
        shared_kv=shared_kv,
        scale=scale,
        window=window,
        softcap=softcap,
        sparse=block_sparse,
        alibi=alibi_slopes is not None,
        precise=q.dtype == jnp.float32,
        interpret=interpret,
    )
    per_head = [x for x in (alibi_slopes, block_offsets) if x is not None]
    rows = (kv_lens, query_starts, distribution)
    out = None
    if not decode_only:
        out = _of_prompts(problem, prefill, device_kind, page_table, q, cache, rows, per_head)
    return _of_single_tokens(
        problem, decode, device_kind, page_table, q, cache, rows, per_head, out
    )


def write(
    cache: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    kv_lens: jax.Array,
    page_table: jax.Array,
    query_starts: jax.Array,
    distribution: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Put k [T, K, H] and v [T, K, Hv] of the live tokens into their pages, in place.

    A kernel of its own, because XLA for GPU transposes (copies) an array whose scattered axes are
    not its first ones.
    """
    num_tokens, num_kv_heads, head_dim = k.shape
    page_size = cache.shape[2]
    rows, positions, live = token_rows(kv_lens, query_starts, distribution, num_tokens)
    pages = page_table[rows, positions // page_size]
    slots = jnp.stack([jnp.where(live, pages, -1), positions % page_size], 1)
    num_heads = max(1, min(pl.next_power_of_2(num_kv_heads), 4096 // head_dim))
    parts = [(k, 0)] if v is None else [(k, 0), (v, head_dim)]

    tokens_each = _TOKENS_TO_WRITE if num_tokens >= _MANY_TOKENS else 1

    def kernel(slots_ref, *refs):
        *part_refs, _, cache_ref = refs
        index = jnp.arange(tokens_each * num_heads, dtype=jnp.int32)
        heads = pl.program_id(0) * num_heads + lax.rem(index, num_heads)
        tokens = pl.program_id(1) * tokens_each + lax.div(index, num_heads)
        inside = (tokens < num_tokens) & (heads < num_kv_heads)
        page = plt.load(slots_ref.at[tokens, 0], mask=inside, other=-1)
        slot = plt.load(slots_ref.at[tokens, 1], mask=inside, other=0)
        exists = page >= 0
        for ref, (part, start) in zip(part_refs, parts, strict=True):
            for piece in pieces(part.shape[2], interpret):
                x = _load(ref, (tokens, heads), piece, 0, exists)
                _store(cache_ref, (page, heads, slot), piece, x, exists, start)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(cache.shape, cache.dtype),
        grid=(-(-num_kv_heads // num_heads), -(-num_tokens // tokens_each)),
        input_output_aliases={1 + len(parts): 0},
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="ragged_paged_attention_write",
    )(slots, *(part for part, _ in parts), cache)


# ---- who does what -----------------------------------------------------------------------------


def decode_items(
    problem: Problem,
    tiling: Tiling,
    kv_lens: jax.Array,
    query_starts: jax.Array,
    distribution: jax.Array,
    num_cleared: int = 0,
) -> jax.Array:
    """Cut the keys of the rows with one token into items, those of a row of about equal length.

    num_cleared: so many rows, the first, get an item even if they have no keys, and become zero.

    Returns i32[items, 7]: (row, first key, end of the keys, tokens of the row, number of its first
    item, how many it has, the item's own number); the unused, last, have row -1. Where rows are too
    many to be cut, the longest come first.
    """
    del query_starts
    keys, num_rows = tiling.keys, kv_lens.shape[0]
    heads = problem.num_kv_heads * problem.head_tiles(tiling.rows)
    target = -(-tiling.programs // heads)
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    lens = jnp.where(rows < distribution[0], kv_lens, 0)
    first = jnp.zeros_like(lens)
    if problem.window is not None:
        first = jnp.maximum(lens - problem.window, 0) // keys * keys
    blocks = _ceil_div(lens - first, keys)
    blocks_per_item = jnp.maximum(1, _ceil_div(blocks.sum(dtype=jnp.int32), target))
    counts = jnp.maximum(_ceil_div(blocks, blocks_per_item), rows < num_cleared)
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    ids = jnp.arange(num_rows + target, dtype=jnp.int32)
    row = jnp.searchsorted(ends, ids, side="right", method="compare_all").astype(jnp.int32)
    used = ids < ends[-1]
    row = jnp.minimum(row, num_rows - 1)
    index = ids - ends[row] + counts[row]
    each = jnp.maximum(counts[row], 1)
    start, stop = (first[row] + i * blocks[row] // each * keys for i in (index, index + 1))
    stop = jnp.minimum(stop, lens[row])
    first_item = (ends - counts)[row]
    row_or_none = jnp.where(used, row, -1)
    items = jnp.stack([row_or_none, start, stop, lens[row], first_item, counts[row], ids], 1)
    if num_rows < target // 2:  # Rows are cut into items of a length.
        return items
    return _longest_first(jnp.where(used, stop - start, -1), items)


def _longest_first(size: jax.Array, items: jax.Array) -> jax.Array:
    """Order `items` so that those that are short come last, and with them the unused, of size -1.

    Every item is compared with every other: 4 to 8 us on an H100, once a step.
    """
    ids = jnp.arange(size.shape[0], dtype=jnp.int32)
    is_tie = size[None] == size[:, None]
    goes_before = (size[None] > size[:, None]) | (is_tie & (ids[None] < ids[:, None]))
    place = goes_before.sum(1, dtype=jnp.int32)
    return jnp.zeros_like(items).at[place].set(items, unique_indices=True)


def prefill_tiles(
    problem: Problem,
    tiling: Tiling,
    num_tokens: int,
    kv_lens: jax.Array,
    query_starts: jax.Array,
    distribution: jax.Array,
) -> jax.Array:
    """Cut the tokens of all other rows, and the padding behind the last, into tiles.

    Returns i32[tiles, 4]: (row, first token, end of the tokens, position of the first); row -1 if
    unused, and position -1 for padding, which sees no key and becomes zero.
    """
    size = tiling.rows // problem.heads_per_tile(tiling.rows)
    num_rows = kv_lens.shape[0]
    rows = jnp.arange(num_rows + 1, dtype=jnp.int32)
    live = query_starts[distribution[2]]
    starts = jnp.where(rows < num_rows, query_starts, live)
    stops = jnp.append(query_starts[1:], num_tokens).astype(jnp.int32)
    is_row = (rows >= distribution[0]) & (rows < distribution[2])
    counts = jnp.where(is_row | (rows == num_rows), _ceil_div(stops - starts, size), 0)
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    ids = jnp.arange(num_tokens // size + min(num_rows + 1, num_tokens), dtype=jnp.int32)
    row = jnp.searchsorted(ends, ids, side="right", method="compare_all").astype(jnp.int32)
    used = ids < ends[-1]
    row = jnp.minimum(row, num_rows)
    start = starts[row] + (ids - ends[row] + counts[row]) * size
    stop = jnp.minimum(start + size, stops[row])
    position = jnp.append(kv_lens, 0)[row] - stops[row] + start
    position = jnp.where(row < num_rows, position, -1)
    # Later tiles of a row see more keys: they go first, so that the last to end are short.
    return jnp.stack([jnp.where(used, row, -1), start, stop, position], 1)[::-1]


# ---- the kernels -------------------------------------------------------------------------------


def _decode(problem, tiling, items, page_table, q, cache, per_head, out):
    """Attention of the rows of the items, in place in `out`; without it, [rows, N, Hv].

    Programs of a row that has several items leave maxima, sums and outputs in memory; the last of
    them, by a count in memory, merges these.
    """
    num_items, num_rows = items.shape[0], page_table.shape[0]
    grid = (problem.num_kv_heads * problem.head_tiles(tiling.rows), num_items)
    arrived = jnp.zeros((num_rows, grid[0]), jnp.int32)
    if out is None:
        shape = (min(q.shape[0], num_rows), problem.num_heads, problem.v_head_dim)
    else:
        shape = out.shape
    heads = (num_items, problem.num_heads)
    outputs = (
        jax.ShapeDtypeStruct(shape, q.dtype),
        jax.ShapeDtypeStruct(arrived.shape, arrived.dtype),
        jax.ShapeDtypeStruct((*heads, problem.v_head_dim), jnp.float32),
        jax.ShapeDtypeStruct(heads, jnp.float32),
        jax.ShapeDtypeStruct(heads, jnp.float32),
    )
    read = [items, page_table, q, cache, *per_head]
    changed = [arrived] if out is None else [arrived, out]

    def kernel(items_ref, table_ref, q_ref, cache_ref, *refs):
        per_head_refs = refs[: len(per_head)]
        out_ref, arrived_ref, *part_refs = refs[-len(outputs) :]
        head_tile, place = pl.program_id(0), pl.program_id(1)
        row, start, stop, kv_len, first, count, item = (items_ref[place, i] for i in range(7))

        @pl.when(row >= 0)
        def _():
            kv_head, heads, is_head = _heads(problem, tiling.rows, head_tile, tiling.rows)
            tokens = jnp.full(tiling.rows, row)
            queries = _load_queries(problem, q_ref, tokens, heads, is_head)
            attend = _Attend(problem, tiling, table_ref, cache_ref, row, kv_head, stop)
            attend.scores_of(queries, jnp.full(tiling.rows, kv_len - 1), heads, per_head_refs)
            best, total, outs = attend.run(
                start // tiling.keys, _ceil_div(stop, tiling.keys), kv_len - 1, kv_len - 1
            )

            @pl.when(count == 1)
            def _():
                _store_mean(problem, out_ref, row, heads, is_head, total, outs)

            @pl.when(count > 1)
            def _():
                parts_ref, *statistics = part_refs
                for ref, x in zip(statistics, (best, total), strict=True):
                    plt.store(ref.at[item, heads], x, mask=is_head)
                at = jnp.full(tiling.rows, item), heads
                for piece, part in zip(problem.v_pieces, outs, strict=True):
                    _store(parts_ref, at, piece, part, is_head)
                if not problem.interpret:
                    plt.debug_barrier()  # All threads have stored; the atomic releases it.
                before = plt.atomic_add(arrived_ref, (row, head_tile), jnp.int32(1))

                @pl.when(before == count - 1)
                def _():
                    _merge_items(
                        problem,
                        parts_ref,
                        lambda *at: [ref.at[at] for ref in statistics],
                        out_ref,
                        row,
                        (first, count),
                        head_tile,
                        problem.heads_per_tile(tiling.rows),
                    )

    out, *_ = pl.pallas_call(
        kernel,
        out_shape=outputs,
        grid=grid,
        compiler_params=_params(tiling),
        input_output_aliases={len(read): 1} if out is None else {len(read): 1, len(read) + 1: 0},
        interpret=problem.interpret,
        name="ragged_paged_attention_decode",
    )(*read, *changed)
    return out


def _merge_items(problem, parts_ref, statistics_of, out_ref, row, span, head_tile, num_heads):
    """Combine the items of a row, in their order, for a tile of `num_heads` heads of a kv head.

    A trip takes as long for two items as for all it has room for; so its room depends on how many
    there are.
    statistics_of: views of the maxima and sums, given items and heads. span: first item, how many.
    """
    columns = pl.next_power_of_2(problem.v_head_dim)
    sizes = sorted({max(1, elements // (num_heads * columns)) for elements in _TO_MERGE})
    for smaller, each in zip([-1, *sizes], sizes, strict=False):
        fits = (span[1] > smaller) & ((span[1] <= each) | (each == sizes[-1]))

        @pl.when(fits)
        def _(each=each):
            _merge_trips(
                each, problem, parts_ref, statistics_of, out_ref, row, span, head_tile, num_heads
            )


def _merge_trips(each, problem, parts_ref, statistics_of, out_ref, row, span, head_tile, num_heads):
    """What `_merge_items` does, `each` items a trip."""
    first, count = span
    _, heads, is_head = _heads(problem, each * num_heads, head_tile, num_heads)
    index = jnp.arange(each * num_heads, dtype=jnp.int32)

    def of_item(x):
        return x.reshape(each, num_heads, *x.shape[1:])

    def trip(block, state):
        old_best, old_total, old_outs = state
        within = block * each + lax.div(index, num_heads)
        exists = is_head & (within < count)
        items = jnp.where(exists, first + within, 0)
        at = items, jnp.where(exists, heads, 0)
        # Volatile: other programs wrote these, so that no other cache than the shared one will do.
        maxima, sums = (
            of_item(plt.load(view, mask=exists, other=other, volatile=True))
            for view, other in zip(statistics_of(*at), (_MASKED, 0.0), strict=True)
        )
        best = jnp.maximum(old_best, maxima.max(0))
        fade, grow = jnp.exp2(old_best - best), jnp.exp2(maxima - best)
        grow = jnp.where(of_item(exists), grow, 0.0)
        outs = []
        for piece, old in zip(problem.v_pieces, old_outs, strict=True):
            view, columns = _columns(parts_ref, at, piece, 0)
            mask = block_mask((each * num_heads, piece.size), exists, columns)
            part = of_item(plt.load(view, mask=mask, other=0.0, volatile=True))
            outs.append(old * fade[:, None] + (part * grow[..., None]).sum(0))
        return best, old_total * fade + (sums * grow).sum(0), outs

    state = (
        jnp.full(num_heads, _MASKED),
        jnp.zeros(num_heads, jnp.float32),
        [jnp.zeros((num_heads, piece.size), jnp.float32) for piece in problem.v_pieces],
    )
    _, total, outs = lax.fori_loop(0, _ceil_div(count, each), trip, state)
    _, heads, is_head = _heads(problem, num_heads, head_tile, num_heads)
    _store_mean(problem, out_ref, row, heads, is_head, total, outs)


def _store_mean(problem, out_ref, row, heads, is_head, total, outs):
    """Write sums of weighted values over the sum of the weights; zero where there are none."""
    total = jnp.where(total == 0.0, 1.0, total)
    at = jnp.full(heads.shape, row), heads
    for piece, out in zip(problem.v_pieces, outs, strict=True):
        _store(out_ref, at, piece, out / total[:, None], is_head)


def _of_single_tokens(problem, sizes, device_kind, page_table, q, cache, rows, per_head, out):
    """Attention of the rows of one token; the others' tokens in `out` stay, or are zero without."""
    sizes = sizes or decode_tiling(problem, device_kind)
    num_tokens, num_rows = q.shape[0], min(q.shape[0], page_table.shape[0])
    if isinstance(sizes, hopper_decode.DecodeConfig):
        done = _hopper_decode(problem, sizes, page_table, q, cache, rows, out)
    else:
        items = decode_items(problem, sizes, *rows, num_cleared=num_rows if out is None else 0)
        done = _decode(problem, sizes, items, page_table, q, cache, per_head, out)
    return jnp.pad(done, ((0, num_tokens - done.shape[0]), (0, 0), (0, 0)))


def _hopper_decode(problem, config, page_table, q, cache, rows, out):
    """As `_decode`, by the kernel for Hopper GPUs; its items are merged by a second kernel."""
    _refuse_on_hopper(problem)
    kv_lens, _, distribution = rows
    items = hopper_decode.make_items(
        kv_lens,
        distribution,
        num_kv_heads=problem.num_kv_heads,
        window=problem.window,
        config=config,
    )
    parts = hopper_decode.decode(
        q,
        cache,
        items,
        page_table,
        scale=problem.scale,
        window=problem.window,
        softcap=problem.softcap,
        config=config,
    )
    keep = out is not None
    num_rows = min(q.shape[0], page_table.shape[0])
    shape = out.shape if keep else (num_rows, problem.num_heads, problem.v_head_dim)
    num_heads = problem.heads_per_tile(_SMALLEST)

    def kernel(spans_ref, parts_ref, *refs):
        head_tile, row = pl.program_id(0), pl.program_id(1)
        span = spans_ref[row, 0], spans_ref[row, 1]

        def statistics(items, heads):  # They lie behind the outputs.
            first, size = problem.v_head_dim, hopper_decode.STATISTICS
            return [parts_ref.at[items, heads, column] for column in (first, first + size // 2)]

        @pl.when((span[1] > 0) | (not keep))
        def _():
            _merge_items(problem, parts_ref, statistics, refs[-1], row, span, head_tile, num_heads)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(shape, q.dtype),
        grid=(problem.num_kv_heads * problem.head_tiles(_SMALLEST), num_rows),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        input_output_aliases={2: 0} if keep else {},
        interpret=problem.interpret,
        name="ragged_paged_attention_merge",
    )(items.spans, parts, *([out] if keep else []))


def _prefill(problem, tiling, tiles, page_table, q, cache, per_head):
    """Attention of the tiles' tokens: [T, N, Hv], unwritten elsewhere."""
    per_tile = problem.heads_per_tile(tiling.rows)
    grid = (problem.num_kv_heads * problem.head_tiles(tiling.rows), tiles.shape[0])

    def kernel(tiles_ref, table_ref, q_ref, cache_ref, *refs):
        *per_head_refs, out_ref = refs
        head_tile, tile = pl.program_id(0), pl.program_id(1)
        row = tiles_ref[tile, 0]

        @pl.when(row >= 0)
        def _():
            start, stop, position = (tiles_ref[tile, i] for i in (1, 2, 3))
            kv_head, heads, is_head = _heads(problem, tiling.rows, head_tile, per_tile)
            within = jnp.arange(tiling.rows, dtype=jnp.int32) // per_tile
            tokens = start + within
            own = is_head & (tokens < stop)
            queries = _load_queries(problem, q_ref, tokens, heads, own)
            last = position + stop - start - 1
            is_row = position >= 0
            attend = _Attend(problem, tiling, table_ref, cache_ref, row, kv_head, last + 1)
            attend.scores_of(queries, position + within, heads, per_head_refs)
            low = 0
            if problem.window is not None:
                low = jnp.maximum(position - problem.window + 1, 0) // tiling.keys
            high = jnp.where(is_row, _ceil_div(last + 1, tiling.keys), 0)
            _, total, outs = attend.run(low, high, position, last)
            total = jnp.where(total == 0.0, 1.0, total)
            for piece, out in zip(problem.v_pieces, outs, strict=True):
                _store(out_ref, (tokens, heads), piece, out / total[:, None], own)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((*q.shape[:2], problem.v_head_dim), q.dtype),
        grid=grid,
        compiler_params=_params(tiling),
        interpret=problem.interpret,
        name="ragged_paged_attention_prefill",
    )(tiles, page_table, q, cache, *per_head)


def _of_prompts(problem, sizes, device_kind, page_table, q, cache, rows, per_head):
    """Attention of the rows of several tokens, zero for padding: [T, N, Hv]."""
    if sizes is None:
        config = hopper_config(problem, device_kind)
        if config is not None:
            with contextlib.suppress(NotImplementedError):
                return _hopper_prefill(problem, config, page_table, q, cache, rows)
        sizes = prefill_tiling(problem, device_kind)
    if isinstance(sizes, hopper.PrefillConfig):
        return _hopper_prefill(problem, sizes, page_table, q, cache, rows)
    tiles = prefill_tiles(problem, sizes, q.shape[0], *rows)
    return _prefill(problem, sizes, tiles, page_table, q, cache, per_head)


def _refuse_on_hopper(problem):
    """Raise NotImplementedError for what neither kernel for Hopper GPUs does."""
    if problem.shared_kv or problem.alibi or problem.sparse:
        raise NotImplementedError("the Hopper kernel has no shared values, ALiBi or sparse mask")


def _hopper_prefill(problem, config, page_table, q, cache, rows):
    """What `_prefill` computes, by the kernel for Hopper GPUs."""
    _refuse_on_hopper(problem)
    kv_lens, query_starts, distribution = rows
    out = hopper.prefill(
        q,
        cache,
        kv_lens,
        page_table,
        query_starts,
        distribution,
        scale=problem.scale,
        window=problem.window,
        softcap=problem.softcap,
        config=config,
    )
    return _clear_from(query_starts[distribution[2]], out)


def _clear_from(live, x):
    """Zero x[live:] in place; an elementwise pass would read and write all of it."""
    num_tokens, width = x.shape[0], math.prod(x.shape[1:])
    size = pl.next_power_of_2(width)
    num_programs = min(num_tokens, _CLEARING_PROGRAMS)

    def kernel(live_ref, _, x_ref):
        columns = jnp.arange(size, dtype=jnp.int32)
        first = live_ref[0] + pl.program_id(0)

        def clear(index, _):
            token = first + index * num_programs
            plt.store(x_ref.at[token, columns], jnp.zeros(size, x_ref.dtype), mask=columns < width)

        lax.fori_loop(0, _ceil_div(num_tokens - first, num_programs), clear, None)

    flat = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((num_tokens, width), x.dtype),
        grid=(num_programs,),
        input_output_aliases={1: 0},
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        name="ragged_paged_attention_clear",
    )(live[None], x.reshape(num_tokens, width))
    return flat.reshape(x.shape)


class _Attend:
    """One program's loop over blocks of keys, for a tile of queries of one row and kv head.

    stop: end of the keys that count.
    """

    def __init__(self, problem: Problem, tiling: Tiling, table_ref, cache_ref, row, kv_head, stop):
        self.problem, self.keys, self.rows = problem, tiling.keys, tiling.rows
        self.table_ref, self.cache_ref = table_ref, cache_ref
        self.row, self.kv_head, self.stop = row, kv_head, stop
        self.k_pieces, self.v_pieces = problem.k_pieces, problem.v_pieces

    def scores_of(self, queries: Sequence[jax.Array], positions, heads, per_head_refs) -> None:
        """Set the queries (one array per piece), and per row of the tile its position and head."""
        self.queries, self.positions = queries, positions
        refs, limit = list(per_head_refs), self.problem.num_heads - 1
        heads = jnp.minimum(heads, limit)
        self.slopes = plt.load(refs.pop(0).at[heads]) if self.problem.alibi else None
        self.offsets = plt.load(refs.pop(0).at[heads]) if self.problem.sparse else None

    def run(self, low, high, first_position, last_position):
        """Attend to the blocks [low, high); positions of the tile's first and last query.

        Returns maxima (base 2) and sums f32[rows], and outputs, one f32[rows, size] per piece.
        """
        window = self.problem.window
        state = (
            jnp.full(self.rows, _MASKED),
            jnp.zeros(self.rows, jnp.float32),
            [jnp.zeros((self.rows, piece.size), jnp.float32) for piece in self.v_pieces],
        )
        if self.problem.sparse is not None:
            return lax.fori_loop(low, high, partial(self._trip, masked=True), state)
        whole = jnp.clip((first_position + 1) // self.keys, low, high)
        if window is not None:
            inside = jnp.maximum(last_position - window + 1, 0)
            inside = jnp.clip(_ceil_div(inside, self.keys), low, whole)
            state = lax.fori_loop(low, inside, partial(self._trip, masked=True), state)
            low = inside
        state = lax.fori_loop(low, whole, partial(self._trip, masked=False), state)
        return lax.fori_loop(whole, high, partial(self._trip, masked=True), state)

    def _trip(self, block, state, *, masked: bool):
        old_best, old_total, old_outs = state
        problem = self.problem
        precision = lax.Precision.HIGHEST if problem.precise else None
        at, exists = self._slots(block, masked)
        keys = [_load(self.cache_ref, at, piece, 0, exists) for piece in self.k_pieces]
        scores = jnp.zeros((self.rows, self.keys), jnp.float32)
        for query, key in zip(self.queries, keys, strict=True):
            scores += lax.dot_general(
                query,
                key.astype(query.dtype),
                (((1,), (1,)), ((), ())),
                precision=precision,
                preferred_element_type=jnp.float32,
            )
        scores = self._finish(scores, block, masked)
        best = jnp.maximum(old_best, scores.max(1))
        fade = jnp.exp2(old_best - best)
        weights = jnp.exp2(scores - best[:, None])
        total = old_total * fade + weights.sum(1)
        weights = weights.astype(self.queries[0].dtype)
        outs = []
        for index, (piece, old) in enumerate(zip(self.v_pieces, old_outs, strict=True)):
            if problem.shared_kv and piece == self.k_pieces[index]:
                values = keys[index]
            else:
                values = _load(self.cache_ref, at, piece, problem.v_start, exists)
            outs.append(
                old * fade[:, None]
                + lax.dot_general(
                    weights,
                    values.astype(weights.dtype),
                    (((1,), (0,)), ((), ())),
                    precision=precision,
                    preferred_element_type=jnp.float32,
                )
            )
        return best, total, outs

    def _slots(self, block, masked: bool):
        """Index of a block's tokens in the cache, and which of them exist (None: all)."""
        size, page_size = self.keys, self.problem.page_size
        start = block * size
        tokens = start + jnp.arange(size, dtype=jnp.int32)
        exists = tokens < self.stop if masked else None
        if page_size % size == 0:  # one page holds the block
            page = self.table_ref[self.row, lax.div(start, page_size)]
            return (page, self.kv_head, pl.ds(lax.rem(start, page_size), size)), exists
        columns = self.table_ref.at[self.row, lax.div(tokens, page_size)]
        page = plt.load(columns, mask=exists, other=0) if masked else plt.load(columns)
        return (page, self.kv_head, lax.rem(tokens, page_size)), exists

    def _finish(self, scores: jax.Array, block, masked: bool) -> jax.Array:
        """Scale the scores into exponents of two; apply softcap, ALiBi and mask."""
        problem = self.problem
        scale = problem.scale
        if problem.softcap is not None:
            # tanh(x) = 1 - 2 / (exp(2 x) + 1), in base 2.
            power = jnp.exp2(scores * (2 * LOG2_E * scale / problem.softcap))
            scores, scale = 1.0 - 2.0 / (power + 1.0), problem.softcap
        scores *= scale * LOG2_E
        keys = block * self.keys + jnp.arange(self.keys, dtype=jnp.int32)[None]
        distance = self.positions[:, None] - keys
        if self.slopes is not None:
            scores -= (self.slopes * LOG2_E)[:, None] * distance.astype(jnp.float32)
        if not masked:
            return scores
        visible = (distance >= 0) & (keys < self.stop)
        if problem.window is not None:
            visible &= distance < problem.window
        if problem.sparse is not None:
            visible &= problem.sparse.visible(self.positions[:, None], keys, self.offsets[:, None])
        return jnp.where(visible, scores, _MASKED)


# ---- loads and stores --------------------------------------------------------------------------


def _heads(problem: Problem, rows: int, program, per_tile: int):
    """KV head of a program, and per row of its tile the query head and whether there is one."""
    tiles = -(-problem.group // min(per_tile, problem.heads_per_tile(rows)))
    kv_head, tile = program // tiles, program % tiles
    in_group = tile * per_tile + jnp.arange(rows, dtype=jnp.int32) % per_tile
    return kv_head, kv_head * problem.group + in_group, in_group < problem.group


def _load_queries(problem: Problem, q_ref, tokens, heads, exists) -> list[jax.Array]:
    return [_load(q_ref, (tokens, heads), piece, 0, exists) for piece in problem.k_pieces]


def _columns(ref, at, piece: Piece, start: int):
    """A view of `ref` at the rows `at` and the columns of a piece, and which columns exist."""
    if piece.as_slice:
        return ref.at[(*at, pl.ds(start + piece.start, piece.size))], None
    columns = jnp.arange(piece.size, dtype=jnp.int32)
    rows = [
        jnp.arange(each.size, dtype=jnp.int32) + each.start if isinstance(each, pl.Slice) else each
        for each in at
    ]
    rows = [each[:, None] if getattr(each, "ndim", 0) else each for each in rows]
    exists = None if piece.valid == piece.size else columns < piece.valid
    return ref.at[(*rows, start + piece.start + columns[None])], exists


def _load(ref, at, piece: Piece, start: int, exists):
    """Read `[rows, piece.size]`; rows that do not exist, and columns, are zero."""
    view, columns = _columns(ref, at, piece, start)
    return load_block(view, (_num_rows(at), piece.size), exists, columns)


def _store(ref, at, piece: Piece, value, exists, start: int = 0) -> None:
    view, columns = _columns(ref, at, piece, start)
    plt.store(view, value.astype(ref.dtype), mask=block_mask(value.shape, exists, columns))


def _num_rows(at) -> int:
    return next(
        each.size if isinstance(each, pl.Slice) else each.shape[0]
        for each in at
        if isinstance(each, pl.Slice) or getattr(each, "ndim", 0)
    )


def _params(tiling: Tiling):
    return plt.CompilerParams(num_warps=tiling.num_warps, num_stages=tiling.num_stages)


def _ceil_div(numerator, denominator):
    return -(-numerator // denominator)
