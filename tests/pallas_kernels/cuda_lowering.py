"""Lowering for an NVIDIA GPU on a machine without one."""

from collections.abc import Callable

import jax
from jax.sharding import AbstractDevice, AbstractMesh

H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"
# From JAX 0.11 on, Triton's lowering asks which card it is for.
CARD = AbstractDevice(H100, None, "gpu")


def lowered_for_cuda(call: Callable, *arguments: object) -> str:
    """The program of `call` for CUDA, as text; arguments may be shapes."""
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=CARD)):
        traced = jax.jit(call).trace(*arguments)
        return traced.lower(lowering_platforms=("cuda",)).as_text()
