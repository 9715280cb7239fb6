"""The public name of the grouped matrix product."""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Implementation, deferred, dispatch
from pallas_kernels.grouped_matmul import reference, xla

__all__ = ["grouped_matmul"]

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
_FALLBACKS = (
    Implementation("ragged_dot", xla.ragged_dot, platforms=("tpu", "cuda", "rocm")),
    Implementation("blocks", xla.blocks),
    Implementation("reference", reference.grouped_matmul, automatic=False),
)


def grouped_matmul(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    *,
    device_kind: str | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Multiply each row of x with the matrix of the group it belongs to.

    The rows of group e lie behind those of group e - 1: out[m] = x[m] @ w[e] for the
    group_sizes[e] rows of group e, whatever that number is. Rows past the last group's are zero.

    x: [M, K]; w: [E, K, N], of the same dtype: float32, bfloat16 or float16. Sums are kept in
      float32.
    group_sizes: i32[E], none negative, M or less in all.
    device_kind: as JAX names the device, for block sizes that suit it.
    implementation: "triton", "ragged_dot", "blocks" or "reference"; None lets the platform lowered
      for decide. The costs of "triton" and "blocks" follow the rows in use, not E.

    Rows of x past the last group's may hold anything, NaN included. Works on local shapes inside
    `jax.shard_map` (with check_vma=False). Returns [M, N] in x's dtype.
    Raises ValueError for shapes and dtypes that do not fit together.
    """
    _check(x, w, group_sizes)
    kernel = deferred("pallas_kernels.grouped_matmul.gpu", "grouped_matmul")
    triton = Implementation("triton", partial(kernel, device_kind=device_kind), platforms=("cuda",))
    return dispatch(
        "grouped_matmul",
        (triton, *_FALLBACKS),
        *(x, w, group_sizes),
        implementation=implementation,
    )


def _check(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> None:
    """Raise one ValueError that lists every argument whose shape or dtype does not fit."""
    if not (x.ndim == 2 and w.ndim == 3 and group_sizes.ndim == 1):
        raise ValueError(
            "grouped_matmul: need x [M,K], w [E,K,N] and group_sizes [E]; found shapes "
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
    if problems:
        raise ValueError("grouped_matmul: " + "; ".join(problems))
