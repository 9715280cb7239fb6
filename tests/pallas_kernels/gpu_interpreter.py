"""The parameters of Mosaic's interpreter for GPUs, under one name in every JAX."""

from jax.experimental.pallas import mosaic_gpu as plgpu

try:
    InterpretGPUParams = getattr(plgpu, "InterpretGPUParams")  # noqa: B009  # JAX 0.11 and later.
except AttributeError:
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

__all__ = ["InterpretGPUParams"]
