"""Grouped-query attention over paged KV (Ainslie et al. 2023, arXiv:2305.13245).

Softmax in float32 inside the kernel; projections and residual in the model's dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from model_defs.hf_config import HFConfig
from model_defs.interface import Cache, CacheSpec, ForwardBatch
from model_defs.layers.linear import BuildContext, Linear
from model_defs.layers.norm import Norm, RMSNormModule
from model_defs.layers.rope import Rope, rope_from_hf
from model_defs.sharding import DATA, Axis, head_layout
from pallas_kernels.ragged_paged_attention import (
    BlockSparse,
    cache_axes,
    ragged_paged_attention,
)

# Traced once per shape and set of options, not once per layer: tracing is most of a warm start.
_traced_once = jax.jit(
    ragged_paged_attention,
    static_argnames=(
        "scale",
        "window",
        "softcap",
        "block_sparse",
        "decode_only",
        "device_kind",
        "implementation",
    ),
)

NormOver = Literal["head", "each_head", "all_heads"]


@dataclass(frozen=True)
class ALiBi:
    """Scores fall linearly with distance, with a slope for each head (arXiv:2108.12409).

    For `n` heads, a power of two, head h has slope `2 ** (-8 (h + 1) / n)`; else those of the next
    lower power, then every second one of twice that power.
    """

    def slopes(self, heads: int) -> np.ndarray:
        """`f32[heads]`."""
        power = 2 ** int(math.log2(heads))
        slopes = 2.0 ** (-8.0 * np.arange(1, power + 1) / power)
        more = 2.0 ** (-4.0 * np.arange(1, 2 * power + 1, 2) / power)
        return np.concatenate([slopes, more[: heads - power]]).astype(np.float32)


@dataclass(frozen=True)
class Blocks:
    """A block-sparse mask whose vertical blocks move on by `step` with each query head."""

    mask: BlockSparse
    step: int


@dataclass(frozen=True)
class GQA:
    """Attention of `heads` query heads over `kv_heads` KV heads.

    Attributes:
        position: rotary embedding of queries and keys, or ALiBi, or None.
        scale: of the scores; `head_dim ** -0.5` where None.
        window: keys visible to a query, itself included; None for all.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        qk_norm: norm of queries and keys, before the rotation.
        qk_norm_over: one head at a time with one weight for all ("head") or a weight of its own
            ("each_head"), or all heads of a token together ("all_heads").
        clip: queries, keys and values are clamped to `[-clip, clip]`, after the norm.
        logn: queries at positions `p >= logn` are multiplied by `log(p + 1) / log(logn)`.
        sparse: which blocks of keys a head sees.
    """

    heads: int
    kv_heads: int
    head_dim: int
    position: Rope | ALiBi | None = None
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    qk_norm: Norm | None = None
    qk_norm_over: NormOver = "head"
    clip: float | None = None
    logn: int | None = None
    sparse: Blocks | None = None
    qkv_bias: bool = False
    out_bias: bool = False

    @classmethod
    def from_hf(cls, cfg: HFConfig, **rest: Any) -> GQA:
        """Read the head counts under their usual names; `rest` are the other attributes."""
        heads = cfg["num_attention_heads"]
        kv_heads = cfg.get("num_key_value_heads", heads)
        return cls(heads, kv_heads, head_dim_from_hf(cfg), **rest)

    @classmethod
    def with_rope(cls, cfg: HFConfig, **rest: Any) -> GQA:
        """The same with the rope of the config, over whole heads unless it says otherwise."""
        return cls.from_hf(cfg, position=rope_from_hf(cfg, head_dim_from_hf(cfg)), **rest)

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
        self.layout = layout
        self.q_norm = self._norm(ctx.at("q_norm"), q, dim)
        self.k_norm = self._norm(ctx.at("k_norm"), kv, dim)
        self.cache_spec = CacheSpec(
            "paged",
            layout.placed_kv_heads,
            spec.head_dim,
            spec.head_dim,
            ctx.cache_dtype,
            spec.window,
        )

    def _norm(self, ctx: BuildContext, heads: Axis, dim: Axis):
        norm, over = self.spec.qk_norm, self.spec.qk_norm_over
        if norm is None:
            return None
        if over == "all_heads":
            return norm.build(ctx, (heads, dim))
        return norm.build(ctx, heads, dim) if over == "each_head" else norm.build(ctx, dim)

    def __call__(
        self, x: Float[Array, "T D"], batch: ForwardBatch, cache: Cache
    ) -> tuple[Float[Array, "T D"], Cache]:
        spec = self.spec
        q, k, v = self.qkv(x)
        if self.q_norm is not None and self.k_norm is not None:
            q = self._normalised(self.q_norm, q, spec.heads, 1)
            k = self._normalised(self.k_norm, k, spec.kv_heads, self.layout.copies)
        if spec.clip is not None:
            q, k, v = (jnp.clip(part, -spec.clip, spec.clip) for part in (q, k, v))
        if isinstance(spec.position, Rope):
            tables = spec.position.tables(batch)
            q, k = spec.position.rotate(q, tables), spec.position.rotate(k, tables)
        if spec.logn is not None:
            length = jnp.maximum(batch.positions + 1, spec.logn).astype(jnp.float32)
            factor = jnp.log(length) / math.log(spec.logn)
            q = (q * factor[:, None, None]).astype(q.dtype)
        out, cache = self._attend(q, k, v, cache, batch)
        return self.out(out.reshape(out.shape[0], -1))[0], cache

    def _normalised(self, norm, x: Float[Array, "T N H"], heads: int, copies: int):
        if self.spec.qk_norm_over == "all_heads" and isinstance(norm, RMSNormModule):
            return norm.over_heads(x, heads * self.spec.head_dim, copies)
        return norm(x)

    def _per_head(self) -> dict[str, np.ndarray]:
        """Arguments of the kernel that hold one number for each placed query head."""
        spec, out = self.spec, {}
        heads = np.maximum(self.layout.q_map(), 0)  # an added head may do as any other
        if isinstance(spec.position, ALiBi):
            out["alibi_slopes"] = spec.position.slopes(spec.heads)[heads]
        if spec.sparse is not None:
            out["block_offsets"] = (heads * spec.sparse.step).astype(np.int32)
        return out

    def _attend(self, q, k, v, cache: Cache, batch: ForwardBatch):
        """Run the kernel once per shard, each on its own rows, pages and heads."""
        spec, rules = self.spec, self.rules
        attend = partial(
            _traced_once,
            scale=spec.head_dim**-0.5 if spec.scale is None else spec.scale,
            window=spec.window,
            softcap=spec.softcap,
            block_sparse=spec.sparse.mask if spec.sparse else None,
            decode_only=batch.attention.decode_only,
            device_kind=rules.device_kind,
        )
        by_rank, pages = PartitionSpec(DATA), rules.spec(*cache_axes())
        q_spec, kv_spec = rules.spec("tokens", "q_heads"), rules.spec("tokens", "kv_heads")
        call = rules.per_device(
            lambda per_head, *args: attend(*args, **per_head),
            in_specs=(rules.spec("q_heads"), q_spec, kv_spec, kv_spec, pages, *[by_rank] * 4),
            out_specs=(q_spec, pages),
        )
        return call(self._per_head(), q, k, v, cache, *_metadata(batch))


def _metadata(batch: ForwardBatch):
    a = batch.attention
    return a.kv_lens, a.page_table, a.query_starts, a.distribution
