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
from pallas_kernels.gated_matmul import gated_matmul

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
        self.spec, self.rules = spec, ctx.rules
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
        return self.down(self._hidden(x))[0]

    def _hidden(self, x: Float[Array, "T D"]) -> Float[Array, "T F"]:
        if self.gate_up.bias is not None:
            return self.spec.combine(*self.gate_up(x))
        rules, weight = self.rules, self.gate_up.weight
        axes = weight.get_metadata()["placed"].axes
        call = rules.per_device(
            partial(_gated, self.spec, device_kind=rules.device_kind),
            in_specs=(rules.spec("tokens", None), rules.spec(*axes)),
            out_specs=rules.spec("tokens", axes[1]),
        )
        return call(x, weight[...])


# Traced once per shape and spec, not once per layer: tracing is most of a warm start.
@partial(jax.jit, static_argnums=0, static_argnames="device_kind")
def _gated(
    spec: MLP, x: Float[Array, "T D"], gate_up: Float[Array, "D 1 2f"], device_kind: str | None
) -> Float[Array, "T f"]:
    """The hidden layer of one device: both halves lie side by side in its weights."""
    return gated_matmul(x, gate_up[:, 0], combine=spec.combine, device_kind=device_kind)
