"""Feed-forward networks against their formula."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from model_defs.hf_config import UnsupportedConfig
from model_defs.layers.mlp import MLP
from model_defs.sharding import Axis

from .fill import built

FORMULAS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_pytorch_tanh": lambda x: (
        0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
}


@pytest.mark.parametrize("tp_size", [1, 4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("act", FORMULAS)
def test_mlp_is_its_formula(act: str, bias: bool, tp_size: int) -> None:
    x = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    # 10 does not divide over 4 shards.
    mlp, w = built(lambda ctx: MLP(10, act, bias).build(ctx, Axis("embed", 6)), tp_size=tp_size)

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + (w[f"{name}.bias"] if bias else 0)

    inner = FORMULAS[act](linear("gate_proj", x)) * linear("up_proj", x)
    np.testing.assert_allclose(mlp(x), linear("down_proj", inner), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("act", FORMULAS)
def test_an_activation_in_bfloat16_is_rounded_once(act: str) -> None:
    gate = np.random.default_rng(0).normal(0, 3, 4096).astype(ml_dtypes.bfloat16)
    found = np.asarray(MLP(1, act).combine(gate, np.ones_like(gate)))
    assert found.dtype == ml_dtypes.bfloat16
    exact = FORMULAS[act](gate.astype(np.float64))
    half_step = 2.0**-8  # relative; the rest is for what float32 itself loses near zero
    np.testing.assert_allclose(found.astype(np.float64), exact, rtol=1.01 * half_step, atol=1e-6)


def test_unknown_activation_lists_the_known_ones() -> None:
    with pytest.raises(UnsupportedConfig, match=r"'mish'.*silu"):
        MLP(10, "mish")
