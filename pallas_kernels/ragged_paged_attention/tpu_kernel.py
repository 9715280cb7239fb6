"""The Mosaic kernel of `tpu`: writing new tokens, fetching pages, folding keys into a softmax.

`Kernel` holds what is static. Its call is one grid step: one unit of `tpu_work`. The helpers below
it are views of the same scratch memory.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged_paged_attention import tpu_work as work
from pallas_kernels.ragged_paged_attention.layout import TPU_LANES

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
            return min(block_rows, round_up(group + tile - 1, tile))
        return max(tile, group)


@dataclass(frozen=True)
class Kernel:
    """The kernel's static arguments; calling it traces one grid step, which is one unit.

    Not a tuple: JAX holds kernels by weak references, which tuples cannot have.
    """

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

    def _vmem(self, cache_dtype) -> list[tuple[tuple[int, ...], Any]]:
        """Shape and dtype of keys, maxima, sums, output sums, and old and new tiles."""
        shape, heads, rows = self.shape, self.shape.num_kv_heads, self.block_rows
        tiles = (self.blocks.writes, heads)
        return [
            ((2, heads, self.block_keys, shape.width), cache_dtype),
            ((heads, rows, TPU_LANES), jnp.float32),
            ((heads, rows, TPU_LANES), jnp.float32),
            ((heads, rows, shape.value_width), jnp.float32),
            ((*tiles, shape.tile, shape.width), cache_dtype),
            ((*tiles, 2 * shape.tile, shape.width), cache_dtype),
        ]

    def scratch(self, cache_dtype) -> list:
        """Scratch memory, in the order `__call__` takes it."""
        return [
            *(pltpu.VMEM(shape, dtype) for shape, dtype in self._vmem(cache_dtype)),
            pltpu.SMEM((1,), jnp.int32),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA((self.blocks.writes,)),
            pltpu.SemaphoreType.DMA((self.blocks.writes,)),
        ]

    def vmem_bytes(self, cache_dtype, out_dtype) -> int:
        """VMEM the kernel needs: scratch, blocks in flight, and what one head's products take."""
        shape, rows, keys = self.shape, self.block_rows, self.block_keys
        scratch = sum(
            math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in self._vmem(cache_dtype)
        )
        in_flight = shape.key_end * self.dtype.itemsize + shape.value_width * out_dtype.itemsize
        slopes = 4 * TPU_LANES * self.has_slopes
        blocks = shape.num_kv_heads * rows * 2 * (in_flight + slopes)
        products = 4 * (4 * rows * keys + 2 * rows * shape.value_width + keys * shape.width)
        return scratch + blocks + products

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

            self.each_head(begin)

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

            self.each_head(finish)

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

    def each_head(self, body):
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

    kernel: Kernel
    units: jax.Ref
    table: jax.Ref
    cache: jax.Ref
    keys: jax.Ref
    arrived: jax.Ref

    def _field(self, unit, name):
        return self.units[unit * work.UNIT_FIELDS + name]

    def num_blocks(self, unit):
        pages = self._field(unit, work.END_PAGE) - self._field(unit, work.FIRST_PAGE)
        return lax.div(pages + self.kernel.blocks.pages - 1, self.kernel.blocks.pages)

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

            self.kernel.each_head(clear)


class _Write(NamedTuple):
    """Put the step's tokens into their slots: read whole tiles, change them, write them back."""

    kernel: Kernel
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
        tokens = lax.div(self._field(index, work.SOURCE), tile) * tile
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

        self.kernel.each_head(merge)


class _Attend(NamedTuple):
    """Fold one block of keys into the running softmax of a unit's queries."""

    kernel: Kernel
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
                first = (self.low - self.first_token) * shape.group
                first = lax.div(first, shape.tile) * shape.tile
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
        precision = lax.Precision.HIGHEST if kernel.dtype == jnp.float32 else lax.Precision.DEFAULT

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

        kernel.each_head(fold)


def _divided(rows: jax.Array, group: int) -> jax.Array:
    """rows // group for small rows: vectors of integers have no division."""
    if group & (group - 1) == 0:
        return rows >> (group.bit_length() - 1)
    return ((rows.astype(jnp.float32) + 0.5) * (1.0 / group)).astype(jnp.int32)


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
