"""Multi-head latent attention over paged KV (DeepSeek-AI 2024, arXiv:2405.04434, section 2.1).

Keys and values of all heads are made from one latent vector a token, by matrices of the head. Those
are moved over to the queries and to the output (the "absorbed" form), so that attention itself
works on the latents, and the cache holds nothing but a latent and one rotated key a token:

    latent  = norm(kv_a_proj(x)[:R])          key    = [latent | rope(kv_a_proj(x)[R:])]
    query_n = [q_nope_n @ W_uk_n | rope(q_rope_n)]    value = latent
    out_n   = softmax(scale query_n . key) @ latent @ W_uv_n

Softmax in float32 inside the kernel; projections and residual in the model's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from model_defs.hf_config import HFConfig
from model_defs.interface import Cache, CacheSpec, ForwardBatch
from model_defs.layers.linear import BuildContext, Linear, Placed, ReadTensor, Weight, gather
from model_defs.layers.norm import RMSNorm
from model_defs.layers.rope import Rope
from model_defs.sharding import DATA, Axis, head_layout
from pallas_kernels.ragged_paged_attention import cache_axes, ragged_paged_attention

# Traced once per shape and set of options, not once per layer: tracing is most of a warm start.
_traced_once = jax.jit(
    ragged_paged_attention,
    static_argnames=("scale", "v_head_dim", "decode_only", "device_kind", "implementation"),
)


@dataclass(frozen=True)
class MLA:
    """Latent attention of `heads` query heads.

    Attributes:
        q_rank: width of the queries' own latent; None where queries are projected directly.
        kv_rank: width of the latent of keys and values, R.
        nope_dim: of a head's query and key, without position.
        rope_dim: of a head's query and the shared key, with position.
        v_dim: of a head's value.
        position: rotary embedding of width `rope_dim`.
        norm: of both latents.
        scale: of the scores; `(nope_dim + rope_dim) ** -0.5` where None.
        bias: the projections to the latents and to the output have one.
    """

    heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    position: Rope
    norm: RMSNorm
    scale: float | None = None
    bias: bool = False

    @classmethod
    def from_hf(
        cls,
        cfg: HFConfig,
        *,
        position: Rope,
        norm: RMSNorm,
        scale: float | None = None,
        bias: bool = False,
    ) -> MLA:
        """Read the sizes under their usual names."""
        heads = cfg["num_attention_heads"]
        return cls(
            heads=heads,
            q_rank=cfg.get("q_lora_rank"),
            kv_rank=cfg["kv_lora_rank"],
            nope_dim=cfg["qk_nope_head_dim"],
            rope_dim=cfg["qk_rope_head_dim"],
            v_dim=cfg.get("v_head_dim") or cfg["hidden_size"] // heads,
            position=position,
            norm=norm,
            scale=scale,
            bias=bias,
        )

    def build(self, ctx: BuildContext, embed: Axis) -> MLAModule:
        return MLAModule(self, ctx, embed)


class MLAModule(nnx.Module):
    def __init__(self, spec: MLA, ctx: BuildContext, embed: Axis):
        # As attention with one KV head: every shard keeps a copy of it for its share of queries.
        layout = head_layout(spec.heads, 1, ctx.rules.shards("kv_heads"))
        ctx = replace(ctx, heads=layout)
        heads, latent = Axis("q_heads", spec.heads), Axis("kv_rank", spec.kv_rank)
        q_dim = Axis("head_dim", spec.nope_dim + spec.rope_dim)
        v_dim = Axis("v_head_dim", spec.v_dim)
        into_latents = {"kv_a_proj": (Axis("kv_rank", spec.kv_rank + spec.rope_dim),)}
        self.spec, self.rules = spec, ctx.rules
        if spec.q_rank is None:
            self.q_norm = None
            self.q = Linear(ctx, {"q_proj": (heads, q_dim)}, (embed,))
        else:
            q_latent = Axis("q_rank", spec.q_rank)
            into_latents = {"q_a_proj": (q_latent,), **into_latents}
            self.q_norm = spec.norm.build(ctx.at("q_a_norm"), q_latent)
            self.q = Linear(ctx, {"q_b_proj": (heads, q_dim)}, (q_latent,))
        self.latents = Linear(
            ctx, into_latents, (embed,), bias=tuple(into_latents) if spec.bias else ()
        )
        self.kv_norm = spec.norm.build(ctx.at("kv_a_norm"), latent)
        up = ctx.weight(
            "kv_b_proj.weight", (heads, Axis("head_dim", spec.nope_dim + spec.v_dim)), (latent,)
        )
        self.k_up = ctx.param(_place_heads(ctx, up, slice(0, spec.nope_dim)))
        self.v_up = ctx.param(_place_heads(ctx, up, slice(spec.nope_dim, None), swap=True))
        self.out = Linear(
            ctx, {"o_proj": (embed,)}, (heads, v_dim), bias=("o_proj",) if spec.bias else ()
        )
        self.cache_spec = CacheSpec(
            "paged",
            layout.placed_kv_heads,
            spec.kv_rank + spec.rope_dim,
            spec.kv_rank,
            ctx.cache_dtype,
            shared_kv=True,
        )

    def __call__(
        self, x: Float[Array, "T D"], batch: ForwardBatch, cache: Cache
    ) -> tuple[Float[Array, "T D"], Cache]:
        spec = self.spec
        *q_latent, kv = self.latents(x)
        (q,) = self.q(x if self.q_norm is None else self.q_norm(q_latent[0]))
        latent, k_rope = kv[:, None, : spec.kv_rank], kv[:, None, spec.kv_rank :]
        q_nope, q_rope = q[..., : spec.nope_dim], q[..., spec.nope_dim :]

        tables = spec.position.tables(batch)
        q_rope, k_rope = spec.position.rotate(q_rope, tables), spec.position.rotate(k_rope, tables)
        q_nope = jnp.einsum("tnd,ndr->tnr", q_nope, self.k_up[...])
        query = jnp.concatenate([q_nope, q_rope], axis=-1)
        key = jnp.concatenate([self.kv_norm(latent), k_rope], axis=-1)
        out, cache = self._attend(query, key, cache, batch)
        out = jnp.einsum("tnr,nrv->tnv", out, self.v_up[...])
        return self.out(out.reshape(out.shape[0], -1))[0], cache

    def _attend(
        self, query: Float[Array, "T N H"], key: Float[Array, "T 1 H"], cache: Cache, batch
    ) -> tuple[Float[Array, "T N R"], Cache]:
        """Run the kernel once per shard, each on its own rows, pages and query heads."""
        spec, rules, rows = self.spec, self.rules, batch.attention
        scale = (spec.nope_dim + spec.rope_dim) ** -0.5 if spec.scale is None else spec.scale
        attend = partial(
            _traced_once,
            scale=scale,
            v_head_dim=spec.kv_rank,
            decode_only=rows.decode_only,
            device_kind=rules.device_kind,
        )
        metadata = rows.kv_lens, rows.page_table, rows.query_starts, rows.distribution
        by_rank, pages = PartitionSpec(DATA), rules.spec(*cache_axes())
        q_spec = rules.spec("tokens", "q_heads")
        call = rules.per_device(
            lambda query, key, cache, *metadata: attend(query, key, None, cache, *metadata),
            in_specs=(q_spec, rules.spec("tokens"), pages, *[by_rank] * 4),
            out_specs=(q_spec, pages),
        )
        return call(query, key, cache, *metadata)


def _place_heads(ctx: BuildContext, weight: Weight, part: slice, *, swap: bool = False) -> Placed:
    """Rows `part` of every head of a `[heads * dim, R]` tensor: `[heads, dim, R]`, split by head.

    swap: `[heads, R, dim]`.
    """
    heads, dim = weight.dims[0]
    rows = ctx.dim_map(weight.dims[0]).reshape(-1, dim.size)[:, part]
    columns = ctx.dim_map(weight.dims[1])

    def make(index: tuple[slice, ...], read: ReadTensor) -> np.ndarray:
        head, row, column = (index[0], *index[:0:-1]) if swap else index
        picked = rows[head, row]
        block = gather(weight, [picked.reshape(-1), columns[column]], read)
        block = block.reshape(*picked.shape, -1)
        return block.swapaxes(1, 2) if swap else block

    sizes = (rows.shape[1], len(columns))
    shape = (len(rows), *(sizes[::-1] if swap else sizes))
    return Placed((weight,), shape, (heads.name, None, None), make)
