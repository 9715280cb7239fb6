"""Reading blocks of arrays in kernels that are lowered through Triton."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt


def block_mask(
    shape: tuple[int, int], rows: jax.Array | None, columns: jax.Array | None
) -> jax.Array | None:
    """Which elements of a block exist: bool[shape], or None where all do.

    rows, columns: bool[shape[0]] and bool[shape[1]]; None means that all exist.
    """
    parts = [] if rows is None else [jnp.broadcast_to(rows[:, None], shape)]
    parts += [] if columns is None else [jnp.broadcast_to(columns[None], shape)]
    return None if not parts else parts[0] if len(parts) == 1 else parts[0] & parts[1]


def load_block(
    view, shape: tuple[int, int], rows: jax.Array | None, columns: jax.Array | None
) -> jax.Array:
    """Read the block that `view` addresses; elements that do not exist (`block_mask`) are zero."""
    mask = block_mask(shape, rows, columns)
    return plt.load(view) if mask is None else plt.load(view, mask=mask, other=0)
