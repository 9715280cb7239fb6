"""The public names of ragged paged attention."""

import importlib
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Implementation, deferred, dispatch
from pallas_kernels.ragged_paged_attention import reference, xla
from pallas_kernels.ragged_paged_attention.block_sparse import BlockSparse
from pallas_kernels.ragged_paged_attention.layout import (
    TOKEN_MINOR_RANK,
    TPU_LANES,
    cache_axes,
    cache_shape,
    num_pages_of,
    page_size_of,
)

__all__ = [
    "BlockSparse",
    "cache_axes",
    "cache_shape",
    "default_page_size",
    "import_kernels",
    "ragged_paged_attention",
]

_CACHE_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
_GPU = "pallas_kernels.ragged_paged_attention.gpu"
_TPU = "pallas_kernels.ragged_paged_attention.tpu"
_MODULES = {"gpu": _GPU, "tpu": _TPU}  # by what JAX calls the platform of a device


def import_kernels(platform: str) -> None:
    """Import what the kernels of `platform` need, also to run a program compiled earlier."""
    if platform in _MODULES:
        importlib.import_module(_MODULES[platform])


def default_page_size(platform: str) -> int:
    """Tokens per page that suit `platform` ("cpu", "tpu", "cuda", ...); README has the numbers."""
    return {"cpu": 64, "tpu": 128}.get(platform, 64)


def ragged_paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    cache: jax.Array,
    kv_lens: jax.Array,
    page_table: jax.Array,
    query_starts: jax.Array,
    distribution: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: jax.Array | None = None,
    block_sparse: BlockSparse | None = None,
    block_offsets: jax.Array | None = None,
    v_head_dim: int | None = None,
    decode_only: bool = False,
    device_kind: str | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Write the step's keys and values to their pages, then attend causally over each row's pages.

    Row r owns the tokens query_starts[r] .. query_starts[r+1]-1 of the step. They are the last
    ones of its kv_lens[r] tokens (kv_lens counts them), so the first of them has position
    kv_lens[r] - (query_starts[r+1] - query_starts[r]). Token p of row r is kept in page
    page_table[r, p // page_size], slot p % page_size.

    q: [T, N, H]; k: [T, K, H]; v: [T, K, Hv], N a multiple of K (query head n uses kv head
      n // (N // K)); float32, bfloat16 or float16. Sums are kept in float32.
    v: None where values are not stored: the value of a token is then the first v_head_dim numbers
      of its key (multi-head latent attention), and v_head_dim must be given.
    cache: one layer's pages, shape `cache_shape(...)` of any platform, with `shared_kv` where v is
      None; donate it to have it updated in place.
    kv_lens: i32[R]. page_table: i32[R, P]; entries past a row's last page are never followed.
    query_starts: i32[R + 1], rising from 0; entries past the last live row are ignored.
    distribution: i32[3] = (i, j, k): each of the rows [0, i) has exactly one token in this step,
      rows [i, k) any number, rows >= k and tokens >= query_starts[k] are padding: their output
      is zero and nothing is written for them. j is free for accelerators (see interface).
    scale: multiplies q.k. softcap: scores become softcap * tanh(scores / softcap), before mask
      and ALiBi. window: the key at j is seen by the query at i iff 0 <= i - j < window.
    alibi_slopes: f32[N]; adds slopes[n] * (j - i) to the score (Press et al. 2021,
      arXiv:2108.12409).
    block_sparse, block_offsets: i32[N]; head n sees the keys that `block_sparse` shows with its
      offset block_offsets[n], out of those that causality and `window` leave. Per-head arguments
      are local inside `jax.shard_map`: split them like the heads of q.
    decode_only: a promise that i = k, every live row has one token; saves work where it is known.
    device_kind: as JAX names the device, for block sizes that were measured there.
    implementation: "gpu", "tpu", "xla" or "reference"; None lets the platform lowered for decide.

    Unused pages and slots may hold anything, NaN included. Works on local shapes inside
    `jax.shard_map`. Returns out [T, N, Hv] in q's dtype and the new cache.
    Raises ValueError for shapes that do not fit together.
    """
    per_head = {"alibi_slopes": alibi_slopes, "block_offsets": block_offsets}
    _check(q, k, v, v_head_dim, cache, kv_lens, page_table, query_starts, distribution, per_head)
    if (block_sparse is None) != (block_offsets is None):
        raise ValueError(
            f"ragged_paged_attention: block_sparse is {block_sparse}, but block_offsets "
            f"{'is absent' if block_offsets is None else 'is given'}; give both or neither"
        )
    if window is not None and window < 1:
        raise ValueError(f"ragged_paged_attention: window is {window}; it must be at least 1")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"ragged_paged_attention: softcap is {softcap}; it must be positive")
    options = {
        "scale": float(scale),
        "window": window,
        "softcap": softcap,
        "block_sparse": block_sparse,
        "v_head_dim": v_head_dim if v is None else v.shape[2],
    }
    # Others would be traced, only to refuse: most of a warm start is tracing.
    laid_out_for_tpu = cache.ndim != TOKEN_MINOR_RANK and cache.shape[-1] % TPU_LANES == 0
    implementations = (
        Implementation(
            "gpu",
            partial(
                deferred(_GPU, "ragged_paged_attention"),
                **options,
                decode_only=decode_only,
                device_kind=device_kind,
            ),
            platforms=("cuda", "rocm"),
            automatic=cache.ndim != TOKEN_MINOR_RANK,
        ),
        Implementation(
            "tpu",
            partial(deferred(_TPU, "ragged_paged_attention"), **options),
            platforms=("tpu",),
            automatic=laid_out_for_tpu,
        ),
        Implementation(
            "xla", partial(xla.ragged_paged_attention, **options, decode_only=decode_only)
        ),
        Implementation(
            "reference", partial(reference.ragged_paged_attention, **options), automatic=False
        ),
    )
    return dispatch(
        "ragged_paged_attention",
        implementations,
        *(q, k, v, cache, kv_lens, page_table, query_starts, distribution),
        *(alibi_slopes, block_offsets),
        implementation=implementation,
    )


def _check(
    q, k, v, v_head_dim, cache, kv_lens, page_table, query_starts, distribution, per_head
) -> None:
    """Raise one ValueError that lists every argument whose shape or dtype does not fit."""
    if not all(x.ndim == 3 for x in (q, k, v) if x is not None) or cache.ndim not in (3, 4):
        raise ValueError(
            "ragged_paged_attention: need q [T,N,H], k [T,K,H], v [T,K,Hv] or None and a cache "
            f"shaped by cache_shape(); found shapes {q.shape}, {k.shape}, "
            f"{None if v is None else v.shape}, {cache.shape}"
        )
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, num_rows = k.shape[1], kv_lens.shape[0]
    shared_kv = v is None
    if shared_kv and (v_head_dim is None or not 1 <= v_head_dim <= head_dim):
        raise ValueError(
            f"ragged_paged_attention: v is None and v_head_dim is {v_head_dim}; values that are "
            f"part of their key need a v_head_dim from 1 to the head_dim {head_dim}"
        )
    if v is not None:
        v_head_dim = v.shape[2] if v_head_dim is None else v_head_dim
    page_size = max(1, page_size_of(cache, head_dim, v_head_dim))
    cache_shapes = [
        cache_shape(
            num_pages_of(cache),
            page_size,
            num_kv_heads,
            head_dim,
            v_head_dim,
            cache.dtype,
            shared_kv=shared_kv,
            platform=platform,
        )
        for platform in (("cpu",) if cache.ndim == TOKEN_MINOR_RANK else ("gpu", "tpu"))
    ]
    wanted = {
        "k": (k.shape, (num_tokens, num_kv_heads, head_dim)),
        "cache": (cache.shape, cache.shape if cache.shape in cache_shapes else cache_shapes[0]),
        "kv_lens": (kv_lens.shape, (num_rows,)),
        "page_table": (page_table.shape, (num_rows, *page_table.shape[1:2])),
        "query_starts": (query_starts.shape, (num_rows + 1,)),
        "distribution": (distribution.shape, (3,)),
    }
    if v is not None:
        wanted["v"] = (v.shape, (num_tokens, num_kv_heads, v_head_dim))
    for name, array in per_head.items():
        if array is not None:
            wanted[name] = (array.shape, (num_heads,))
    problems = [
        f"{name} has shape {found}, expected {expected}"
        for name, (found, expected) in wanted.items()
        if found != expected
    ]
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        problems.append(f"{num_heads} query heads do not divide over {num_kv_heads} kv heads")
    for name, array in {"q": q, "k": k, "v": v, "cache": cache}.items():
        if array is not None and array.dtype not in _CACHE_DTYPES:
            problems.append(
                f"{name} has dtype {array.dtype}, expected float32, bfloat16 or float16"
            )
    if problems:
        raise ValueError("ragged_paged_attention: " + "; ".join(problems))
