"""Position-wise feed-forward networks. Activation in the model's dtype."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
from flax import nnx
from jaxtyping import Array, Float

from model_defs.hf_config import UnsupportedConfig
from model_defs.layers.linear import BuildContext, Linear
from model_defs.sharding import Axis

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
}


@dataclass(frozen=True)
class MLP:
    """`down(act(gate(x)) * up(x))` (Shazeer 2020, arXiv:2002.05202)."""

    width: int
    act: str = "silu"
    bias: bool = False

    def __post_init__(self) -> None:
        if self.act not in ACTIVATIONS:
            raise UnsupportedConfig(
                f"activation {self.act!r} is not implemented; implemented: {sorted(ACTIVATIONS)}."
            )

    def build(self, ctx: BuildContext, embed: Axis) -> MLPModule:
        return MLPModule(self, ctx, embed)


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

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        gate, up = self.gate_up(x)
        return self.down(ACTIVATIONS[self.spec.act](gate) * up)[0]
