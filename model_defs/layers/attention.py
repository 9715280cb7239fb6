"""Grouped-query attention over paged KV (Ainslie et al. 2023, arXiv:2305.13245).

Softmax in float32 inside the kernel; projections and residual in the model's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from model_defs.hf_config import HFConfig
from model_defs.interface import Cache, CacheSpec, ForwardBatch
from model_defs.layers.linear import BuildContext, Linear
from model_defs.layers.norm import RMSNorm
from model_defs.layers.rope import Rope
from model_defs.sharding import DATA, Axis, head_layout
from pallas_kernels.ragged_paged_attention import cache_axes, ragged_paged_attention

# Traced once per shape and set of options, not once per layer: tracing is most of a warm start.
_attend = jax.jit(
    ragged_paged_attention, static_argnames=("scale", "window", "softcap", "implementation")
)


@dataclass(frozen=True)
class GQA:
    """Attention of `heads` query heads over `kv_heads` KV heads.

    Attributes:
        position: rotary embedding of queries and keys, or None.
        scale: of the scores; `head_dim ** -0.5` where None.
        window: keys visible to a query, itself included; None for all.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        qk_norm: norm of each query and key head, before the rotation.
    """

    heads: int
    kv_heads: int
    head_dim: int
    position: Rope | None = None
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    qk_norm: RMSNorm | None = None
    qkv_bias: bool = False
    out_bias: bool = False

    @classmethod
    def from_hf(
        cls,
        cfg: HFConfig,
        *,
        position: Rope | None,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        qk_norm: RMSNorm | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
    ) -> GQA:
        """Read the head counts under their usual names."""
        heads = cfg["num_attention_heads"]
        return cls(
            heads=heads,
            kv_heads=cfg.get("num_key_value_heads", heads),
            head_dim=head_dim_from_hf(cfg),
            position=position,
            scale=scale,
            window=window,
            softcap=softcap,
            qk_norm=qk_norm,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
        )

    def build(self, ctx: BuildContext, embed: Axis) -> GQAModule:
        return GQAModule(self, ctx, embed)


def head_dim_from_hf(cfg: HFConfig) -> int:
    """`head_dim` where given, else the hidden size over the heads."""
    return cfg.get("head_dim") or cfg["hidden_size"] // cfg["num_attention_heads"]


class GQAModule(nnx.Module):
    def __init__(self, spec: GQA, ctx: BuildContext, embed: Axis):
        layout = head_layout(spec.heads, spec.kv_heads, ctx.rules.shards("kv_heads"))
        ctx = replace(ctx, heads=layout)
        q, kv = Axis("q_heads", spec.heads), Axis("kv_heads", spec.kv_heads)
        dim = Axis("head_dim", spec.head_dim)
        names = ("q_proj", "k_proj", "v_proj")
        self.spec, self.rules = spec, ctx.rules
        self.qkv = Linear(
            ctx,
            dict(zip(names, ((q, dim), (kv, dim), (kv, dim)), strict=True)),
            (embed,),
            bias=names if spec.qkv_bias else (),
        )
        self.out = Linear(
            ctx, {"o_proj": (embed,)}, (q, dim), bias=("o_proj",) if spec.out_bias else ()
        )
        norm = spec.qk_norm
        self.q_norm = norm.build(ctx.at("q_norm"), dim) if norm else None
        self.k_norm = norm.build(ctx.at("k_norm"), dim) if norm else None
        self.cache_spec = CacheSpec(
            "paged",
            layout.placed_kv_heads,
            spec.head_dim,
            spec.head_dim,
            ctx.cache_dtype,
            spec.window,
        )

    def __call__(
        self, x: Float[Array, "T D"], batch: ForwardBatch, cache: Cache
    ) -> tuple[Float[Array, "T D"], Cache]:
        spec = self.spec
        q, k, v = self.qkv(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if spec.position is not None:
            tables = spec.position.tables(batch)
            q, k = spec.position.rotate(q, tables), spec.position.rotate(k, tables)
        attend = partial(
            _attend,
            scale=spec.head_dim**-0.5 if spec.scale is None else spec.scale,
            window=spec.window,
            softcap=spec.softcap,
        )
        out, cache = self._sharded(attend)(q, k, v, cache, *_metadata(batch))
        return self.out(out.reshape(out.shape[0], -1))[0], cache

    def _sharded(self, attend):
        """Run the kernel once per shard, each on its own rows, pages and heads."""
        if self.rules.mesh.size == 1:
            return attend
        spec = self.rules.spec
        q, kv, cache = spec("tokens", "q_heads"), spec("tokens", "kv_heads"), spec(*cache_axes())
        by_rank = PartitionSpec(DATA)
        return jax.shard_map(
            attend,
            mesh=self.rules.mesh,
            in_specs=(q, kv, kv, cache, by_rank, by_rank, by_rank, by_rank),
            out_specs=(q, cache),
            check_vma=False,
        )


def _metadata(batch: ForwardBatch):
    a = batch.attention
    return a.kv_lens, a.page_table, a.query_starts, a.distribution
