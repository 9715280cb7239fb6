"""What a step asks of the TPU kernel, as lists of integers its scalar core walks through.

Made by XLA from the step's metadata: a few vector operations over rows, the same for every layer,
so that a compiled step does them once. Both lists are flat i32 arrays, FIELDS numbers an entry.
"""

import jax
import jax.numpy as jnp

# A unit: the tokens that one row has in one block of queries.
TABLE, FIRST_PAGE, END_PAGE, KV_LEN, LOW, HIGH, SHIFT, BLOCK = range(8)
UNIT_FIELDS = 8
# A write: the new tokens that one row puts into one tile of slots.
PAGE, SLOT, SOURCE, BEGIN, END = range(5)
WRITE_FIELDS = 5


def num_units(num_blocks: int, num_rows: int) -> int:
    """Units of a step, at most: every row begins one, and so does every block."""
    return num_blocks + num_rows


def unit_list(
    kv_lens: jax.Array,
    page_table: jax.Array,
    query_starts: jax.Array,
    distribution: jax.Array,
    *,
    num_blocks: int,
    block: int,
    page_size: int,
    window: int | None,
) -> jax.Array:
    """Units in the order of their tokens: i32[num_units * UNIT_FIELDS].

    Every one of the num_blocks blocks of `block` tokens has a unit; those without a live token,
    and what fills up the list, read no pages.

        TABLE: where the row's pages begin in the flat page table
        FIRST_PAGE, END_PAGE: columns of it that the unit's queries see
        KV_LEN: the row's tokens
        LOW, HIGH: the unit's tokens [LOW, HIGH)
        SHIFT: position of a token minus its index in the step
        BLOCK: the block of queries
    """
    num_rows, max_pages = page_table.shape
    starts, ends, is_live = _rows(query_starts, distribution)
    first_block = starts // block
    counts = jnp.where(is_live & (ends > starts), (ends - 1) // block - first_block + 1, 0)
    unit_ends = jnp.cumsum(counts)
    total = unit_ends[-1]
    units = jnp.arange(num_units(num_blocks, num_rows), dtype=jnp.int32)
    row = _row_of(unit_ends, units)
    has_row = units < total

    empty_block = -(-query_starts[distribution[2]] // block) + units - total
    row_block = first_block[row] + units - (unit_ends - counts)[row]
    blocks = jnp.where(has_row, row_block, jnp.minimum(empty_block, num_blocks - 1))
    low = jnp.maximum(starts[row], blocks * block)
    high = jnp.minimum(ends[row], (blocks + 1) * block)
    shift = kv_lens[row] - ends[row]
    first_seen = 0 if window is None else jnp.maximum(low + shift - window + 1, 0)
    fields = {
        TABLE: row * max_pages,
        FIRST_PAGE: jnp.broadcast_to(first_seen // page_size, row.shape),
        END_PAGE: -(-(high + shift) // page_size),
        KV_LEN: kv_lens[row],
        LOW: low,
        HIGH: high,
        SHIFT: shift,
    }
    fields = {name: jnp.where(has_row, field, 0) for name, field in fields.items()}
    fields[BLOCK] = blocks
    return _flat(fields)


def num_writes(num_tokens: int, num_rows: int, tile: int) -> int:
    """Writes of a step, at most: a row's tokens may begin and end inside a tile."""
    return min(num_tokens, num_tokens // tile + 2 * num_rows)


def write_list(
    kv_lens: jax.Array,
    page_table: jax.Array,
    query_starts: jax.Array,
    distribution: jax.Array,
    *,
    num_tokens: int,
    page_size: int,
    tile: int,
) -> tuple[jax.Array, jax.Array]:
    """Writes i32[num_writes * WRITE_FIELDS], and how many of them count, i32[1].

    PAGE, SLOT: the page, and the first slot of the tile in it
    SOURCE: the token that belongs into that slot, plus `tile`: never negative
    BEGIN, END: the slots of the tile that are written, [BEGIN, END)
    """
    starts, ends, is_live = _rows(query_starts, distribution)
    shift = kv_lens - ends
    first_tile = (starts + shift) // tile
    counts = jnp.where(is_live & (ends > starts), (kv_lens - 1) // tile - first_tile + 1, 0)
    write_ends = jnp.cumsum(counts)
    writes = jnp.arange(num_writes(num_tokens, kv_lens.shape[0], tile), dtype=jnp.int32)
    row = _row_of(write_ends, writes)
    position = (first_tile[row] + writes - (write_ends - counts)[row]) * tile
    token = position - shift[row]
    fields = {
        PAGE: page_table.at[row, position // page_size].get(mode="clip"),
        SLOT: position % page_size,
        SOURCE: token + tile,
        BEGIN: jnp.maximum(starts[row] - token, 0),
        END: jnp.minimum(ends[row] - token, tile),
    }
    return _flat(fields), write_ends[-1:]


def _rows(query_starts: jax.Array, distribution: jax.Array):
    """First and last-but-one token of each row, and whether it is live."""
    rows = jnp.arange(query_starts.shape[0] - 1, dtype=jnp.int32)
    return query_starts[:-1], query_starts[1:], rows < distribution[2]


def _row_of(ends: jax.Array, entries: jax.Array) -> jax.Array:
    """The row of each entry of a list whose rows end at `ends`; in range for those behind it."""
    rows = jnp.searchsorted(ends, entries, side="right", method="compare_all")
    return jnp.minimum(rows.astype(jnp.int32), ends.shape[0] - 1)


def _flat(fields: dict[int, jax.Array]) -> jax.Array:
    return jnp.stack([fields[name] for name in range(len(fields))], 1).astype(jnp.int32).reshape(-1)
