"""The grouped matrix product in plain JAX: a loop over blocks of rows, and XLA's ragged dot."""

import jax
import jax.numpy as jnp
from jax import lax

# Rows per block, for up to so many rows per group on average; README has the numbers.
_BLOCKS = ((1, 2), (4, 8), (16, 32))
_LARGE_BLOCK = 32


def block_size(num_rows: int, num_groups: int) -> int:
    """Rows per block for num_rows dealt to num_groups."""
    fitting = (block for block, average in _BLOCKS if num_rows < average * num_groups)
    return next(fitting, _LARGE_BLOCK)


def blocks(
    x: jax.Array, w: jax.Array, group_sizes: jax.Array, block: int | None = None
) -> jax.Array:
    """See `api.grouped_matmul`. Each trip multiplies `block` rows of one group.

    As many trips are made as there are blocks with rows in them; empty groups cost nothing.
    """
    num_rows = x.shape[0]
    size = min(block or block_size(num_rows, w.shape[0]), num_rows)
    counts = -(-group_sizes // size)
    count_ends, ends = jnp.cumsum(counts), jnp.cumsum(group_sizes)

    def trip(index: jax.Array, out: jax.Array) -> jax.Array:
        group = jnp.searchsorted(count_ends, index, side="right", method="compare_all")
        group = jnp.minimum(group, w.shape[0] - 1).astype(jnp.int32)
        start = ends[group] - group_sizes[group]
        start += (index - count_ends[group] + counts[group]) * size
        # The last block may stick out of the array: slide it back, and write only its own rows.
        first = jnp.minimum(start, num_rows - size)
        matrix = lax.dynamic_index_in_dim(w, group, keepdims=False)
        product = jnp.dot(
            lax.dynamic_slice_in_dim(x, first, size),
            matrix,
            precision=_precision(x),
            preferred_element_type=jnp.float32,
        ).astype(x.dtype)
        if size > 1:
            rows = first + jnp.arange(size, dtype=jnp.int32)
            own = (rows >= start) & (rows < ends[group])
            before = lax.dynamic_slice_in_dim(out, first, size)
            product = jnp.where(own[:, None], product, before)
        return lax.dynamic_update_slice_in_dim(out, product, first, 0)

    return lax.fori_loop(0, count_ends[-1], trip, jnp.zeros((num_rows, w.shape[2]), x.dtype))


def ragged_dot(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """See `api.grouped_matmul`. XLA does not promise what it makes of unused rows."""
    used = (jnp.arange(x.shape[0]) < group_sizes.sum())[:, None]
    out = lax.ragged_dot(
        jnp.where(used, x, 0),
        w,
        group_sizes,
        precision=_precision(x),
        preferred_element_type=jnp.float32,
    )
    return jnp.where(used, out, 0).astype(x.dtype)


def _precision(x: jax.Array) -> lax.Precision:
    """Do not round float32 operands to a shorter type."""
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
