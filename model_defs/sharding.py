"""Logical axes and where they go on the device mesh.

Models name the axes of their weights; this file alone says which of them are split over which mesh
axis, and how an axis that does not divide evenly is padded or replicated so that it does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

DATA, EXPERT, TENSOR = "data", "expert", "tensor"
# Both axes over which one copy of the model is split. What is not an expert goes over the two
# together, so the number of devices that share the experts changes nothing for the other layers.
MODEL = (EXPERT, TENSOR)

MeshAxis = str | tuple[str, ...]

# Logical axes that are split, and over which mesh axes. Every other axis is replicated.
SPLIT: Mapping[str, MeshAxis] = {
    "tokens": DATA,
    "rows": DATA,
    "pages": DATA,
    "q_heads": MODEL,
    "kv_heads": MODEL,
    "ffn": MODEL,
    "vocab": MODEL,
    "experts": EXPERT,
    "expert_ffn": TENSOR,
}


class MeshError(ValueError):
    """The mesh asked for cannot be made of the devices there are."""


@dataclass(frozen=True)
class Axis:
    """A named dimension of a weight, in the checkpoint's own order and size."""

    name: str
    size: int


@dataclass(frozen=True)
class HeadLayout:
    """Query and KV heads as they lie on the mesh.

    Each KV head is kept `copies` times, each copy serving a slice of the head's query group; heads
    are padded with zeros up to a multiple of the shards. Zero heads contribute nothing, because the
    output projection's rows for them are zero as well.
    """

    heads: int
    kv_heads: int
    shards: int
    copies: int
    group: int  # query heads per placed KV head

    @property
    def placed_kv_heads(self) -> int:
        return -(-self.kv_heads * self.copies // self.shards) * self.shards

    @property
    def placed_heads(self) -> int:
        return self.placed_kv_heads * self.group

    def kv_map(self) -> np.ndarray:
        """`i64[placed_kv_heads]`: the checkpoint's KV head in each place, -1 for padding."""
        source = np.arange(self.placed_kv_heads) // self.copies
        return np.where(source < self.kv_heads, source, -1)

    def q_map(self) -> np.ndarray:
        """`i64[placed_heads]`: the checkpoint's query head in each place, -1 for padding."""
        group = self.heads // self.kv_heads
        place = np.arange(self.placed_heads)
        kv_place, within = place // self.group, place % self.group
        kv, copy = kv_place // self.copies, kv_place % self.copies
        member = copy * self.group + within
        valid = (kv < self.kv_heads) & (member < group)
        return np.where(valid, kv * group + member, -1)


@functools.cache
def head_layout(heads: int, kv_heads: int, shards: int) -> HeadLayout:
    """The layout with the smallest cache, then the fewest query heads, that splits evenly."""
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} KV heads")
    group = heads // kv_heads
    options = [
        HeadLayout(heads, kv_heads, shards, copies, -(-group // copies))
        for copies in range(1, group + 1)
    ]
    return min(options, key=lambda o: (o.placed_kv_heads, o.placed_heads, o.copies))


@dataclass(frozen=True)
class ShardingRules:
    """A mesh and the table that maps logical axes to its axes.

    With an `AbstractMesh` it answers every question about shapes and placement, but runs nothing.
    """

    mesh: Mesh | AbstractMesh
    table: tuple[tuple[str, MeshAxis], ...] = tuple(SPLIT.items())

    def mesh_axis(self, axis: str | None) -> MeshAxis | None:
        """The mesh axis, or several, that a logical axis is split over."""
        return dict(self.table).get(axis) if axis else None

    def shards(self, axis: str | None) -> int:
        """The number of parts a logical axis is split into."""
        names = self.mesh_axis(axis) or ()
        names = (names,) if isinstance(names, str) else names
        return math.prod(self.mesh.shape[name] for name in names)

    def spec(self, *axes: str | None) -> PartitionSpec:
        return PartitionSpec(*(self.mesh_axis(axis) for axis in axes))

    def sharding(self, *axes: str | None) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(*axes))

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Pin the sharding of an activation inside a jitted function."""
        if self.mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, self.sharding(*axes))

    def per_device(self, call: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable:
        """`call` on each device's part of its arguments, inside a jitted function.

        On one device that is `call` itself.
        """
        if self.mesh.size == 1:
            return call
        return jax.shard_map(
            call, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    @property
    def device_kind(self) -> str | None:
        """What JAX calls the devices of the mesh, for kernels; None without devices."""
        if isinstance(self.mesh, AbstractMesh):
            return None
        return self.mesh.devices.flat[0].device_kind

    def padded(self, axis: Axis) -> int:
        """Size of `axis` once padded to a multiple of its shards."""
        shards = self.shards(axis.name)
        return -(-axis.size // shards) * shards


def make_mesh(
    dp_size: int, tp_size: int, devices: Sequence[Any] | None = None, *, ep_size: int = 1
) -> Mesh:
    """A (data, expert, tensor) mesh over the first `dp_size * tp_size` devices.

    Args:
        tp_size: devices of one copy of the model: expert times tensor.
        ep_size: groups of them that keep different experts; inside a group each is split.

    Raises:
        MeshError: fewer devices than asked for, or `ep_size` does not divide `tp_size`.
    """
    shape = _mesh_shape(dp_size, tp_size, ep_size)
    devices = jax.devices() if devices is None else devices
    count = dp_size * tp_size
    if len(devices) < count:
        raise MeshError(
            f"--dp-size {dp_size} x --tp-size {tp_size} needs {count} devices, "
            f"{len(devices)} found ({devices[0].platform}). Lower them."
        )
    return Mesh(np.array(devices[:count]).reshape(shape), (DATA, *MODEL))


def make_abstract_mesh(dp_size: int, tp_size: int, *, ep_size: int = 1) -> AbstractMesh:
    """The same mesh without devices, to plan for a machine that is not this one."""
    return AbstractMesh(_mesh_shape(dp_size, tp_size, ep_size), (DATA, *MODEL))


def _mesh_shape(dp_size: int, tp_size: int, ep_size: int) -> tuple[int, int, int]:
    if tp_size % ep_size:
        raise MeshError(
            f"--ep-size {ep_size} does not divide --tp-size {tp_size}: the devices of one copy of "
            f"the model are shared out to groups of equal size, each with its own experts. "
            f"Change one of them."
        )
    return dp_size, ep_size, tp_size // ep_size
