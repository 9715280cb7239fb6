"""Embedding table and output head, whole and split over the vocabulary."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from model_defs.layers.embedding import Embedding, LMHead
from model_defs.sharding import Axis

from .fill import built

VOCAB, EMBED = Axis("vocab", 11), Axis("embed", 6)


@pytest.mark.parametrize("tp_size", [1, 4])
def test_lookup_gives_rows(tp_size: int) -> None:
    table, w = built(lambda ctx: Embedding(ctx, VOCAB, EMBED), tp_size=tp_size)
    tokens = np.array([0, 10, 3, 3, 7], np.int32)
    np.testing.assert_array_equal(table(jnp.asarray(tokens)), w["weight"][tokens])


@pytest.mark.parametrize("tp_size", [1, 4])
@pytest.mark.parametrize("kind", ["tied", "own"])
def test_heads_score_every_token_in_float32(kind: str, tp_size: int) -> None:
    build = Embedding if kind == "tied" else LMHead().build
    module, w = built(lambda ctx: build(ctx, VOCAB, EMBED), jnp.bfloat16, tp_size)
    (weight,) = w.values()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 6)), jnp.bfloat16)
    logits = module.attend(x) if kind == "tied" else module(x)
    assert logits.dtype == jnp.float32
    expected = np.asarray(x, np.float32) @ weight.T
    np.testing.assert_allclose(logits[:, :11], expected, atol=0.03, rtol=0.01)
