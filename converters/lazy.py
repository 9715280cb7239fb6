"""Tensors that are read block by block, so that a conversion never holds a whole one."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from converters.errors import CheckpointError
from converters.interface import Index

BLOCK_BYTES = 1 << 25


@dataclass(frozen=True)
class LazyTensor:
    """A tensor whose parts are made on demand.

    Attributes:
        read: gives the part that an index with one slice per axis names, in `dtype`.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def astype(self, dtype: np.dtype, name: str) -> "LazyTensor":
        """The same tensor in another floating-point dtype; `name` is for errors.

        Reading raises CheckpointError when a finite value does not fit into `dtype`.
        """
        if dtype == self.dtype:
            return self
        return LazyTensor(self.shape, dtype, lambda index: _cast(self.read(index), dtype, name))


def boxes(
    shape: tuple[int, ...],
    itemsize: int,
    max_bytes: int = BLOCK_BYTES,
    chunk: tuple[int, ...] | None = None,
) -> Iterator[Index]:
    """Cut an array into boxes of at most `max_bytes`, in C order, each made of whole `chunk`s.

    Without `chunk` each box is contiguous in C order, so their bytes in turn are the array's. A box
    holds at least one chunk, even when that is larger than `max_bytes`.
    """
    step = [1] * len(shape) if chunk is None else list(chunk)
    for axis in reversed(range(len(shape))):
        fits = max(1, max_bytes // (math.prod(step) * itemsize))
        step[axis] = max(1, min(shape[axis], step[axis] * fits))
        if step[axis] < shape[axis]:
            break
    starts = (range(0, size, length) for size, length in zip(shape, step, strict=True))
    for corner in itertools.product(*starts):
        yield tuple(
            slice(start, min(start + length, size))
            for start, length, size in zip(corner, step, shape, strict=True)
        )


def is_float(dtype: np.dtype) -> bool:
    """Return whether `dtype` is a floating-point type, ml_dtypes' included."""
    try:
        ml_dtypes.finfo(dtype)
    except ValueError:
        return False
    return dtype.kind != "c"


def _cast(block: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        out = block.astype(dtype)
    if ml_dtypes.finfo(dtype).max < ml_dtypes.finfo(block.dtype).max:
        lost = int(np.count_nonzero(np.isfinite(block) & ~np.isfinite(out)))
        if lost:
            raise CheckpointError(
                f"{name}: {lost} values do not fit into {dtype} (largest: "
                f"{float(ml_dtypes.finfo(dtype).max):.6g}). Convert to bfloat16 or float32 instead."
            )
    return out
