"""Token embedding and output head, both split over the vocabulary.

Logits in float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from model_defs.layers.linear import BuildContext, Linear, vector
from model_defs.sharding import TENSOR, Axis


class Embedding(nnx.Module):
    """A `[V, D]` table, padded to a multiple of the shards and read by row."""

    def __init__(self, ctx: BuildContext, vocab: Axis, embed: Axis):
        self.weight = ctx.param(vector(ctx, ctx.weight("weight", (vocab,), (embed,))))
        self.rules = ctx.rules

    def __call__(self, tokens: Int[Array, " T"]) -> Float[Array, "T D"]:
        table = self.weight[...]
        if self.rules.shards("vocab") == 1:
            return table[tokens]
        spec = self.rules.spec
        return jax.shard_map(
            _lookup,
            mesh=self.rules.mesh,
            in_specs=(spec("vocab", None), spec("tokens")),
            out_specs=spec("tokens", None),
            check_vma=False,
        )(table, tokens)

    def attend(self, x: Float[Array, "R D"]) -> Float[Array, "R V"]:
        """Scores of every token of the (padded) vocabulary against the table: a tied head."""
        table = self.weight[...]
        return jnp.einsum("rd,vd->rv", x, table, preferred_element_type=jnp.float32)


def _lookup(table: Float[Array, "v D"], tokens: Int[Array, " T"]) -> Float[Array, "T D"]:
    """Rows of one vocabulary shard, zeros elsewhere, summed over the shards."""
    local = tokens - jax.lax.axis_index(TENSOR) * table.shape[0]
    mine = (local >= 0) & (local < table.shape[0])
    rows = jnp.where(mine[:, None], table[jnp.where(mine, local, 0)], 0)
    return jax.lax.psum(rows, TENSOR)


class Head(nnx.Module):
    """An output head of its own: `[V, D]` in the checkpoint, one matmul here."""

    def __init__(self, ctx: BuildContext, vocab: Axis, embed: Axis):
        self.proj = Linear(ctx, {"lm_head": (vocab,)}, (embed,))

    def __call__(self, x: Float[Array, "R D"]) -> Float[Array, "R V"]:
        return self.proj(x, jnp.float32)[0]
