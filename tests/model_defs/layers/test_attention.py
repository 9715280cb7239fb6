"""Paged attention of one layer against dense attention in numpy."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from model_defs.hf_config import HFConfig
from model_defs.interface import AttentionMetadata, ForwardBatch
from model_defs.layers.attention import GQA, ALiBi
from model_defs.layers.norm import LayerNorm, RMSNorm
from model_defs.layers.rope import Rope
from model_defs.sharding import Axis
from pallas_kernels.ragged_paged_attention import cache_shape

from .fill import built

TOKENS, EMBED = 9, 12
PLAIN = GQA(heads=4, kv_heads=2, head_dim=8)
VARIANTS = {
    "plain": PLAIN,
    "one kv head": replace(PLAIN, kv_heads=1),
    "as many kv heads": replace(PLAIN, kv_heads=4),
    "rope": replace(PLAIN, position=Rope(100.0, 8)),
    "scale": replace(PLAIN, scale=0.7),
    "window": replace(PLAIN, window=3),
    "window of one": replace(PLAIN, window=1),
    "softcap": replace(PLAIN, softcap=1.5),
    "qk_norm": replace(PLAIN, qk_norm=RMSNorm(1e-6, 1.0), position=Rope(100.0, 4)),
    "LayerNorm of each head": replace(
        PLAIN, qk_norm=LayerNorm(1e-6, bias=False), qk_norm_over="each_head"
    ),
    "norm of each head": replace(PLAIN, qk_norm=RMSNorm(1e-6), qk_norm_over="each_head"),
    "norm over all heads": replace(PLAIN, qk_norm=RMSNorm(1e-6), qk_norm_over="all_heads"),
    "clip": replace(PLAIN, clip=1.0, position=Rope(100.0, 8)),
    "clip after norm": replace(PLAIN, clip=1.0, qk_norm=RMSNorm(1e-6)),
    "logn": replace(PLAIN, logn=4),
    "interleaved rope": replace(PLAIN, position=Rope(100.0, 4, interleaved=True)),
    "alibi": replace(PLAIN, position=ALiBi()),
    "alibi, six heads": replace(PLAIN, heads=6, position=ALiBi()),
    "qkv_bias": replace(PLAIN, qkv_bias=True),
    "out_bias": replace(PLAIN, out_bias=True),
}


# The paper's example for 4 heads, and its authors' rule for 6: those of 4, two of 8's between.
SLOPES = {
    4: np.array([1 / 4, 1 / 16, 1 / 64, 1 / 256]),
    6: np.array([1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]),
}


def one_row() -> ForwardBatch:
    positions = jnp.arange(TOKENS, dtype=jnp.int32)
    attention = AttentionMetadata(
        kv_lens=jnp.array([TOKENS], jnp.int32),
        page_table=jnp.array([[2, 0, 1]], jnp.int32),
        query_starts=jnp.array([0, TOKENS], jnp.int32),
        distribution=jnp.array([0, 1, 1], jnp.int32),
    )
    return ForwardBatch(
        positions, positions, jnp.full_like(positions, TOKENS), attention, jnp.array([TOKENS - 1])
    )


def normalised(spec: GQA, y: np.ndarray, weight: np.ndarray) -> np.ndarray:
    shape = y.shape
    if spec.qk_norm_over == "all_heads":
        y = y.reshape(TOKENS, 1, -1)
    if isinstance(spec.qk_norm, LayerNorm):
        y, offset = y - y.mean(-1, keepdims=True), 0.0
    else:
        offset = spec.qk_norm.offset
    rms = np.sqrt((y**2).mean(-1, keepdims=True) + spec.qk_norm.eps)
    return (y / rms * (offset + weight)).reshape(shape)


def dense(spec: GQA, w: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    def project(name: str, heads: int, norm: str | None) -> np.ndarray:
        y = x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)
        y = y.reshape(TOKENS, heads, spec.head_dim)
        if norm and spec.qk_norm:
            y = normalised(spec, y, w[f"{norm}.weight"])
        if spec.clip:
            y = np.clip(y, -spec.clip, spec.clip)
        if norm and isinstance(spec.position, Rope):
            y = np.asarray(spec.position.rotate(y, spec.position.tables(one_row())))
        return np.repeat(y, spec.heads // heads, axis=1)

    q = project("q_proj", spec.heads, "q_norm")
    k = project("k_proj", spec.kv_heads, "k_norm")
    v = project("v_proj", spec.kv_heads, None)
    if spec.logn:
        factors = np.log(np.arange(TOKENS) + 1) / np.log(spec.logn)
        q = q * np.maximum(factors, 1)[:, None, None]
    scores = np.einsum("inh,jnh->nij", q, k) * (spec.scale or spec.head_dim**-0.5)
    if spec.softcap:
        scores = spec.softcap * np.tanh(scores / spec.softcap)
    distance = np.arange(TOKENS)[:, None] - np.arange(TOKENS)
    if isinstance(spec.position, ALiBi):
        scores = scores - SLOPES[spec.heads][:, None, None] * distance
    seen = (distance >= 0) & (distance < (spec.window or TOKENS))
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("nij,jnh->inh", weights, v).reshape(TOKENS, -1)
    return out @ w["o_proj.weight"].T + w.get("o_proj.bias", 0)


@pytest.mark.parametrize("name", VARIANTS)
def test_paged_attention_is_dense_attention(name: str) -> None:
    spec = VARIANTS[name]
    mixer, w = built(lambda ctx: spec.build(ctx, Axis("embed", EMBED)))
    x = np.random.default_rng(0).normal(size=(TOKENS, EMBED)).astype(np.float32)
    cache = mixer.cache_spec
    pages = jnp.full(
        cache_shape(3, 4, cache.num_kv_heads, cache.head_dim, cache.v_head_dim, cache.dtype),
        jnp.nan,
        cache.dtype,
    )
    out, _ = mixer(jnp.asarray(x), one_row(), pages)
    np.testing.assert_allclose(out, dense(spec, w, x), atol=2e-4, rtol=1e-4)


def test_sizes_are_read_under_their_usual_names() -> None:
    cfg = HFConfig({"hidden_size": 48, "num_attention_heads": 6}, "TestForCausalLM")
    assert GQA.from_hf(cfg, position=None) == GQA(heads=6, kv_heads=6, head_dim=8)
    cfg = HFConfig(
        {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 24}, "TestForCausalLM"
    )
    assert GQA.from_hf(cfg, position=None, window=5) == GQA(6, 2, 24, window=5)


def test_cache_bytes_count_the_heads_on_the_mesh() -> None:
    one, _ = built(lambda ctx: PLAIN.build(ctx, Axis("embed", EMBED)), jnp.bfloat16)
    assert one.cache_spec.token_bytes == 2 * (8 + 8) * 2
    many, _ = built(lambda ctx: PLAIN.build(ctx, Axis("embed", EMBED)), jnp.bfloat16, tp_size=4)
    assert many.cache_spec.num_kv_heads == 4
