"""Random weights made on the devices: a model of any real size from its config alone.

What is measured with them costs what the real model costs; what is written with them means nothing.
"""

from __future__ import annotations

import logging
import math
import time
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from converters.interface import Progress
from jaxserve.engine.loader import Model
from model_defs.layers.linear import Placed
from model_defs.layers.norm import LayerNormModule, RMSNormModule

logger = logging.getLogger(__name__)

GOLDEN = 0x9E3779B9  # 2**32 / the golden ratio: multiples of it are spread evenly


def dummy_params(model: Model, seed: int, progress: Progress | None = None) -> tuple:
    """Every parameter of `model`, on its mesh, in the model's dtype.

    Matrices are uniform with mean 0 and variance 1 / fan_in, so that what goes in comes out about
    as large; norms scale by 1; biases and other vectors are 0. Nothing is made on the host, and no
    temporary is larger than a parameter.
    """
    start_s = time.perf_counter()
    constants = _constants(model.module)
    paths = _paths(model.module)
    arrays = []
    for index, (path, struct, placed) in enumerate(
        zip(paths, model.params, model.placed, strict=True)
    ):
        if path in constants or len(placed.weights[0].dims) < 2:
            value = constants.get(path, 0.0)
            array = jnp.full(struct.shape, value, struct.dtype, device=struct.sharding)
        else:
            fill = _filler(struct.shape, struct.dtype, struct.sharding)
            array = fill(_key(seed, index), math.sqrt(3 / _fan_in(placed)))
        arrays.append(array)
        if progress is not None:
            progress("making random weights", index + 1, len(paths))
    jax.block_until_ready(arrays)
    logger.info(
        "random weights: %.2f GB in %.2f s",
        sum(array.nbytes for array in arrays) / 1e9,
        time.perf_counter() - start_s,
    )
    return tuple(arrays)


def _paths(module: nnx.Module) -> list[tuple]:
    return [path for path, _ in nnx.to_flat_state(nnx.state(module, nnx.Param))]


def _constants(module: nnx.Module) -> dict[tuple, float]:
    """Parameter path -> the value of every norm's weight and bias, such that it scales by 1."""
    values = {}
    for path, part in nnx.iter_modules(module):
        if isinstance(part, RMSNormModule):
            values[*path, "weight"] = 1.0 - part.spec.offset
        elif isinstance(part, LayerNormModule):
            values |= {(*path, "weight"): 1.0, (*path, "bias"): 0.0}
    return values


def _fan_in(placed: Placed) -> int:
    """Numbers that are summed into one output: the last dimension of the checkpoint's tensor."""
    return math.prod(axis.size for axis in placed.weights[0].dims[-1])


def _key(seed: int, index: int) -> np.uint32:
    return np.uint32((seed * 0x85EBCA6B + (index + 1) * GOLDEN) & 0xFFFFFFFF)


@cache
def _filler(shape: tuple[int, ...], dtype: jnp.dtype, sharding: jax.sharding.Sharding):
    """A jitted `(key, bound) -> array` that is compiled once for all arrays of a kind."""
    return jax.jit(partial(_uniform, shape, dtype), out_shardings=sharding)


def _uniform(shape: tuple[int, ...], dtype: jnp.dtype, key, bound) -> jax.Array:
    """Uniform numbers in [-bound, bound), each a hash of its place and the key.

    A hash and not `jax.random`, whose random bits need memory of their own; this is one fused loop
    that only writes.
    """
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(shape):
        place = place * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, shape, axis)
    bits = _mixed(_mixed(place) + key)
    unit = (bits >> 8).astype(jnp.float32) * 2.0**-23 - 1.0
    return (unit * bound).astype(dtype)


def _mixed(bits: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3 (Appleby 2011, public domain): every bit depends on every."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
