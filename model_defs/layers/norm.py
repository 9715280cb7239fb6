"""Normalisation. Statistics and scale in float32; the result in the input's dtype."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from model_defs.layers.linear import BuildContext, vector
from model_defs.sharding import Axis


@dataclass(frozen=True)
class RMSNorm:
    """`x / rms(x) * (offset + weight)` (Zhang and Sennrich 2019, arXiv:1910.07467).

    `offset` is 1 where the checkpoint stores the scale minus one.
    """

    eps: float
    offset: float = 0.0

    def build(self, ctx: BuildContext, axis: Axis) -> RMSNormModule:
        return RMSNormModule(self, ctx, axis)


class RMSNormModule(nnx.Module):
    def __init__(self, spec: RMSNorm, ctx: BuildContext, axis: Axis):
        self.spec = spec
        self.weight = ctx.param(vector(ctx, ctx.weight("weight", (axis,))))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.spec.eps)
        scale = self.weight[...].astype(jnp.float32)
        if self.spec.offset:
            return (y * (self.spec.offset + scale)).astype(x.dtype)
        # The normalised value is rounded before the scale, as the reference implementations do.
        return y.astype(x.dtype) * scale.astype(x.dtype)
