"""Where a token's key and value live in a paged cache; shared by every implementation.

One page of one kv head is a slab of keys and a slab of values, each page_size * D elements with
D = max(H, Hv):

    cache[page, 0, head] as [D, page_size]:  key of slot s is the column [:H, s]
    cache[page, 1, head] as [page_size, D]:  value of slot s is the row [s, :Hv]

Keys lie token-minor so that queries @ keys and weights @ values are both plain row-major matrix
products; a transposed operand makes the first one four times slower on a CPU.

Where values are the first Hv numbers of their key (multi-head latent attention, DeepSeek-AI 2024,
arXiv:2405.04434), a page keeps the keys alone, H numbers a token and nothing else:

    cache[page, s, head] as [H]:  key of slot s; its value is [:Hv]

(not flattened: XLA for CPU copies a whole cache whose reshape moves an axis of size 1).

Functions here are told so by `shared_kv`, or by a `v` that is None.
"""

import jax
import jax.numpy as jnp


def cache_shape(
    num_pages: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int,
    dtype,
    *,
    shared_kv: bool = False,
) -> tuple[int, ...]:
    """Shape of one layer's cache array, of `dtype`: [num_pages, 2, K, page_size * max(H, Hv)].

    shared_kv: values are the first v_head_dim numbers of their key: [num_pages, page_size, K, H].
    """
    del dtype  # No layout here depends on the element size.
    if shared_kv:
        return (num_pages, page_size, num_kv_heads, head_dim)
    return (num_pages, 2, num_kv_heads, page_size * max(head_dim, v_head_dim))


def cache_axes() -> tuple[str | None, ...]:
    """Logical name of each cache axis, for sharding: "pages", "kv_heads" or None."""
    return ("pages", None, "kv_heads", None)


def page_size_of(cache: jax.Array, head_dim: int, v_head_dim: int, *, shared_kv: bool) -> int:
    """Tokens one page of `cache` holds."""
    return cache.shape[1] if shared_kv else cache.shape[3] // max(head_dim, v_head_dim)


def token_rows(
    kv_lens: jax.Array, query_starts: jax.Array, distribution: jax.Array, num_tokens: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """For each token of the step: its row i32[T], position i32[T], and whether it is live bool[T].

    Row and position of a padding token are in range but mean nothing.
    """
    tokens = jnp.arange(num_tokens, dtype=jnp.int32)
    num_rows = kv_lens.shape[0]
    live = tokens < query_starts[distribution[2]]
    is_live_row = jnp.arange(num_rows) < distribution[2]
    ends = jnp.where(is_live_row, query_starts[1:], num_tokens)
    rows = jnp.searchsorted(ends, tokens, side="right", method="compare_all")
    rows = jnp.minimum(rows.astype(jnp.int32), num_rows - 1)
    positions = kv_lens[rows] - query_starts[rows + 1] + tokens
    return rows, jnp.where(live, positions, 0), live


def write_tokens(
    cache: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    kv_lens: jax.Array,
    page_table: jax.Array,
    query_starts: jax.Array,
    distribution: jax.Array,
) -> jax.Array:
    """Put k [T,K,H] and v [T,K,Hv] of the live tokens into their pages; returns the cache."""
    num_pages, _, num_kv_heads, slab = cache.shape
    v_head_dim = 0 if v is None else v.shape[2]
    page_size = page_size_of(cache, k.shape[2], v_head_dim, shared_kv=v is None)
    rows, positions, live = token_rows(kv_lens, query_starts, distribution, k.shape[0])
    pages = jnp.where(live, page_table[rows, positions // page_size], num_pages)  # else dropped
    slots = positions % page_size
    if pages.shape[0] == 1:
        # A second, dropped, token: XLA turns a scatter of one into a select that copies the cache.
        pages = jnp.pad(pages, (0, 1), constant_values=num_pages)
        slots, k = (jnp.concatenate([x, x]) for x in (slots, k))
        v = None if v is None else jnp.concatenate([v, v])

    if v is None:
        return cache.at[pages, slots].set(k.astype(cache.dtype), mode="drop")
    width = slab // page_size
    keys = cache.reshape(num_pages, 2, num_kv_heads, width, page_size)
    keys = keys.at[pages, 0, :, : k.shape[2], slots].set(k.astype(cache.dtype), mode="drop")
    values = keys.reshape(num_pages, 2, num_kv_heads, page_size, width)
    values = values.at[pages, 1, :, slots, : v.shape[2]].set(v.astype(cache.dtype), mode="drop")
    return values.reshape(cache.shape)


def read_slabs(cache: jax.Array, pages: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Flat key and value slabs of `pages` i32[..], each [.., K, page_size * D].

    Page numbers out of range read some page of the pool.
    """
    num_pages, _, num_kv_heads, slab = cache.shape
    # Two gathers of whole slabs: slicing keys and values out of one would copy them again.
    slabs = cache.reshape(num_pages * 2, num_kv_heads, slab)
    return slabs.at[2 * pages].get(mode="clip"), slabs.at[2 * pages + 1].get(mode="clip")


def read_shared(cache: jax.Array, pages: jax.Array) -> jax.Array:
    """Keys of `pages` i32[..] of a shared cache, [.., page_size, K, H]; see read_slabs."""
    return cache.at[pages].get(mode="clip")


def shape_slabs(
    keys: jax.Array, values: jax.Array, head_dim: int, v_head_dim: int
) -> tuple[jax.Array, jax.Array]:
    """Flat slabs [.., page_size * D] as keys [.., H, page_size] and values [.., page_size, Hv]."""
    width = max(head_dim, v_head_dim)
    page_size = keys.shape[-1] // width
    keys = keys.reshape(*keys.shape[:-1], width, page_size)
    values = values.reshape(*values.shape[:-1], page_size, width)
    return keys[..., :head_dim, :], values[..., :v_head_dim]
