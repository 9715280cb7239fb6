"""Named shapes of the gated product, shared by tests and bench."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul.arg_specs import gated


def gelu(left: jax.Array, right: jax.Array) -> jax.Array:
    """`gated` with a GELU, by its approximation."""
    return jax.nn.gelu(left.astype(jnp.float32), approximate=True).astype(left.dtype) * right


def clamped(left: jax.Array, right: jax.Array) -> jax.Array:
    """A sigmoid of limited halves, one of them moved."""
    left, right = jnp.minimum(left, 7.0), jnp.clip(right, -7.0, 7.0)
    gate = left.astype(jnp.float32)
    return (gate * jax.nn.sigmoid(1.702 * gate)).astype(left.dtype) * (right + 1.0)


@dataclass(frozen=True)
class ArgSpec:
    """One call. `width` columns of the result: w has twice as many."""

    name: str
    rows: int
    inner: int
    width: int
    dtype: str = "bfloat16"
    combine: Callable[[jax.Array, jax.Array], jax.Array] = gated

    @property
    def flops(self) -> int:
        """Of the product."""
        return 4 * self.rows * self.inner * self.width

    def shapes(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Of `arguments`, without making them."""
        x, w = (self.rows, self.inner), (self.inner, 2 * self.width)
        return jax.ShapeDtypeStruct(x, self.dtype), jax.ShapeDtypeStruct(w, self.dtype)

    def arguments(self, seed: int = 0) -> tuple[jax.Array, jax.Array]:
        """Random x and w, such that the product has a standard deviation of 1."""
        x_key, w_key = jax.random.split(jax.random.key(seed))
        x, w = self.shapes()
        scale = jnp.asarray(self.inner**-0.5, w.dtype)
        return (
            jax.random.normal(x_key, x.shape, x.dtype),
            jax.random.normal(w_key, w.shape, w.dtype) * scale,
        )


ARG_SPECS: tuple[ArgSpec, ...] = (
    ArgSpec("one_tile", 128, 64, 128),
    ArgSpec("more_tiles_than_programs", 384, 192, 256),
    ArgSpec("gelu", 128, 128, 256, combine=gelu),
    ArgSpec("half-clamped", 256, 64, 128, "float16", clamped),
)

_LLAMA_8B = (4096, 14336)

GPU_SPECS: tuple[ArgSpec, ...] = (
    *(ArgSpec(f"llama_8b-{rows}", rows, *_LLAMA_8B) for rows in (256, 512, 1024, 2048, 8192)),
    ArgSpec("qwen2_7b-8192", 8192, 3584, 18944),
    ArgSpec("gemma2_9b-2048", 2048, 3584, 14336, combine=gelu),
    ArgSpec("llama_70b_tp8-4096", 4096, 8192, 3584),
)
