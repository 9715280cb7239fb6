"""Norms against their formula."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from model_defs.layers.norm import LayerNorm, RMSNorm
from model_defs.sharding import Axis

from .fill import built


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_is_its_formula(offset: float) -> None:
    x = np.random.default_rng(0).normal(size=(3, 2, 8)).astype(np.float32)
    norm, weights = built(lambda ctx: RMSNorm(1e-3, offset).build(ctx, Axis("embed", 8)))
    rms = np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3)
    expected = x / rms * (offset + weights["weight"])
    np.testing.assert_allclose(norm(x), expected, atol=1e-5)


def test_rms_norm_keeps_the_dtype_and_sums_in_float32() -> None:
    norm, weights = built(lambda ctx: RMSNorm(1e-6).build(ctx, Axis("embed", 4096)), jnp.bfloat16)
    x = jnp.full((1, 4096), 3.0, jnp.bfloat16)  # a bfloat16 sum of 4096 nines stops at 2048
    out = norm(x)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(out, np.float32)[0], weights["weight"], rtol=0.02, atol=0.01
    )


def standardised(x: np.ndarray, eps: float) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weight", [True, False])
def test_layer_norm_is_its_formula(weight: bool, bias: bool) -> None:
    x = np.random.default_rng(0).normal(2.0, 3.0, size=(3, 2, 8)).astype(np.float32)
    spec = LayerNorm(1e-2, bias=bias, weight=weight)
    norm, weights = built(lambda ctx: spec.build(ctx, Axis("embed", 8)))
    assert set(weights) == {n for n, has in (("weight", weight), ("bias", bias)) if has}
    expected = standardised(x, 1e-2) * weights.get("weight", 1) + weights.get("bias", 0)
    np.testing.assert_allclose(norm(x), expected, atol=1e-5)


def test_layer_norm_keeps_the_dtype_and_sums_in_float32() -> None:
    norm, _ = built(
        lambda ctx: LayerNorm(1e-6, bias=False, weight=False).build(ctx, Axis("embed", 4096)),
        jnp.bfloat16,
    )
    x = jnp.tile(jnp.array([2.0, 4.0], jnp.bfloat16), (1, 2048))
    out = norm(x)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32)[0, :2], [-1, 1], atol=0.01)


@pytest.mark.parametrize("tp_size", [1, 4])
def test_a_norm_of_each_head_has_a_weight_for_each(tp_size: int) -> None:
    x = np.random.default_rng(0).normal(size=(3, 4, 8)).astype(np.float32)
    norm, weights = built(
        lambda ctx: LayerNorm(1e-3, bias=False).build(ctx, Axis("q_heads", 4), Axis("dim", 8)),
        tp_size=tp_size,
    )
    assert weights["weight"].shape == (4, 8)
    np.testing.assert_allclose(norm(x), standardised(x, 1e-3) * weights["weight"], atol=1e-5)


def test_one_norm_over_all_heads_counts_copies_and_added_heads_once() -> None:
    x = np.random.default_rng(0).normal(size=(3, 2, 8)).astype(np.float32)
    norm, weights = built(lambda ctx: RMSNorm(1e-3).build(ctx, (Axis("heads", 2), Axis("dim", 8))))
    assert weights["weight"].shape == (16,)
    flat = x.reshape(3, 16)
    expected = flat / np.sqrt((flat**2).mean(-1, keepdims=True) + 1e-3) * weights["weight"]
    np.testing.assert_allclose(norm.over_heads(x, 16, 1), expected.reshape(3, 2, 8), atol=1e-5)
    placed = np.concatenate([np.repeat(x, 2, axis=1), np.zeros_like(x)], axis=1)
    wide, _ = built(lambda ctx: RMSNorm(1e-3).build(ctx, (Axis("heads", 6), Axis("dim", 8))))
    scale = np.asarray(wide.weight[...]).reshape(6, 8)
    plain = (flat / np.sqrt((flat**2).mean(-1, keepdims=True) + 1e-3)).reshape(3, 2, 8)
    expected = np.concatenate([np.repeat(plain, 2, axis=1), np.zeros_like(x)], axis=1) * scale
    np.testing.assert_allclose(wide.over_heads(placed, 16, 2), expected, atol=1e-5)
