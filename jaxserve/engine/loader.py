"""From a checkpoint to arrays on the mesh: each device gets its own part, read straight from disk.

Reading is lazy and one parameter at a time, so the host never holds more than the parts of one
parameter per device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jax
import numpy as np
from flax import nnx

from converters.interface import Checkpoint, Progress
from converters.plan import headers_of, weight_rules
from model_defs.decoder import Decoder, DecoderSpec, canonical_shapes, placements
from model_defs.layers.linear import BuildContext, Placed
from model_defs.registry import Family
from model_defs.sharding import ShardingRules
from model_defs.weights import WeightPlan, plan

READ_THREADS = 4


@dataclass(frozen=True)
class Model:
    """A model definition without data: what a step is traced from.

    Attributes:
        params: shape, dtype and sharding of each parameter, in the order the step takes them.
        merge: parameters in that order -> the NNX module.
    """

    spec: DecoderSpec
    module: Decoder
    rules: ShardingRules
    params: tuple[jax.ShapeDtypeStruct, ...]
    placed: tuple[Placed, ...]
    merge: Callable[[tuple[jax.Array, ...]], Decoder]


def build_model(
    spec: DecoderSpec, rules: ShardingRules, dtype: np.dtype, cache_dtype: np.dtype
) -> Model:
    """Build the module of `spec` for a mesh; nothing is allocated."""
    module = spec.build(BuildContext(rules, np.dtype(dtype), np.dtype(cache_dtype)))
    graph, state = nnx.split(module)
    leaves, tree = jax.tree.flatten(state)
    placed = tuple(placements(module).values())
    params = tuple(
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rules.sharding(*p.axes))
        for leaf, p in zip(leaves, placed, strict=True)
    )
    assert all(p.shape == q.shape for p, q in zip(params, placed, strict=True))

    def merge(arrays: tuple[jax.Array, ...]) -> Decoder:
        return nnx.merge(graph, jax.tree.unflatten(tree, arrays))

    return Model(spec, module, rules, params, placed, merge)


def plan_weights(
    checkpoint: Checkpoint, module: Decoder, family: Family | None = None
) -> WeightPlan:
    """Match a checkpoint with a module; raises WeightPlanError listing everything that is off.

    Args:
        family: what the module was made by, if not by the family of the checkpoint's config.
    """
    rules = weight_rules(checkpoint, family)
    return plan(rules, headers_of(checkpoint), canonical_shapes(module))


def load_params(
    model: Model,
    checkpoint: Checkpoint,
    progress: Progress | None = None,
    family: Family | None = None,
) -> tuple[jax.Array, ...]:
    """Read every parameter onto the mesh in the model's dtype; `family` as in `plan_weights`."""
    weights = plan_weights(checkpoint, model.module, family)

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        return weights.read(name, index, checkpoint.read)

    def load(item: tuple[jax.ShapeDtypeStruct, Placed]) -> jax.Array:
        struct, placed = item
        return jax.make_array_from_callback(
            struct.shape,
            struct.sharding,
            lambda index: np.ascontiguousarray(placed.make(index, read), struct.dtype),
        )

    total = sum(_size_bytes(p) for p in model.params)
    arrays, done = [], 0
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for array in pool.map(load, zip(model.params, model.placed, strict=True)):
            arrays.append(array)
            done += array.nbytes
            if progress is not None:
                progress("loading weights", done, total)
    return tuple(arrays)


def _size_bytes(array: jax.ShapeDtypeStruct) -> int:
    return int(np.prod(array.shape)) * array.dtype.itemsize


def params_bytes_per_device(model: Model) -> int:
    """Bytes of the parameters on one device."""
    return sum(
        int(np.prod(p.sharding.shard_shape(p.shape))) * p.dtype.itemsize for p in model.params
    )


def dtype_of(name: str, config: Mapping, platform: str) -> np.dtype:
    """The dtype to serve in: the one asked for, else the checkpoint's, float32 on a CPU.

    CPUs without matrix units for 16-bit floats run float32 several times faster.
    """
    if name != "auto":
        return jax.numpy.dtype(name)
    if platform == "cpu":
        return np.dtype(np.float32)
    stored = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return jax.numpy.dtype("bfloat16" if stored == "float32" else stored)
