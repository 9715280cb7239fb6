"""Ragged paged attention for TPUs: one Mosaic kernel a layer.

The kernel first writes the step's keys and values into their pages, then attends. It walks through
units (`tpu_work`): the tokens that one row has in one block of queries. A block of queries stays in
VMEM, with the running maximum, sum and output of each of its queries, until all its rows are done.
A unit's pages come from HBM by DMA, several to a block of keys, into one of two buffers; while one
is multiplied, the next block, of this unit or of the one after it, is on its way. A unit of one
token multiplies only the rows of the block that hold its queries, so decode rows and prompt chunks
share a block and a kernel.

Keys are the lanes [0, K_end) of a slot and values its lanes [V_begin, V_end), both rounded outwards
to whole tiles of 128: queries are zero where a key lane is not the key's, and output lanes that are
not the value's are cut off. Slots that no row has written are zeroed in VMEM before they are used.

Nothing here asks which chip is there: sizes follow the shapes and fit the VMEM of every generation.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged_paged_attention import tpu_work as work
from pallas_kernels.ragged_paged_attention.block_sparse import BlockSparse
from pallas_kernels.ragged_paged_attention.layout import TOKEN_MINOR_RANK, TPU_LANES

VMEM_LIMIT_BYTES = 40 << 20  # The smallest VMEM (v5p, TPU7x) has 64 MiB.
SMEM_BUDGET_BYTES = 768 << 10  # Of 1 MiB, for the page table and the lists of work.
_STATE_BYTES = 10 << 20  # Queries, outputs and running sums of a block of queries, at most.
_KEYS_BYTES = 4 << 20  # One block of keys and values, at most; there are two.
_WRITE_BYTES = 4 << 20  # Tiles that are being written, at most.
_MAX_ROWS = 512  # Rows (queries of one kv head) of a block, at most.
_MAX_KEYS = 512  # Keys of a block, at most.
_MAX_WRITES = 16  # Tiles being written at the same time, at most.
_UNROLL_HEADS = 4  # More kv heads than these are a loop.
_MASKED = -1e30  # Score of a key that is not seen.
_NO_MAXIMUM = -1e29  # Maximum before any key: exp(_MASKED - _NO_MAXIMUM) is zero.


@dataclass(frozen=True)
class Blocks:
    """Sizes that change the speed and not the result.

    queries: tokens per block of queries. pages: pages per block of keys. writes: tiles of slots
    that are written at the same time.
    """

    queries: int
    pages: int
    writes: int


class Shape(NamedTuple):
    """What the kernel knows about its arrays: K, G, page_size and the lanes of keys and values.

    tile: slots, or queries, that are stored together. width: lanes of a slot.
    """

    num_kv_heads: int
    group: int
    page_size: int
    tile: int
    width: int
    key_end: int
    value_begin: int
    value_end: int

    @property
    def value_width(self) -> int:
        return self.value_end - self.value_begin

    def single_rows(self, block_rows: int) -> int:
        """Rows of a block that are multiplied for one token: whole tiles around its queries."""
        tile, group = self.tile, self.group
        if tile % group and group % tile:
            return min(block_rows, _round_up(group + tile - 1, tile))
        return max(tile, group)


def block_sizes(
    shape: Shape, num_tokens: int, max_pages: int, q_bytes: int, cache_bytes: int
) -> Blocks:
    """Sizes for a step of num_tokens; q_bytes and cache_bytes: of one number."""
    row_bytes = shape.num_kv_heads * (
        2 * q_bytes * (shape.key_end + shape.value_width)
        + 4 * (shape.value_width + 2 * TPU_LANES)
    )
    most_rows = min(_MAX_ROWS, _STATE_BYTES // row_bytes)
    step = shape.tile // math.gcd(shape.tile, shape.group)  # Tokens that fill whole tiles.
    queries = max(step, min(most_rows // shape.group, num_tokens + step - 1) // step * step)
    page_bytes = shape.num_kv_heads * shape.page_size * shape.width * cache_bytes
    pages = max(1, min(_MAX_KEYS // shape.page_size, _KEYS_BYTES // page_bytes, max_pages))
    write_bytes = 3 * shape.num_kv_heads * shape.tile * shape.width * cache_bytes
    writes = max(2, min(_MAX_WRITES, _WRITE_BYTES // write_bytes, num_tokens))
    return Blocks(queries, pages, writes)


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
    blocks: Blocks | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, jax.Array]:
    """See `api.ragged_paged_attention`.

    blocks: None chooses by shape. interpret: `pltpu.InterpretParams()` runs it on a CPU.
    Raises NotImplementedError for float16, block-sparse masks, caches that are not laid out for
    TPUs, page sizes that are not whole tiles, and page tables larger than the scalar memory.
    """
    shape = _supported_shape(q, k, v, cache, page_table, block_sparse, v_head_dim)
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, group, tile = shape.num_kv_heads, shape.group, shape.tile
    num_rows, max_pages = page_table.shape
    dtype = jnp.promote_types(q.dtype, cache.dtype)
    if blocks is None:
        blocks = block_sizes(
            shape, num_tokens, max_pages, dtype.itemsize, cache.dtype.itemsize
        )
    num_blocks = -(-num_tokens // blocks.queries)
    padded_tokens = num_blocks * blocks.queries
    block_rows = blocks.queries * group
    metadata = kv_lens, page_table, query_starts, distribution
    units = work.unit_list(
        *metadata,
        num_blocks=num_blocks,
        block=blocks.queries,
        page_size=shape.page_size,
        window=window,
    )
    writes, num_writes = work.write_list(
        *metadata, num_tokens=num_tokens, page_size=shape.page_size, tile=tile
    )
    scalars = (units, writes, num_writes, page_table.reshape(-1))
    smem_bytes = sum(4 * each.size for each in scalars)
    if smem_bytes > SMEM_BUDGET_BYTES:
        raise NotImplementedError(
            f"a page table of {num_rows} x {max_pages} entries and its lists of work take "
            f"{smem_bytes} bytes of scalar memory; {SMEM_BUDGET_BYTES} fit. Use larger pages."
        )

    queries = q.astype(dtype).reshape(num_tokens, num_kv_heads, group, head_dim)
    queries = jnp.pad(
        queries.transpose(1, 0, 2, 3),
        ((0, 0), (0, padded_tokens - num_tokens), (0, 0), (0, shape.key_end - head_dim)),
    ).reshape(num_kv_heads, padded_tokens * group, shape.key_end)
    new = k if v is None else jnp.concatenate([k, v], -1)
    new = jnp.pad(
        new.astype(cache.dtype).transpose(1, 0, 2),
        (
            (0, 0),
            (tile, _round_up(num_tokens, tile) - num_tokens + 2 * tile),
            (0, shape.width - new.shape[2]),
        ),
    )
    arrays = [queries, new, cache]
    rows_spec = partial(pl.BlockSpec, index_map=_block_of_unit)
    in_specs = [rows_spec((num_kv_heads, block_rows, shape.key_end)), _in_hbm(), _in_hbm()]
    if alibi_slopes is not None:
        slopes = alibi_slopes.astype(jnp.float32).reshape(num_kv_heads, 1, group)
        slopes = jnp.broadcast_to(slopes, (num_kv_heads, blocks.queries, group))
        arrays.append(slopes.reshape(num_kv_heads, block_rows, 1))
        in_specs.append(pl.BlockSpec(memory_space=pltpu.VMEM))
    kernel = _Kernel(shape, blocks, scale, window, softcap, alibi_slopes is not None, dtype)
    out_shape = (num_kv_heads, padded_tokens * group, shape.value_width)
    out, cache = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(work.num_units(num_blocks, num_rows),),
            in_specs=in_specs,
            out_specs=[rows_spec((num_kv_heads, block_rows, shape.value_width)), _in_hbm()],
            scratch_shapes=kernel.scratch(cache.dtype),
        ),
        out_shape=[
            _made_of(*scalars, *arrays, shape=out_shape, dtype=q.dtype),
            _made_of(*scalars, *arrays, shape=cache.shape, dtype=cache.dtype),
        ],
        input_output_aliases={len(scalars) + 2: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_LIMIT_BYTES
        ),
        interpret=interpret,
        name="ragged_paged_attention",
    )(*scalars, *arrays)
    out = out.reshape(num_kv_heads, padded_tokens, group, shape.value_width)
    first = 0 if v is None else head_dim - shape.value_begin
    out = out[:, :num_tokens, :, first : first + v_head_dim].transpose(1, 0, 2, 3)
    return out.reshape(num_tokens, num_heads, v_head_dim), cache


def _supported_shape(q, k, v, cache, page_table, block_sparse, v_head_dim) -> Shape:
    """The kernel's view of the arrays; NotImplementedError if it cannot do them."""
    head_dim = q.shape[2]
    if block_sparse is not None:
        raise NotImplementedError("block-sparse masks are not part of the TPU kernel")
    if any(x.dtype == jnp.float16 for x in (q, cache)):
        raise NotImplementedError(
            "TPUs do not compute in float16: use bfloat16 or float32 (--dtype bfloat16)"
        )
    width = _round_up(head_dim if v is None else head_dim + v_head_dim, TPU_LANES)
    if cache.ndim == TOKEN_MINOR_RANK or cache.shape[3] != width:
        raise NotImplementedError(
            f"cache {cache.shape} is not laid out for TPUs: its last size would be {width} "
            f"(cache_shape(..., platform='tpu'))"
        )
    tile = 8 * 4 // cache.dtype.itemsize
    page_size = cache.shape[2]
    if page_size % tile or page_table.shape[0] == 0 or q.shape[0] == 0:
        raise NotImplementedError(
            f"page_size is {page_size}; the TPU kernel needs a multiple of {tile} for "
            f"{cache.dtype}, and at least one row and token"
        )
    value_begin = 0 if v is None else head_dim
    return Shape(
        num_kv_heads=k.shape[1],
        group=q.shape[1] // k.shape[1],
        page_size=page_size,
        tile=tile,
        width=width,
        key_end=_round_up(head_dim, TPU_LANES),
        value_begin=value_begin // TPU_LANES * TPU_LANES,
        value_end=_round_up(value_begin + v_head_dim, TPU_LANES),
    )


class _Kernel(NamedTuple):
    """The kernel's static arguments; calling it traces one grid step, which is one unit."""

    shape: Shape
    blocks: Blocks
    scale: float
    window: int | None
    softcap: float | None
    has_slopes: bool
    dtype: jnp.dtype

    @property
    def block_keys(self) -> int:
        return self.blocks.pages * self.shape.page_size

    @property
    def block_rows(self) -> int:
        return self.blocks.queries * self.shape.group

    def scratch(self, cache_dtype) -> list:
        """Scratch memory, in the order `__call__` takes it."""
        shape, heads, rows = self.shape, self.shape.num_kv_heads, self.block_rows
        tiles = (self.blocks.writes, heads)
        return [
            pltpu.VMEM((2, heads, self.block_keys, shape.width), cache_dtype),
            pltpu.VMEM((heads, rows, TPU_LANES), jnp.float32),
            pltpu.VMEM((heads, rows, TPU_LANES), jnp.float32),
            pltpu.VMEM((heads, rows, shape.value_width), jnp.float32),
            pltpu.VMEM((*tiles, shape.tile, shape.width), cache_dtype),
            pltpu.VMEM((*tiles, 2 * shape.tile, shape.width), cache_dtype),
            pltpu.SMEM((1,), jnp.int32),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA((self.blocks.writes,)),
            pltpu.SemaphoreType.DMA((self.blocks.writes,)),
        ]

    def __call__(self, units, writes, num_writes, table, q, new, _, *refs):
        # The old cache is not touched by name: the new one is the same memory.
        slopes, refs = (refs[0], refs[1:]) if self.has_slopes else (None, refs)
        out, cache, keys, maxima, sums, acc, old_tiles, new_tiles, buffer, *semaphores = refs
        page_arrived, tile_arrived, tile_written = semaphores
        unit, num_units = pl.program_id(0), pl.num_programs(0)
        fetch = _Fetch(self, units, table, cache, keys, page_arrived)

        def field(name, at=unit):
            return units[at * work.UNIT_FIELDS + name]

        block = field(work.BLOCK)
        num_blocks = fetch.num_blocks(unit)

        @pl.when(unit == 0)
        def _():
            self._clear(keys)
            _Write(self, writes, new, cache, old_tiles, new_tiles, tile_arrived, tile_written)(
                num_writes[0]
            )
            buffer[0] = 0
            fetch.start(0, 0, 0)

        @pl.when((unit == 0) | (field(work.BLOCK, jnp.maximum(unit - 1, 0)) != block))
        def _():
            def begin(head):
                maxima[head] = jnp.full(maxima.shape[1:], _NO_MAXIMUM, jnp.float32)
                sums[head] = jnp.zeros(sums.shape[1:], jnp.float32)
                acc[head] = jnp.zeros(acc.shape[1:], jnp.float32)

            self._each_head(begin)

        attend = _Attend(
            self,
            *(q, slopes, keys, maxima, sums, acc),
            *(block * self.blocks.queries, field(work.LOW), field(work.HIGH), field(work.SHIFT)),
        )

        def each_block(index, slot):
            is_last = index + 1 == num_blocks

            @pl.when(~is_last)
            def _():
                fetch.start(unit, index + 1, 1 - slot)

            @pl.when(is_last & (unit + 1 < num_units))
            def _():
                fetch.start(unit + 1, 0, 1 - slot)

            fetch.wait(unit, index, slot)

            @pl.when(is_last)
            def _():
                fetch.clear_unwritten(unit, index, slot)

            attend(slot, (field(work.FIRST_PAGE) * self.shape.page_size + index * self.block_keys))
            return 1 - slot

        buffer[0] = lax.fori_loop(0, num_blocks, each_block, buffer[0])

        next_block = field(work.BLOCK, jnp.minimum(unit + 1, num_units - 1))

        @pl.when((unit + 1 == num_units) | (next_block != block))
        def _():
            def finish(head):
                total = sums[head][:, :1]
                out[head] = (acc[head] / jnp.where(total == 0.0, 1.0, total)).astype(out.dtype)

            self._each_head(finish)

    def _clear(self, keys):
        """Make both buffers finite: what a DMA leaves untouched must not hold a NaN."""
        shape = self.shape

        def each(index, carry):
            slots = pl.ds(pl.multiple_of(index * shape.page_size, shape.page_size), shape.page_size)
            for slot in range(2):
                keys[slot, :, slots, :] = jnp.zeros(
                    (shape.num_kv_heads, shape.page_size, shape.width), keys.dtype
                )
            return carry

        lax.fori_loop(0, self.blocks.pages, each, 0)

    def _each_head(self, body):
        if self.shape.num_kv_heads <= _UNROLL_HEADS:
            for head in range(self.shape.num_kv_heads):
                body(head)
        else:

            def each(head, carry):
                body(head)
                return carry

            lax.fori_loop(0, self.shape.num_kv_heads, each, 0)


class _Fetch(NamedTuple):
    """DMA of a unit's pages into one of the two buffers."""

    kernel: _Kernel
    units: jax.Ref
    table: jax.Ref
    cache: jax.Ref
    keys: jax.Ref
    arrived: jax.Ref

    def _field(self, unit, name):
        return self.units[unit * work.UNIT_FIELDS + name]

    def num_blocks(self, unit):
        pages = self._field(unit, work.END_PAGE) - self._field(unit, work.FIRST_PAGE)
        return (pages + self.kernel.blocks.pages - 1) // self.kernel.blocks.pages

    def _slots(self, page):
        size = self.kernel.shape.page_size
        return pl.ds(pl.multiple_of(page * size, size), size)

    def _each_page(self, unit, block, slot, do):
        first = self._field(unit, work.FIRST_PAGE) + block * self.kernel.blocks.pages
        count = jnp.minimum(self._field(unit, work.END_PAGE) - first, self.kernel.blocks.pages)
        row = self._field(unit, work.TABLE) + first

        def each(page, carry):
            target = self.keys.at[slot, :, self._slots(page), :]
            source = self.cache.at[self.table[row + page]]
            do(pltpu.make_async_copy(source, target, self.arrived.at[slot]))
            return carry

        lax.fori_loop(0, count, each, 0)

    def start(self, unit, block, slot):
        self._each_page(unit, block, slot, lambda copy: copy.start())

    def wait(self, unit, block, slot):
        self._each_page(unit, block, slot, lambda copy: copy.wait())

    def clear_unwritten(self, unit, block, slot):
        """Zero the slots past the row's end in the last page of the unit's last block."""
        last = self._field(unit, work.END_PAGE) - 1
        size = self.kernel.shape.page_size
        written = self._field(unit, work.KV_LEN) - last * size

        @pl.when(written < size)
        def _():
            page = last - self._field(unit, work.FIRST_PAGE) - block * self.kernel.blocks.pages
            slots = self._slots(page)

            def clear(head):
                held = self.keys[slot, head, slots, :].astype(jnp.float32)
                counts = lax.broadcasted_iota(jnp.int32, held.shape, 0) < written
                held = jnp.where(counts, held, 0.0)
                self.keys[slot, head, slots, :] = held.astype(self.keys.dtype)

            self.kernel._each_head(clear)


class _Write(NamedTuple):
    """Put the step's tokens into their slots: read whole tiles, change them, write them back."""

    kernel: _Kernel
    writes: jax.Ref
    new: jax.Ref
    cache: jax.Ref
    old_tiles: jax.Ref
    new_tiles: jax.Ref
    arrived: jax.Ref
    written: jax.Ref

    def __call__(self, count):
        depth = self.kernel.blocks.writes
        ahead = max(1, depth // 2)

        def first(index, carry):
            self._read(index, lambda copy: copy.start())
            return carry

        def each(index, carry):
            self._read(index, lambda copy: copy.wait())
            self._merge(index)
            self._write_back(index).start()

            @pl.when(index + ahead < count)
            def _():
                @pl.when(index + ahead >= depth)
                def _():
                    self._write_back(index + ahead - depth).wait()

                self._read(index + ahead, lambda copy: copy.start())

            return carry

        def last(index, carry):
            self._write_back(index).wait()
            return carry

        lax.fori_loop(0, jnp.minimum(ahead, count), first, 0)
        lax.fori_loop(0, count, each, 0)
        lax.fori_loop(jnp.maximum(0, count - depth), count, last, 0)

    def _field(self, index, name):
        return self.writes[index * work.WRITE_FIELDS + name]

    def _stored(self, index):
        tile = self.kernel.shape.tile
        slots = pl.ds(pl.multiple_of(self._field(index, work.SLOT), tile), tile)
        return self.cache.at[self._field(index, work.PAGE), :, slots, :]

    def _read(self, index, do):
        """The tile as it is, and the two tiles that the new tokens lie in."""
        slot, tile = lax.rem(index, self.kernel.blocks.writes), self.kernel.shape.tile
        do(
            pltpu.make_async_copy(
                self._stored(index), self.old_tiles.at[slot], self.arrived.at[slot]
            )
        )
        tokens = self._field(index, work.SOURCE) // tile * tile
        source = self.new.at[:, pl.ds(pl.multiple_of(tokens, tile), 2 * tile), :]
        do(pltpu.make_async_copy(source, self.new_tiles.at[slot], self.arrived.at[slot]))

    def _write_back(self, index):
        slot = lax.rem(index, self.kernel.blocks.writes)
        return pltpu.make_async_copy(
            self.old_tiles.at[slot], self._stored(index), self.written.at[slot]
        )

    def _merge(self, index):
        slot, tile = lax.rem(index, self.kernel.blocks.writes), self.kernel.shape.tile
        begin, end = self._field(index, work.BEGIN), self._field(index, work.END)
        # Rows are turned up by the offset, that is down by what is left of the two tiles.
        turn = lax.rem(2 * tile - lax.rem(self._field(index, work.SOURCE), tile), 2 * tile)

        def merge(head):
            # In float32, which keeps a 16-bit number's value: rows of those cannot be rotated.
            fresh = self.new_tiles[slot, head].astype(jnp.float32)
            fresh = pltpu.roll(fresh, turn, 0)[:tile]
            held = self.old_tiles[slot, head].astype(jnp.float32)
            rows = lax.broadcasted_iota(jnp.int32, held.shape, 0)
            held = jnp.where((rows >= begin) & (rows < end), fresh, held)
            self.old_tiles[slot, head] = held.astype(self.old_tiles.dtype)

        self.kernel._each_head(merge)


class _Attend(NamedTuple):
    """Fold one block of keys into the running softmax of a unit's queries."""

    kernel: _Kernel
    q: jax.Ref
    slopes: jax.Ref | None
    keys: jax.Ref
    maxima: jax.Ref
    sums: jax.Ref
    acc: jax.Ref
    first_token: jax.Array
    low: jax.Array
    high: jax.Array
    shift: jax.Array

    def __call__(self, slot, first_key):
        kernel = self.kernel
        rows, shape = kernel.block_rows, kernel.shape
        single_rows = shape.single_rows(rows)
        is_single = self.high - self.low == 1
        sees_all = (
            (first_key + kernel.block_keys <= self.low + self.shift + 1)
            & (self.low == self.first_token)
            & (self.high == self.first_token + kernel.blocks.queries)
        )
        if kernel.window is not None:
            sees_all &= self.high - 1 + self.shift - first_key < kernel.window

        if single_rows < rows:

            @pl.when(is_single)
            def _():
                first = (self.low - self.first_token) * shape.group // shape.tile * shape.tile
                first = pl.multiple_of(jnp.minimum(first, rows - single_rows), shape.tile)
                self._fold(slot, first_key, first, single_rows, masked=True)

            is_tile = ~is_single
        else:
            is_tile = True

        @pl.when(is_tile & sees_all)
        def _():
            self._fold(slot, first_key, 0, rows, masked=False)

        @pl.when(is_tile & ~sees_all)
        def _():
            self._fold(slot, first_key, 0, rows, masked=True)

    def _fold(self, slot, first_key, first_row, num_rows: int, *, masked: bool):
        kernel, shape = self.kernel, self.kernel.shape
        rows = pl.ds(first_row, num_rows)
        row = first_row + lax.broadcasted_iota(jnp.int32, (num_rows, 1), 0)
        token = self.first_token + _divided(row, shape.group)
        position = token + self.shift
        if masked:
            # Other rows' queries see nothing.
            position = jnp.where((token >= self.low) & (token < self.high), position, -1)
        key_position = first_key + lax.broadcasted_iota(jnp.int32, (1, kernel.block_keys), 1)
        precision = (
            lax.Precision.HIGHEST if kernel.dtype == jnp.float32 else lax.Precision.DEFAULT
        )

        def fold(head):
            keys = self.keys[slot, head, :, : shape.key_end].astype(kernel.dtype)
            scores = lax.dot_general(
                self.q[head, rows, :],
                keys,
                (((1,), (1,)), ((), ())),
                precision=precision,
                preferred_element_type=jnp.float32,
            )
            scores *= kernel.scale
            if kernel.softcap is not None:
                scores = kernel.softcap * jnp.tanh(scores / kernel.softcap)
            distance = position - key_position
            if self.slopes is not None:
                scores -= self.slopes[head, rows, :] * distance.astype(jnp.float32)
            if masked:
                seen = distance >= 0
                if kernel.window is not None:
                    seen &= distance < kernel.window
                scores = jnp.where(seen, scores, _MASKED)
            old_maximum = self.maxima[head, rows, :]
            maximum = jnp.maximum(old_maximum, scores.max(1, keepdims=True))
            weights = jnp.exp(scores - maximum[:, :1])
            fade = jnp.exp(old_maximum - maximum)
            values = self.keys[slot, head, :, shape.value_begin : shape.value_end]
            part = lax.dot_general(
                weights.astype(kernel.dtype),
                values.astype(kernel.dtype),
                (((1,), (0,)), ((), ())),
                precision=precision,
                preferred_element_type=jnp.float32,
            )
            self.sums[head, rows, :] = self.sums[head, rows, :] * fade + weights.sum(
                1, keepdims=True
            )
            self.acc[head, rows, :] = self.acc[head, rows, :] * fade[:, :1] + part
            self.maxima[head, rows, :] = maximum

        kernel._each_head(fold)


def _block_of_unit(unit, units, *_):
    return 0, units[unit * work.UNIT_FIELDS + work.BLOCK], 0


def _made_of(*arrays: jax.Array, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    """An array that varies over the same axes of an enclosing shard_map as `arrays` together."""

    def make(*arrays):
        return sum((each.reshape(-1)[0].astype(dtype) for each in arrays), jnp.zeros(shape, dtype))

    return jax.eval_shape(make, *arrays)


def _in_hbm() -> pl.BlockSpec:
    return pl.BlockSpec(memory_space=pltpu.HBM)


def _divided(rows: jax.Array, group: int) -> jax.Array:
    """rows // group for small rows: vectors of integers have no division."""
    if group & (group - 1) == 0:
        return rows >> (group.bit_length() - 1)
    return ((rows.astype(jnp.float32) + 0.5) * (1.0 / group)).astype(jnp.int32)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
