"""The specification of ragged paged attention: dense, slow, and meant to be read.

Every token looks at every slot of its row's page table; a mask says which of them count. Memory
is T * P * page_size * K * H, so this is for tests and for reading, not for serving.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention.layout import (
    read_slabs,
    shape_slabs,
    token_rows,
    write_tokens,
)


def ragged_paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: jax.Array,
    kv_lens: jax.Array,
    page_table: jax.Array,
    query_starts: jax.Array,
    distribution: jax.Array,
    alibi_slopes: jax.Array | None,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """See `api.ragged_paged_attention`."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, v_head_dim = k.shape[1], v.shape[2]
    cache = write_tokens(cache, k, v, kv_lens, page_table, query_starts, distribution)
    rows, positions, live = token_rows(kv_lens, query_starts, distribution, num_tokens)

    keys, values = shape_slabs(*read_slabs(cache, page_table[rows]), head_dim, v_head_dim)
    # [T, P, K, H, page_size] and [T, P, K, page_size, Hv] to [T, S, K, ..]
    keys = keys.transpose(0, 1, 4, 2, 3).astype(jnp.float32)
    values = values.transpose(0, 1, 3, 2, 4).astype(jnp.float32)
    keys = keys.reshape(num_tokens, -1, num_kv_heads, head_dim)
    values = values.reshape(num_tokens, -1, num_kv_heads, v_head_dim)
    kv_positions = jnp.arange(keys.shape[1], dtype=jnp.int32)

    distance = positions[:, None] - kv_positions[None, :]  # [T, S], how far back a key lies.
    visible = (distance >= 0) & live[:, None]
    if window is not None:
        visible &= distance < window
    keys = jnp.where(visible[:, :, None, None], keys, 0.0)
    values = jnp.where(visible[:, :, None, None], values, 0.0)

    group = num_heads // num_kv_heads
    keys, values = jnp.repeat(keys, group, axis=2), jnp.repeat(values, group, axis=2)
    high = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("tnh,tsnh->tns", q.astype(jnp.float32), keys, precision=high) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores -= alibi_slopes[None, :, None] * distance[:, None, :]
    scores = jnp.where(visible[:, None, :], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    out = jnp.einsum("tns,tsnh->tnh", weights, values, precision=high)
    return jnp.where(live[:, None, None], out, 0.0).astype(q.dtype), cache
