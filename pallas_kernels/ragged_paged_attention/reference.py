"""The specification of ragged paged attention: one token at a time, and meant to be read.

Every token looks at every slot of its row's page table; a mask says which of them count. For
tests and for reading, not for serving.
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention.block_sparse import BlockSparse
from pallas_kernels.ragged_paged_attention.layout import (
    read_shared,
    read_slabs,
    shape_slabs,
    token_rows,
    write_tokens,
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
) -> tuple[jax.Array, jax.Array]:
    """See `api.ragged_paged_attention`."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    group = num_heads // num_kv_heads
    product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    slopes = jnp.zeros(num_heads) if alibi_slopes is None else alibi_slopes
    cache = write_tokens(cache, k, v, kv_lens, page_table, query_starts, distribution)

    def attend(token):
        query, row, position, live = token
        if v is None:
            keys = read_shared(cache, page_table[row], head_dim).swapaxes(1, 2)
            keys = keys.reshape(-1, num_kv_heads, head_dim)
            values = keys[..., :v_head_dim]
        else:
            slabs = read_slabs(cache, page_table[row], head_dim, v_head_dim)
            keys, values = shape_slabs(*slabs, head_dim, v_head_dim)
            # [P, K, H, page_size] and [P, K, page_size, Hv] to [S, K, ..]
            keys = keys.transpose(0, 3, 1, 2).reshape(-1, num_kv_heads, head_dim)
            values = values.transpose(0, 2, 1, 3).reshape(-1, num_kv_heads, v_head_dim)
        keys, values = (jnp.repeat(x.astype(jnp.float32), group, 1) for x in (keys, values))

        key_positions = jnp.arange(keys.shape[0])
        distance = position - key_positions  # How far back each key lies.
        visible = (distance >= 0) & live
        if window is not None:
            visible &= distance < window
        visible = visible[:, None]
        if block_sparse is not None and block_offsets is not None:
            visible &= block_sparse.visible(position, key_positions[:, None], block_offsets)
        keys, values = (jnp.where(visible[..., None], x, 0.0) for x in (keys, values))

        # Products of matrices, as XLA for CPUs (JAX 0.10.2) gets the same sums over elementwise
        # products wrong from 112 heads on.
        scores = product("nh,snh->sn", query.astype(jnp.float32), keys) * scale
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        scores -= slopes * distance[:, None]
        scores = jnp.where(visible, scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=0)
        return jnp.where(live, product("sn,snh->nh", weights, values), 0.0)

    rows, positions, live = token_rows(kv_lens, query_starts, distribution, num_tokens)
    out = jax.lax.map(attend, (q, rows, positions, live))
    return out.astype(q.dtype), cache
