"""Normalisation. Statistics and scale in float32; the result in the input's dtype."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from model_defs.layers.linear import BuildContext, vector
from model_defs.sharding import Axis

Dims = tuple[tuple[Axis, ...], ...]


def _dims(dims: tuple[Axis | tuple[Axis, ...], ...]) -> Dims:
    return tuple((dim,) if isinstance(dim, Axis) else dim for dim in dims)


@dataclass(frozen=True)
class RMSNorm:
    """`x / rms(x) * (offset + weight)` (Zhang and Sennrich 2019, arXiv:1910.07467).

    `offset` is 1 where the checkpoint stores the scale minus one.
    """

    eps: float
    offset: float = 0.0

    def build(self, ctx: BuildContext, *dims: Axis | tuple[Axis, ...]) -> RMSNormModule:
        """A norm over the last of `dims`, with a weight of its own for each of the others.

        A dimension that is several axes, flattened, is given as their tuple.
        """
        return RMSNormModule(self, ctx, _dims(dims))


class RMSNormModule(nnx.Module):
    def __init__(self, spec: RMSNorm, ctx: BuildContext, dims: Dims):
        self.spec = spec
        self.weight = ctx.param(vector(ctx, ctx.weight("weight", *dims)))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        y = x.astype(jnp.float32)
        return self._scaled(x, y, jnp.mean(y * y, axis=-1, keepdims=True))

    def over_heads(
        self, x: Float[Array, "T N H"], count: int, copies: int
    ) -> Float[Array, "T N H"]:
        """One norm over all heads of a token: `count` numbers, of which `x` holds `copies`.

        Heads that sharding added are zero and do not count; the weight is `[N*H]`.
        """
        y = x.astype(jnp.float32)
        mean = jnp.sum(y * y, axis=(-2, -1), keepdims=True) / (count * copies)
        return self._scaled(x, y, mean)

    def _scaled(self, x: Array, y: Array, mean_square: Array) -> Array:
        y = y * jax.lax.rsqrt(mean_square + self.spec.eps)
        scale = self.weight[...].astype(jnp.float32)
        if scale.ndim == 1 and scale.shape[0] != x.shape[-1]:
            scale = scale.reshape(x.shape[-2:])
        if self.spec.offset:
            return (y * (self.spec.offset + scale)).astype(x.dtype)
        # The normalised value is rounded before the scale, as the reference implementations do.
        return y.astype(x.dtype) * scale.astype(x.dtype)


@dataclass(frozen=True)
class LayerNorm:
    """`(x - mean) / std * weight + bias` (Ba et al. 2016, arXiv:1607.06450).

    Without `weight` and `bias` it has no parameters.
    """

    eps: float
    bias: bool = True
    weight: bool = True

    def build(self, ctx: BuildContext, *dims: Axis | tuple[Axis, ...]) -> LayerNormModule:
        """As `RMSNorm.build`."""
        return LayerNormModule(self, ctx, _dims(dims))


class LayerNormModule(nnx.Module):
    def __init__(self, spec: LayerNorm, ctx: BuildContext, dims: Dims):
        self.spec = spec
        self.weight = ctx.param(vector(ctx, ctx.weight("weight", *dims))) if spec.weight else None
        self.bias = ctx.param(vector(ctx, ctx.weight("bias", *dims))) if spec.bias else None

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.spec.eps)
        if self.weight is not None:
            y = y * self.weight[...].astype(jnp.float32)
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


Norm = RMSNorm | LayerNorm
