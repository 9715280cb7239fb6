"""The public name of the gated product."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Implementation, deferred, dispatch
from pallas_kernels.gated_matmul import reference
from pallas_kernels.tuning import is_hopper

__all__ = ["gated_matmul"]


def gated_matmul(
    x: jax.Array,
    w: jax.Array,
    *,
    combine: Callable[[jax.Array, jax.Array], jax.Array],
    device_kind: str | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Multiply, and combine the left and the right half of the product's columns.

    out = combine(y[:, : N / 2], y[:, N / 2 :]) with y = x @ w, as in gated networks (Shazeer 2020,
    arXiv:2002.05202). y is rounded to x's dtype before; its sums are kept in float32.

    x: [T, K]; w: [K, N], of the same floating dtype.
    combine: a function of [n, m] each that works element by element.
    device_kind: as JAX names the device.
    implementation: "hopper" or "xla"; None lets the platform lowered for decide. "hopper", for
      bfloat16 and float16 on Hopper GPUs and whole tiles of rows, never writes y.

    Works on local shapes inside `jax.shard_map` (with check_vma=False). Returns [T, N / 2] in x's
    dtype. Raises ValueError for shapes and dtypes that do not fit together.
    """
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[0] or w.shape[1] % 2:
        raise ValueError(
            f"gated_matmul: need x [T,K] and w [K,N] with even N; found {x.shape} and {w.shape}"
        )
    if x.dtype != w.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"gated_matmul: x has dtype {x.dtype} and w {w.dtype}, expected one floating dtype"
        )
    kernel = deferred("pallas_kernels.gated_matmul.hopper", "gated_matmul")
    kernel = partial(kernel, combine=combine, device_kind=device_kind)
    # Elsewhere it would be imported to be refused, with Mosaic, at every start.
    automatic = is_hopper(device_kind)
    implementations = (
        Implementation("hopper", kernel, platforms=("cuda",), automatic=automatic),
        Implementation("xla", partial(reference.gated_matmul, combine=combine)),
    )
    return dispatch("gated_matmul", implementations, x, w, implementation=implementation)
