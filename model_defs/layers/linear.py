"""Declared weights, how they are placed on a mesh, and the linear layer built from them.

A weight is declared once, by named axes. From the declaration follow its shape in the checkpoint
(`[out, in]`, Hugging Face's layout), its sharding, and the array on the device:

    checkpoint tensors          device array of a `Linear`
    q [N*H, D]                  [D, shards, L]   with L = the shard's q heads | k heads | v heads
    k [K*H, D]          ->      split over `shards` (column parallel) or over D (row parallel)
    v [K*H, D]

Several projections that read the same input are one array, so that one matmul serves them all.
Placement (fusing, padding, replicating heads) happens while loading and is never saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from model_defs.sharding import Axis, HeadLayout, ShardingRules


@dataclass(frozen=True)
class Weight:
    """One checkpoint tensor: its canonical name and, per dimension, the axes folded into it."""

    name: str
    dims: tuple[tuple[Axis, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(np.prod([a.size for a in dim])) for dim in self.dims)


ReadTensor = Callable[[str, tuple[slice, ...]], np.ndarray]


@dataclass(frozen=True)
class Placed:
    """How one device array is made from checkpoint tensors.

    Attributes:
        weights: the tensors, in the order in which they lie along the last dimension.
        shape: of the device array.
        axes: its logical axes, for sharding.
        make: `(index, read) -> block`: the part of the array that `index` selects, reading no more
            of the checkpoint than that part needs.
    """

    weights: tuple[Weight, ...]
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    make: Callable[[tuple[slice, ...], ReadTensor], np.ndarray] = field(compare=False)


@dataclass(frozen=True)
class BuildContext:
    """Where a module is built: mesh rules, dtypes, and its place in the tree."""

    rules: ShardingRules
    dtype: np.dtype  # of weights and activations
    cache_dtype: np.dtype
    path: str = ""
    heads: HeadLayout | None = None  # of the attention layer being built

    def at(self, *names: str | int) -> BuildContext:
        """The same context one level down."""
        path = ".".join([self.path, *map(str, names)]).lstrip(".")
        return replace(self, path=path)

    def weight(self, name: str, *dims: tuple[Axis, ...]) -> Weight:
        return Weight(f"{self.path}.{name}".lstrip("."), dims)

    def axis_map(self, axis: Axis) -> np.ndarray:
        """`i64[placed size]`: checkpoint index in each place of `axis`, -1 for padding."""
        if self.heads and axis.name == "q_heads":
            return self.heads.q_map()
        if self.heads and axis.name == "kv_heads":
            return self.heads.kv_map()
        places = np.arange(self.rules.padded(axis))
        return np.where(places < axis.size, places, -1)

    def dim_map(self, dim: tuple[Axis, ...]) -> np.ndarray:
        """The same for a dimension made of several axes, flattened."""
        out = np.zeros(1, np.int64)
        for axis in dim:
            index = self.axis_map(axis)
            out = np.where(
                (out[:, None] < 0) | (index < 0), -1, out[:, None] * axis.size + index
            ).reshape(-1)
        return out

    def param(self, placed: Placed) -> nnx.Param:
        """A parameter without data; the loader fills it as `placed` says."""
        return nnx.Param(jax.ShapeDtypeStruct(placed.shape, self.dtype), placed=placed)

    def sharding(self, placed: Placed) -> NamedSharding:
        return self.rules.sharding(*placed.axes)


def gather(weight: Weight, maps: Sequence[np.ndarray], read: ReadTensor) -> np.ndarray:
    """Read the places `maps` of a tensor; -1 gives zeros. Reads the smallest enclosing box."""
    box, picks, pads = [], [], []
    for index in maps:
        live = index[index >= 0]
        lo, hi = (int(live.min()), int(live.max()) + 1) if live.size else (0, 1)
        box.append(slice(lo, hi))
        picks.append(np.where(index < 0, 0, index - lo))
        pads.append(index < 0)
    block = read(weight.name, tuple(box))
    for dim, (pick, pad) in enumerate(zip(picks, pads, strict=True)):
        if block.shape[dim] != len(pick) or np.any(pick != np.arange(len(pick))):
            block = np.take(block, pick, axis=dim)
        if pad.any():
            block = block.copy()
            block[(slice(None),) * dim + (pad,)] = 0
    return block


def vector(ctx: BuildContext, weight: Weight) -> Placed:
    """Placement of a tensor as it is: norms, embeddings, anything that is not multiplied."""
    maps = [ctx.dim_map(dim) for dim in weight.dims]

    def make(index: tuple[slice, ...], read: ReadTensor) -> np.ndarray:
        return gather(weight, [m[i] for m, i in zip(maps, index, strict=True)], read)

    return Placed((weight,), tuple(map(len, maps)), tuple(dim[0].name for dim in weight.dims), make)


def _columns(ctx: BuildContext, weights: Sequence[Weight]) -> tuple[int, list[np.ndarray]]:
    """Shards of the output dimension, and each weight's output map as `[shards, local]`."""
    names = {ctx.rules.mesh_axis(w.dims[0][0].name) for w in weights}
    if len(names) > 1:
        raise ValueError(f"{[w.name for w in weights]}: one array, but split over {names}")
    shards = ctx.rules.shards(weights[0].dims[0][0].name)
    return shards, [ctx.dim_map(w.dims[0]).reshape(shards, -1) for w in weights]


def place_matrix(ctx: BuildContext, weights: Sequence[Weight]) -> Placed:
    """Placement of `[out, in]` matrices that share their input as one `[in, shards, L]` array."""
    _, columns = _columns(ctx, weights)
    shards = columns[0].shape[0]
    rows = ctx.dim_map(weights[0].dims[1])

    def make(index: tuple[slice, ...], read: ReadTensor) -> np.ndarray:
        blocks = [
            np.concatenate(
                [
                    gather(w, [c[s], rows[index[0]]], read)
                    for w, c in zip(weights, columns, strict=True)
                ]
            ).T
            for s in range(*index[1].indices(shards))
        ]
        return np.stack(blocks, axis=1)[:, :, index[2]]

    shape = (len(rows), shards, sum(c.shape[1] for c in columns))
    axes = (weights[0].dims[1][0].name, weights[0].dims[0][0].name, None)
    return Placed(tuple(weights), shape, axes, make)


def place_bias(ctx: BuildContext, weights: Sequence[Weight]) -> Placed:
    """Placement of the biases of such a matrix as one `[shards, L]` array."""
    _, columns = _columns(ctx, weights)
    shards = columns[0].shape[0]

    def make(index: tuple[slice, ...], read: ReadTensor) -> np.ndarray:
        blocks = [
            np.concatenate([gather(w, [c[s]], read) for w, c in zip(weights, columns, strict=True)])
            for s in range(*index[0].indices(shards))
        ]
        return np.stack(blocks)[:, index[1]]

    shape = (shards, sum(c.shape[1] for c in columns))
    return Placed(tuple(weights), shape, (weights[0].dims[0][0].name, None), make)


def place_stack(ctx: BuildContext, axis: Axis, each: Sequence[Placed]) -> Placed:
    """Placement of equal arrays as one, `each[i]` at place i of a new first axis.

    Places added to `axis` by sharding are zero.
    """
    places = ctx.axis_map(axis)

    def make(index: tuple[slice, ...], read: ReadTensor) -> np.ndarray:
        within, first = index[1:], each[0].weights[0]
        sizes = [
            len(range(*part.indices(size)))
            for part, size in zip(within, each[0].shape, strict=True)
        ]
        corner = read(first.name, tuple(slice(0, 1) for _ in first.dims))  # for its dtype
        block = np.zeros((len(places[index[0]]), *sizes), corner.dtype)
        for place, item in enumerate(places[index[0]]):
            if item >= 0:
                block[place] = each[item].make(within, read)
        return block

    weights = tuple(weight for placed in each for weight in placed.weights)
    return Placed(weights, (len(places), *each[0].shape), (axis.name, *each[0].axes), make)


class Linear(nnx.Module):
    """`y_p = x @ W_p.T + b_p` for one or several projections `p` of the same input, fused.

    Args:
        ctx: at the module that owns the projections.
        out: canonical name of each projection and its output axes.
        into: the input axes.
        bias: names of the projections that have a bias.
    """

    def __init__(
        self,
        ctx: BuildContext,
        out: Mapping[str, tuple[Axis, ...]],
        into: tuple[Axis, ...],
        bias: Sequence[str] = (),
    ):
        weights = [ctx.weight(f"{name}.weight", axes, into) for name, axes in out.items()]
        self.weight = ctx.param(place_matrix(ctx, weights))
        if bias and set(bias) != set(out):
            raise ValueError(f"{ctx.path}: a bias on {list(bias)} but not on all of {list(out)}")
        biases = [ctx.weight(f"{name}.bias", axes) for name, axes in out.items()]
        self.bias = ctx.param(place_bias(ctx, biases)) if bias else None
        shards, columns = _columns(ctx, weights)
        self.shards = shards
        self.sizes = tuple(c.shape[1] for c in columns)
        self.tails = tuple(tuple(a.size for a in axes[1:]) for axes in out.values())

    def __call__(self, x: Float[Array, "T I"], dtype: DTypeLike | None = None) -> tuple[Array, ...]:
        """One `[T, *placed output axes]` array per projection, in `dtype` (default: that of x)."""
        y = jnp.einsum("ti,isl->tsl", x, self.weight[...], preferred_element_type=dtype or x.dtype)
        if self.bias is not None:
            y = y + self.bias[...]
        parts, start = [], 0
        for size, tail in zip(self.sizes, self.tails, strict=True):
            part = y[:, :, start : start + size]
            parts.append(part.reshape(x.shape[0], -1, *tail))
            start += size
        return tuple(parts)
