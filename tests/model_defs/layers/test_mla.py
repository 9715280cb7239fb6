"""Latent attention in its absorbed form against keys and values made for every head."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model_defs.interface import AttentionMetadata, ForwardBatch
from model_defs.layers.mla import MLA, MLAModule
from model_defs.layers.norm import RMSNorm
from model_defs.layers.rope import Rope
from model_defs.sharding import Axis
from pallas_kernels.ragged_paged_attention import cache_axes, cache_shape

from .fill import built

TOKENS, EMBED, PAGES, PAGE_SIZE = 9, 24, 3, 4
PLAIN = MLA(
    heads=4,
    q_rank=12,
    kv_rank=16,
    nope_dim=6,
    rope_dim=4,
    v_dim=5,
    position=Rope(100.0, 4, interleaved=True),
    norm=RMSNorm(1e-6),
)
VARIANTS = {
    "plain": PLAIN,
    "queries without a latent": replace(PLAIN, q_rank=None),
    "rope in halves": replace(PLAIN, position=Rope(100.0, 4)),
    "scale": replace(PLAIN, scale=0.1),
    "bias": replace(PLAIN, bias=True),
    "heads that do not divide": replace(PLAIN, heads=3),
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


def naive(spec: MLA, w: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Attention with one key and one value per head, in float64 but for the rotation."""
    weights = {name: array.astype(np.float64) for name, array in w.items()}

    def project(name: str, y: np.ndarray) -> np.ndarray:
        return y @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def norm(name: str, y: np.ndarray) -> np.ndarray:
        rms = np.sqrt((y**2).mean(-1, keepdims=True) + spec.norm.eps)
        return y / rms * weights[f"{name}.weight"]

    def rotate(y: np.ndarray) -> np.ndarray:
        tables = spec.position.tables(one_row())
        return np.asarray(spec.position.rotate(jnp.asarray(y, jnp.float32), tables), np.float64)

    if spec.q_rank is None:
        q = project("q_proj", x)
    else:
        q = project("q_b_proj", norm("q_a_norm", project("q_a_proj", x)))
    q = q.reshape(TOKENS, spec.heads, -1)
    kv_a = project("kv_a_proj", x)
    k_rope = rotate(kv_a[:, None, spec.kv_rank :])
    kv = project("kv_b_proj", norm("kv_a_norm", kv_a[:, : spec.kv_rank]))
    kv = kv.reshape(TOKENS, spec.heads, -1)
    k = np.concatenate([kv[..., : spec.nope_dim], np.repeat(k_rope, spec.heads, 1)], -1)
    q = np.concatenate([q[..., : spec.nope_dim], rotate(q[..., spec.nope_dim :])], -1)
    scores = np.einsum("inh,jnh->nij", q, k) * (spec.scale or q.shape[-1] ** -0.5)
    scores = np.where(np.tri(TOKENS, dtype=bool), scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    out = np.einsum("nij,jnh->inh", p, kv[..., spec.nope_dim :])
    return project("o_proj", out.reshape(TOKENS, -1))


def paged(mixer: MLAModule, x: np.ndarray) -> np.ndarray:
    """The layer's output for one prompt; pages hold NaN before."""
    cache = mixer.cache_spec
    shape = cache_shape(
        PAGES,
        PAGE_SIZE,
        cache.num_kv_heads,
        cache.head_dim,
        cache.v_head_dim,
        cache.dtype,
        shared_kv=cache.shared_kv,
    )
    pages = jnp.full(shape, jnp.nan, cache.dtype, device=mixer.rules.sharding(*cache_axes()))
    with jax.default_matmul_precision("highest"):
        out, written = mixer(jnp.asarray(x), one_row(), pages)
    assert written.shape == shape
    return np.asarray(out)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("name", VARIANTS)
def test_absorbed_is_naive(name: str, tp_size: int) -> None:
    spec = VARIANTS[name]
    mixer, w = built(lambda ctx: spec.build(ctx, Axis("embed", EMBED)), tp_size=tp_size)
    x = np.random.default_rng(0).normal(size=(TOKENS, EMBED)).astype(np.float32) / EMBED
    wanted = naive(spec, w, x)
    np.testing.assert_allclose(paged(mixer, x), wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)


@pytest.mark.parametrize("tp_size", [1, 4])
def test_a_token_takes_the_latent_and_one_rotated_key(tp_size: int) -> None:
    spec = replace(PLAIN, kv_rank=512, rope_dim=64, position=Rope(100.0, 64))
    mixer, _ = built(lambda ctx: spec.build(ctx, Axis("embed", EMBED)), jnp.bfloat16, tp_size)
    cache = mixer.cache_spec
    assert cache.token_bytes == tp_size * (512 + 64) * 2  # a copy on every shard
    shape = cache_shape(
        10, 16, cache.num_kv_heads, cache.head_dim, cache.v_head_dim, cache.dtype, shared_kv=True
    )
    assert np.prod(shape) * 2 == 10 * 16 * cache.token_bytes
    local = mixer.rules.sharding(*cache_axes()).shard_shape(shape)
    assert np.prod(local) == 10 * 16 * (512 + 64)
