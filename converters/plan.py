"""What a model is made from: rules x checkpoint headers x model, before any data is touched."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from converters.interface import Checkpoint
from converters.lazy import is_float
from model_defs import weights
from model_defs.decoder import DecoderSpec, canonical_shapes, placements
from model_defs.layers.linear import BuildContext, Placed
from model_defs.registry import Family, family_of
from model_defs.sharding import ShardingRules


@dataclass(frozen=True)
class PlanRow:
    """One canonical tensor: where it comes from and which device array it ends up in."""

    source: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    array: str
    array_shape: tuple[int, ...]
    sharding: PartitionSpec


@dataclass(frozen=True)
class ModelPlan:
    """A model without data, and where all of its data comes from.

    Attributes:
        architecture: as the config names it.
        model: the module; its parameters have shapes only.
        weights: canonical tensor -> expression over the checkpoint's tensors.
        placements: parameter path in the module -> how its device array is made.
        dtype: of the device arrays.
    """

    architecture: str
    spec: DecoderSpec
    family: Family
    model: nnx.Module
    weights: weights.WeightPlan
    placements: Mapping[tuple, Placed]
    rules: ShardingRules
    dtype: np.dtype

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(entry.shape) for entry in self.weights.entries.values())

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of the tensors used, in the checkpoint's own dtypes."""
        return sum(
            math.prod(entry.shape) * np.dtype(entry.expr.dtype).itemsize
            for entry in self.weights.entries.values()
        )

    @property
    def bytes_per_device(self) -> int:
        """Bytes of weights on each device, padding and copies made by sharding included."""
        return sum(
            math.prod(self.rules.sharding(*placed.axes).shard_shape(placed.shape))
            * self.dtype.itemsize
            for placed in self.placements.values()
        )

    def rows(self) -> list[PlanRow]:
        """The plan as a table, in the model's order."""
        return [
            PlanRow(
                source=str(self.weights.entries[weight.name].expr),
                name=weight.name,
                shape=weight.shape,
                dtype=self.weights.entries[weight.name].expr.dtype,
                array=".".join(map(str, path)),
                array_shape=placed.shape,
                sharding=self.rules.spec(*placed.axes),
            )
            for path, placed in self.placements.items()
            for weight in placed.weights
        ]


def plan_checkpoint(
    checkpoint: Checkpoint,
    rules: ShardingRules,
    *,
    dtype: np.dtype | None = None,
    cache_dtype: np.dtype | None = None,
) -> ModelPlan:
    """Match a checkpoint with the model its config describes; reads headers only.

    Args:
        rules: the mesh; an abstract one does.
        dtype: of weights and activations; None: the dtype most of the checkpoint is stored in.
        cache_dtype: of the KV cache; None: `dtype`.

    Raises:
        UnsupportedConfig: the config's architecture or one of its keys is not implemented.
        WeightPlanError: names every missing, unread and mis-shaped tensor.
    """
    family = family_of(checkpoint.config)
    spec = family.spec(checkpoint.config)
    dtype = stored_dtype(checkpoint) if dtype is None else dtype
    model = spec.build(BuildContext(rules, dtype, dtype if cache_dtype is None else cache_dtype))
    return ModelPlan(
        architecture=checkpoint.config["architectures"][0],
        spec=spec,
        family=family,
        model=model,
        weights=weights.plan(
            weight_rules(checkpoint), headers_of(checkpoint), canonical_shapes(model)
        ),
        placements=placements(model),
        rules=rules,
        dtype=dtype,
    )


def weight_rules(checkpoint: Checkpoint, family: Family | None = None) -> tuple[weights.Rule, ...]:
    """The rules from the checkpoint's names to canonical ones; none where they are canonical.

    Args:
        family: to read it as, if not as the config's own; what that has no use for is left out.
    """
    if family is None:
        own = family_of(checkpoint.config)
        return () if checkpoint.canonical else own.rules(checkpoint.config)
    rules = family.rules(checkpoint.config)
    if checkpoint.canonical:
        return tuple(rule for rule in rules if isinstance(rule, weights.Ignore))
    return rules


def headers_of(checkpoint: Checkpoint) -> dict[str, tuple[tuple[int, ...], str]]:
    """The checkpoint's headers as `model_defs.weights` takes them: name -> (shape, dtype name)."""
    return {name: (header.shape, str(header.dtype)) for name, header in checkpoint.headers.items()}


def stored_dtype(checkpoint: Checkpoint) -> np.dtype:
    """The floating-point dtype of most of the checkpoint's bytes; float32 where there is none.

    8-bit floats do not count: they are read as what their scales make of them.
    """
    num_bytes: Counter[np.dtype] = Counter()
    for header in checkpoint.headers.values():
        if is_float(header.dtype) and header.dtype.itemsize > 1:
            num_bytes[header.dtype] += header.num_bytes
    return num_bytes.most_common(1)[0][0] if num_bytes else np.dtype(np.float32)
