"""Where a token's key and value live in a paged cache; shared by every implementation.

There are two layouts, told apart by the cache's rank. CPUs keep keys token-minor, because a
transposed operand makes queries @ keys four times slower there; one page of one kv head is a slab
of keys and a slab of values, each page_size * D elements with D = max(H, Hv):

    cache[2 page + 0, head] as [D, page_size]:  key of slot s is the column [:H, s]
    cache[2 page + 1, head] as [page_size, D]:  value of slot s is the row [s, :Hv]

Accelerators keep a token's key and value side by side, so that one copy fetches a page of a head,
and rows of 64 numbers do not waste half of a TPU's 128 lanes:

    cache[page, head, s] as [H + Hv]:  key of slot s is [:H], its value [H : H + Hv]

TPUs store rows in tiles of 128 numbers whatever a shape says. There the padding is part of the
shape, so that copies are of whole tiles and memory is counted as it is used; what is written to a
slot writes zeros to its padding.

Where values are the first Hv numbers of their key (multi-head latent attention, DeepSeek-AI 2024,
arXiv:2405.04434), a page keeps the keys alone, H numbers a token and nothing else, on any device:

    cache[page, head, s] as [H]:  key of slot s; its value is [:Hv]

(again in whole tiles on a TPU). Functions here are told so by `shared_kv`, or by a `v` that is
None.
"""

import jax
import jax.numpy as jnp

TOKEN_MINOR_RANK = 3  # of a cache as CPUs keep it; every other has rank 4
TPU_LANES = 128


def cache_shape(
    num_pages: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int,
    dtype,
    *,
    shared_kv: bool = False,
    platform: str = "cpu",
) -> tuple[int, ...]:
    """Shape of one layer's cache array, of `dtype`, as `platform` ("cpu", "gpu", "tpu") keeps it.

    CPU: [2 num_pages, K, page_size * max(H, Hv)]; else [num_pages, K, page_size, H + Hv].
    shared_kv: values are the first v_head_dim numbers of their key: [num_pages, K, page_size, H].
    TPU: the last size is rounded up to a multiple of 128.
    """
    del dtype  # No layout here depends on the element size.
    if platform == "cpu" and not shared_kv:
        return (2 * num_pages, num_kv_heads, page_size * max(head_dim, v_head_dim))
    width = _row_width(head_dim if shared_kv else head_dim + v_head_dim, platform)
    return (num_pages, num_kv_heads, page_size, width)


def _row_width(width: int, platform: str) -> int:
    """Numbers that `platform` keeps for a slot of `width`."""
    return -(-width // TPU_LANES) * TPU_LANES if platform == "tpu" else width


def cache_axes() -> tuple[str | None, ...]:
    """Logical names of the first cache axes, for sharding; those that follow are never split."""
    return ("pages", "kv_heads")


def page_size_of(cache: jax.Array, head_dim: int, v_head_dim: int) -> int:
    """Tokens one page of `cache` holds."""
    if cache.ndim == TOKEN_MINOR_RANK:
        return cache.shape[2] // max(head_dim, v_head_dim)
    return cache.shape[2]


def num_pages_of(cache: jax.Array) -> int:
    """Pages of `cache`."""
    return cache.shape[0] // 2 if cache.ndim == TOKEN_MINOR_RANK else cache.shape[0]


def pack_cache(keys: jax.Array, values: jax.Array | None, *, platform: str = "cpu") -> jax.Array:
    """Make a cache of keys [num_pages, K, page_size, H] and values [.., Hv], or None if shared."""
    if values is None or platform != "cpu":
        both = keys if values is None else jnp.concatenate([keys, values], -1)
        return _widened(both, _row_width(both.shape[-1], platform))
    width = max(keys.shape[-1], values.shape[-1])
    slabs = jnp.stack(
        [
            _widened(keys, width).swapaxes(-1, -2).reshape(*keys.shape[:2], -1),
            _widened(values, width).reshape(*keys.shape[:2], -1),
        ],
        1,
    )
    return slabs.reshape(-1, *slabs.shape[2:])


def unpack_cache(
    cache: jax.Array, head_dim: int, v_head_dim: int, *, shared_kv: bool
) -> tuple[jax.Array, jax.Array]:
    """Keys [num_pages, K, page_size, H] and values [num_pages, K, page_size, Hv] of a cache."""
    if shared_kv:
        return cache[..., :head_dim], cache[..., :v_head_dim]
    if cache.ndim == TOKEN_MINOR_RANK:
        slabs = read_slabs(cache, jnp.arange(num_pages_of(cache)), head_dim, v_head_dim)
        keys, values = shape_slabs(*slabs, head_dim, v_head_dim)
        return keys.swapaxes(-1, -2), values
    return cache[..., :head_dim], cache[..., head_dim : head_dim + v_head_dim]


def _widened(x: jax.Array, width: int) -> jax.Array:
    """Zeros behind the last axis of x up to `width`."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])


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
    num_pages, num_kv_heads = num_pages_of(cache), cache.shape[1]
    v_head_dim = 0 if v is None else v.shape[2]
    page_size = page_size_of(cache, k.shape[2], v_head_dim)
    rows, positions, live = token_rows(kv_lens, query_starts, distribution, k.shape[0])
    # Padding goes to pages out of range, each to another one, and is dropped.
    beyond = num_pages + jnp.arange(k.shape[0], dtype=jnp.int32)
    pages = jnp.where(live, page_table[rows, positions // page_size], beyond)
    slots = positions % page_size
    if pages.shape[0] == 1:
        # A second, dropped, token: XLA turns a scatter of one into a select that copies the cache.
        pages = jnp.pad(pages, (0, 1), constant_values=num_pages + 1)
        slots, k = (jnp.concatenate([x, x]) for x in (slots, k))
        v = None if v is None else jnp.concatenate([v, v])

    if cache.ndim != TOKEN_MINOR_RANK:
        kv = _widened(k if v is None else jnp.concatenate([k, v], -1), cache.shape[3])
        return cache.at[pages, :, slots].set(
            kv.astype(cache.dtype), mode="drop", unique_indices=True
        )
    assert v is not None
    width = cache.shape[2] // page_size
    keys = cache.reshape(num_pages, 2, num_kv_heads, width, page_size)
    keys = keys.at[pages, 0, :, : k.shape[2], slots].set(k.astype(cache.dtype), mode="drop")
    values = keys.reshape(num_pages, 2, num_kv_heads, page_size, width)
    values = values.at[pages, 1, :, slots, : v.shape[2]].set(v.astype(cache.dtype), mode="drop")
    return values.reshape(cache.shape)


def read_slabs(
    cache: jax.Array, pages: jax.Array, head_dim: int, v_head_dim: int
) -> tuple[jax.Array, jax.Array]:
    """Flat key and value slabs of `pages` i32[..], each [.., K, page_size * D].

    Page numbers out of range read some page of the pool.
    """
    if cache.ndim == TOKEN_MINOR_RANK:
        # Two gathers of whole slabs: slicing keys and values out of one would copy them again.
        return cache.at[2 * pages].get(mode="clip"), cache.at[2 * pages + 1].get(mode="clip")
    both, width = cache.at[pages].get(mode="clip"), max(head_dim, v_head_dim)
    keys = _widened(both[..., :head_dim], width).swapaxes(-1, -2)
    values = _widened(both[..., head_dim : head_dim + v_head_dim], width)
    return keys.reshape(*keys.shape[:-2], -1), values.reshape(*values.shape[:-2], -1)


def read_shared(cache: jax.Array, pages: jax.Array, head_dim: int) -> jax.Array:
    """Keys of `pages` i32[..] of a shared cache, [.., K, page_size, H]; see read_slabs."""
    return cache.at[pages].get(mode="clip")[..., :head_dim]


def shape_slabs(
    keys: jax.Array, values: jax.Array, head_dim: int, v_head_dim: int
) -> tuple[jax.Array, jax.Array]:
    """Flat slabs [.., page_size * D] as keys [.., H, page_size] and values [.., page_size, Hv]."""
    width = max(head_dim, v_head_dim)
    page_size = keys.shape[-1] // width
    keys = keys.reshape(*keys.shape[:-1], width, page_size)
    values = values.reshape(*values.shape[:-1], page_size, width)
    return keys[..., :head_dim, :], values[..., :v_head_dim]
