"""Token embedding and output heads, split over the vocabulary where they have one.

Logits and scores in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from model_defs.layers.linear import BuildContext, Linear, vector
from model_defs.sharding import MODEL, Axis


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
    local = tokens - jax.lax.axis_index(MODEL) * table.shape[0]
    mine = (local >= 0) & (local < table.shape[0])
    rows = jnp.where(mine[:, None], table[jnp.where(mine, local, 0)], 0)
    return jax.lax.psum(rows, MODEL)


@dataclass(frozen=True)
class LMHead:
    """An output head of its own: `[V, D]` in the checkpoint, one matmul here.

    `unit_rows` divides each row by its Euclidean length (at least 1e-12) before use; the checkpoint
    keeps the rows as trained.
    """

    bias: bool = False
    unit_rows: bool = False

    def build(self, ctx: BuildContext, vocab: Axis, embed: Axis) -> LMHeadModule:
        return LMHeadModule(self, ctx, vocab, embed)


class LMHeadModule(nnx.Module):
    def __init__(self, spec: LMHead, ctx: BuildContext, vocab: Axis, embed: Axis):
        bias = ("lm_head",) if spec.bias else ()
        self.proj = Linear(ctx, {"lm_head": (vocab,)}, (embed,), bias)
        if spec.unit_rows:
            placed = self.proj.weight.get_metadata()["placed"]
            self.proj.weight = ctx.param(replace(placed, make=partial(_unit_columns, placed.make)))

    def __call__(self, x: Float[Array, "R D"]) -> Float[Array, "R V"]:
        return self.proj(x, jnp.float32)[0]


def _unit_columns(make, index, read) -> np.ndarray:
    """The block `make(index, read)` of an `[in, ...]` array, whose columns get length 1."""
    block = make(index, read)
    wide = block.astype(np.float32)
    length = np.sqrt((wide * wide).sum(axis=0, keepdims=True))
    return (wide / np.maximum(length, 1e-12)).astype(block.dtype)


@dataclass(frozen=True)
class ScoreHead:
    """`labels` numbers for a whole text, from the hidden state of its last token.

    One matrix `score`, or with `hidden` two, `score.0` and `score.2` with biases, and a ReLU
    between them. With `end_token` the text is to end with that token.
    """

    labels: int
    hidden: bool = False
    end_token: int | None = None

    def build(self, ctx: BuildContext, embed: Axis) -> ScoreHeadModule:
        return ScoreHeadModule(self, ctx, embed)


class ScoreHeadModule(nnx.Module):
    def __init__(self, spec: ScoreHead, ctx: BuildContext, embed: Axis):
        labels, last = Axis("labels", spec.labels), "score.2" if spec.hidden else "score"
        self.hidden = (
            Linear(ctx, {"score.0": (Axis("score_hidden", embed.size),)}, (embed,), ("score.0",))
            if spec.hidden
            else None
        )
        self.out = Linear(ctx, {last: (labels,)}, (embed,), (last,) if spec.hidden else ())

    def __call__(self, x: Float[Array, "R D"]) -> Float[Array, "R L"]:
        if self.hidden is not None:
            x = jax.nn.relu(self.hidden(x)[0])
        return self.out(x, jnp.float32)[0]


@dataclass(frozen=True)
class Pooling:
    """One vector for a whole text: the last or first token's hidden state, or the mean of all.

    `normalize` gives it length 1. In float32.
    """

    kind: Literal["last", "cls", "mean"] = "last"
    normalize: bool = True
