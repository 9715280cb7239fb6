"""Position-wise feed-forward networks.

The activation function in float32, its result in the model's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from model_defs.hf_config import HFConfig, UnsupportedConfig
from model_defs.layers.linear import BuildContext, Linear
from model_defs.sharding import Axis

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


@dataclass(frozen=True)
class MLP:
    """`down(act(gate(x)) * (up(x) + shift))` (Shazeer 2020, arXiv:2002.05202).

    `limit` clamps the gate from above and the other half from both sides, before anything else.
    """

    width: int
    act: str = "silu"
    bias: bool = False
    limit: float | None = None
    shift: float = 0.0

    @classmethod
    def from_hf(cls, cfg: HFConfig, **rest: Any) -> MLP:
        """Read width and activation under their usual names; `rest` are the other attributes."""
        return cls(cfg["intermediate_size"], cfg.get("hidden_act", "silu"), **rest)

    def __post_init__(self) -> None:
        if self.act not in ACTIVATIONS:
            raise UnsupportedConfig(
                f"activation {self.act!r} is not implemented; implemented: {sorted(ACTIVATIONS)}."
            )

    def build(self, ctx: BuildContext, embed: Axis) -> MLPModule:
        return MLPModule(self, ctx, embed)

    def combine(self, gate: Array, up: Array) -> Array:
        """The two halves of the hidden layer as one."""
        if self.limit is not None:
            gate = jnp.minimum(gate, self.limit)
            up = jnp.clip(up, -self.limit, self.limit)
        # In bfloat16 JAX rounds inside, too: up to a third of the results miss the nearest value.
        hidden = ACTIVATIONS[self.act](gate.astype(jnp.float32)).astype(gate.dtype)
        return hidden * (up + self.shift if self.shift else up)


class MLPModule(nnx.Module):
    def __init__(self, spec: MLP, ctx: BuildContext, embed: Axis):
        self.spec = spec
        ffn = Axis("ffn", spec.width)
        pair = ("gate_proj", "up_proj")
        self.gate_up = Linear(
            ctx, dict.fromkeys(pair, (ffn,)), (embed,), bias=pair if spec.bias else ()
        )
        self.down = Linear(
            ctx, {"down_proj": (embed,)}, (ffn,), bias=("down_proj",) if spec.bias else ()
        )

    def __call__(
        self, x: Float[Array, "T D"], live: Bool[Array, " T"] | None = None
    ) -> Float[Array, "T D"]:
        del live  # Every token costs the same.
        gate, up = self.gate_up(x)
        return self.down(self.spec.combine(gate, up))[0]
