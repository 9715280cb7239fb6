"""Norms against their formula."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from model_defs.layers.norm import RMSNorm
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
