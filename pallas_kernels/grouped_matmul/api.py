"""The public name of the grouped matrix product."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Implementation, deferred, dispatch
from pallas_kernels.grouped_matmul import reference, xla

__all__ = ["grouped_matmul"]

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def grouped_matmul(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    rows: jax.Array | None = None,
    *,
    combine: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    device_kind: str | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Multiply rows of x with the matrix of the group each belongs to.

    The rows of group e lie behind those of group e - 1: out[m] = x[rows[m]] @ w[e] for the
    group_sizes[e] rows of group e, whatever that number is. Rows past the last group's are zero.

    x: [L, K]; w: [E, K, N], of the same dtype: float32, bfloat16 or float16. Sums are kept in
      float32.
    group_sizes: i32[E], none negative, M or less in all.
    rows: i32[M], the row of x that each row is; None: M = L, and every row is itself.
    combine: makes one of the left and the right half of a product's columns, as in gated networks:
      out[m] = combine(y[: N / 2], y[N / 2 :]) with y = x[rows[m]] @ w[e], in x's dtype. A function
      of [n, N / 2] each that works element by element and makes zero of zeros.
    device_kind: as JAX names the device, for block sizes that suit it.
    implementation: "triton", "ragged_dot", "blocks" or "reference"; None lets the platform lowered
      for decide. The costs of "triton" and "blocks" follow the rows in use, not E.

    Rows past the last group's may be of anything, NaN included. Works on local shapes inside
    `jax.shard_map` (with check_vma=False). Returns [M, N], or [M, N / 2], in x's dtype.
    Raises ValueError for shapes and dtypes that do not fit together.
    """
    _check(x, w, group_sizes, rows, combine is not None)
    kernel = deferred("pallas_kernels.grouped_matmul.gpu", "grouped_matmul")
    kernel = partial(kernel, combine=combine, device_kind=device_kind)

    def plain(product: Callable) -> Callable:
        """`product` of rows that are gathered before it, halves combined behind it."""

        def call(x, w, group_sizes, rows):
            out = product(x if rows is None else x[rows], w, group_sizes)
            return out if combine is None else combine(*jnp.split(out, 2, axis=-1))

        return call

    ragged_dot = plain(xla.ragged_dot)
    implementations = (
        Implementation("triton", kernel, platforms=("cuda",)),
        Implementation("ragged_dot", ragged_dot, platforms=("tpu", "cuda", "rocm")),
        Implementation("blocks", plain(xla.blocks)),
        Implementation("reference", plain(reference.grouped_matmul), automatic=False),
    )
    arrays = x, w, group_sizes, rows
    return dispatch("grouped_matmul", implementations, *arrays, implementation=implementation)


def _check(
    x: jax.Array, w: jax.Array, group_sizes: jax.Array, rows: jax.Array | None, halves: bool
) -> None:
    """Raise one ValueError that lists every argument whose shape or dtype does not fit."""
    if not (x.ndim == 2 and w.ndim == 3 and group_sizes.ndim == 1):
        raise ValueError(
            "grouped_matmul: need x [L,K], w [E,K,N] and group_sizes [E]; found shapes "
            f"{x.shape}, {w.shape}, {group_sizes.shape}"
        )
    problems = []
    if w.shape[1] != x.shape[1]:
        problems.append(f"x has {x.shape[1]} columns, w has {w.shape[1]} rows per group")
    if w.shape[0] != group_sizes.shape[0]:
        problems.append(f"w has {w.shape[0]} groups, group_sizes has {group_sizes.shape[0]}")
    if x.dtype not in _DTYPES or x.dtype != w.dtype:
        problems.append(
            f"x has dtype {x.dtype} and w {w.dtype}, expected both float32, bfloat16 or float16"
        )
    if group_sizes.dtype != jnp.int32:
        problems.append(f"group_sizes has dtype {group_sizes.dtype}, expected int32")
    if rows is not None and (rows.ndim != 1 or rows.dtype != jnp.int32):
        problems.append(f"rows is {rows.dtype}{list(rows.shape)}, expected int32[M]")
    if halves and w.shape[2] % 2:
        problems.append(f"w has {w.shape[2]} columns, which have no two halves to combine")
    if problems:
        raise ValueError("grouped_matmul: " + "; ".join(problems))
