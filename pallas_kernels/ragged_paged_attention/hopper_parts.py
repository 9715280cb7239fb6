"""What attention on Hopper GPUs has in common for prompts and for single tokens."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper_blocks import refuse

LOG2_E = math.log2(math.e)
LOWEST = -1e30  # A running maximum before the first key; finite, so that no inf - inf arises.
SUMS = 8  # Columns a row's sum is kept in: four threads hold two each.


def refuse_attention(
    kernel: str,
    q: jax.Array,
    cache: jax.Array,
    *,
    keys: int,
    scale: float,
    shared_memory_bytes: int,
    further: Mapping[str, bool],
) -> None:
    """Raise NotImplementedError for what no kernel here does, or for what holds in `further`.

    keys: of a block.
    """
    head_dim = q.shape[2]
    _, _, page_size, width = cache.shape
    unit = min(page_size, keys)
    refusals = {
        f"dtype {q.dtype}, not bfloat16 or float16": q.dtype not in (jnp.bfloat16, jnp.float16),
        f"a cache of {cache.dtype} for queries of {q.dtype}": cache.dtype != q.dtype,
        f"head_dim {head_dim}, not 64, 128, 192 or 256": head_dim not in (64, 128, 192, 256),
        f"values of {width - head_dim} numbers, not {head_dim}": width != 2 * head_dim,
        f"page size {page_size}, not a power of two of at least 16": (
            page_size < 16 or page_size & (page_size - 1) != 0
        ),
        f"blocks of {keys} keys, no multiple of 64 and of {unit}": (
            keys % 64 != 0 or keys % unit != 0 or page_size % unit != 0
        ),
        **further,
        f"scale {scale}, not positive": scale <= 0,
    }
    refuse(kernel, refusals, shared_memory_bytes=shared_memory_bytes)


@dataclass(frozen=True)
class Layouts:
    """Arrays in registers as matrix instructions want them; the interpreter has no layouts."""

    interpret: bool

    def cast(self, x: jax.Array, like) -> jax.Array:
        return x if self.interpret else plgpu.layout_cast(x, like)

    def iota(self, shape: tuple[int, ...], axis: int) -> jax.Array:
        return self.cast(lax.broadcasted_iota(jnp.int32, shape, axis), plgpu.Layout.WGMMA)

    def store_plainly(self, ref, x: jax.Array) -> None:
        """ref[...] = x for a `ref` without swizzle, where banks of shared memory conflict."""
        store = getattr(plgpu, "store", None)  # JAX 0.12 asks for consent to conflicts.
        if self.interpret or store is None:
            ref[...] = x
        else:
            store(ref, x, optimized=False)


def rescaled(x: jax.Array, factor: jax.Array) -> jax.Array:
    """Each row of x times its factor."""
    return x * lax.broadcast_in_dim(factor, x.shape, [0])


def softmax(
    s: jax.Array, m: jax.Array, total: jax.Array, log2_scale: float
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """One more block of a running softmax, in base 2.

    s: f32[rows, keys], scores, -inf where masked; m: f32[rows], maximum; total: f32[rows, SUMS].
    Returns weights, the new m and total, and what outputs so far are to be multiplied by.
    """
    new_m = jnp.maximum(m, s.max(axis=1) * log2_scale)
    alpha = jnp.exp2(m - new_m)
    p = jnp.exp2(s * log2_scale - lax.broadcast_in_dim(new_m, s.shape, [0]))
    # Sums of every eighth column, so that threads add up only what they hold.
    total = functools.reduce(
        lambda sums, column: sums + p[:, column : column + SUMS],
        range(0, s.shape[1], SUMS),
        rescaled(total, alpha),
    )
    return p, new_m, total, alpha
