"""Build one module with random weights, known by their canonical names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from model_defs.decoder import canonical_shapes, placements
from model_defs.layers.linear import BuildContext

from ..harness import context


def built(
    build: Callable[[BuildContext], Any],
    dtype: Any = np.float32,
    tp_size: int = 1,
    *,
    dp_size: int = 1,
    ep_size: int = 1,
) -> tuple[Any, dict[str, np.ndarray]]:
    """Return the module `build(ctx)` makes, and the weights it was filled with."""
    ctx = context(dp_size, tp_size, dtype, ep_size)
    module = build(ctx)
    rng = np.random.default_rng(7)
    weights = {
        name: rng.normal(size=shape).astype(ctx.dtype)
        for name, shape in canonical_shapes(module).items()
    }
    placed = placements(module)
    graphdef, params = nnx.split(module)
    flat = [
        (
            path,
            param.replace(
                jax.make_array_from_callback(
                    placed[path].shape,
                    ctx.sharding(placed[path]),
                    partial(placed[path].make, read=lambda name, index: weights[name][index]),
                )
            ),
        )
        for path, param in nnx.to_flat_state(params)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(flat)), {
        name: np.asarray(array, np.float32) for name, array in weights.items()
    }
