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
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged_paged_attention import tpu_work as work
from pallas_kernels.ragged_paged_attention.block_sparse import BlockSparse
from pallas_kernels.ragged_paged_attention.layout import TOKEN_MINOR_RANK, TPU_LANES
from pallas_kernels.ragged_paged_attention.tpu_kernel import Blocks, Kernel, Shape, round_up

VMEM_BUDGET_BYTES = 48 << 20  # Of 64 MiB, the smallest VMEM (v5p, TPU7x).
VMEM_MARGIN_BYTES = 2 << 20  # What the compiler adds to the kernel's own count.
SMEM_BUDGET_BYTES = 768 << 10  # Of 1 MiB, for the page table and the lists of work.
_STATE_BYTES = 10 << 20  # Queries, outputs and running sums of a block of queries, at most.
_KEYS_BYTES = 4 << 20  # One block of keys and values, at most; there are two.
_WRITE_BYTES = 4 << 20  # Tiles that are being written, at most.
_MAX_ROWS = 512  # Rows (queries of one kv head) of a block, at most.
_MAX_KEYS = 512  # Keys of a block, at most.
_MAX_WRITES = 16  # Tiles being written at the same time, at most.


def block_sizes(
    shape: Shape, num_tokens: int, max_pages: int, q_bytes: int, cache_bytes: int
) -> Blocks:
    """Sizes for a step of num_tokens; q_bytes and cache_bytes: of one number."""
    row_bytes = shape.num_kv_heads * (
        2 * q_bytes * (shape.key_end + shape.value_width) + 4 * (shape.value_width + 2 * TPU_LANES)
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
        blocks = block_sizes(shape, num_tokens, max_pages, dtype.itemsize, cache.dtype.itemsize)
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
            (tile, round_up(num_tokens, tile) - num_tokens + 2 * tile),
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
    kernel = Kernel(shape, blocks, scale, window, softcap, alibi_slopes is not None, dtype)
    vmem_bytes = kernel.vmem_bytes(cache.dtype, q.dtype) + VMEM_MARGIN_BYTES
    if vmem_bytes > VMEM_BUDGET_BYTES:
        raise NotImplementedError(
            f"one page of {cache.shape[1:]} and a block of {block_rows} rows take {vmem_bytes} "
            f"bytes of vector memory; {VMEM_BUDGET_BYTES} fit. Use smaller pages."
        )
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
            dimension_semantics=("arbitrary",), vmem_limit_bytes=vmem_bytes
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
    width = round_up(head_dim if v is None else head_dim + v_head_dim, TPU_LANES)
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
        key_end=round_up(head_dim, TPU_LANES),
        value_begin=value_begin // TPU_LANES * TPU_LANES,
        value_end=round_up(value_begin + v_head_dim, TPU_LANES),
    )


def _block_of_unit(unit, units, *_):
    return 0, units[unit * work.UNIT_FIELDS + work.BLOCK], 0


def _made_of(*arrays: jax.Array, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    """An array that varies over the same axes of an enclosing shard_map as `arrays` together."""

    def make(*arrays):
        return sum((each.reshape(-1)[0].astype(dtype) for each in arrays), jnp.zeros(shape, dtype))

    return jax.eval_shape(make, *arrays)


def _in_hbm() -> pl.BlockSpec:
    return pl.BlockSpec(memory_space=pltpu.HBM)
