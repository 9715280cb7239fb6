"""Blocks of arrays in kernels for Hopper GPUs (compute capability 9.0), which Mosaic lowers."""

from collections.abc import Mapping

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # The height of Hopper's matrix instruction.
ALIGNMENT = 8  # Rows: the height of a swizzle atom in shared memory.
SWIZZLE_BYTES = 128  # Its width.
_SHARED_MEMORY_BYTES = 227 * 1024
_BARRIER_BYTES = 1024


def swizzled(dtype: jnp.dtype) -> tuple:
    """Transforms of arrays in shared memory that matrix instructions read."""
    return (
        plgpu.TilingTransform((ALIGNMENT, SWIZZLE_BYTES // dtype.itemsize)),
        plgpu.SwizzleTransform(SWIZZLE_BYTES),
    )


def refuse(kernel: str, refusals: Mapping[str, bool], *, shared_memory_bytes: int) -> None:
    """Raise NotImplementedError for the first of what a kernel does not do that holds.

    shared_memory_bytes: of one thread block, barriers aside; more than there is is refused.
    """
    too_much = shared_memory_bytes + _BARRIER_BYTES > _SHARED_MEMORY_BYTES
    for what, refused in {
        **refusals,
        f"{shared_memory_bytes} bytes of shared memory": too_much,
    }.items():
        if refused:
            raise NotImplementedError(f"{kernel} does not do {what}")
