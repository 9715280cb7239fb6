"""What every checkpoint format looks like to its reader: `TensorHeader` and `Checkpoint`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

Index = tuple[slice, ...]
"""One slice per leading axis (axes left out are whole), step 1: the part of a tensor to read."""


@dataclass(frozen=True)
class TensorHeader:
    """Name, shape and dtype of one stored tensor; known without touching its bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        """Size of the whole tensor as `Checkpoint.read` returns it."""
        return math.prod(self.shape) * self.dtype.itemsize


class Progress(Protocol):
    """Called as work goes on; `done` and `total` are bytes, `total` is 0 while unknown."""

    def __call__(self, what: str, done: int, total: int) -> None: ...


@runtime_checkable
class Checkpoint(Protocol):
    """Model weights and their configuration, whatever the file format is.

    Tensors have HF's names, or, where `canonical` is true, the names of our own model definitions.
    `read` returns a fresh, C-contiguous numpy array (ml_dtypes for bfloat16 and float8) that holds
    only the asked slice, and may be called from several threads at once.
    """

    path: Path
    canonical: bool
    config: dict[str, Any]
    generation_config: dict[str, Any]
    headers: Mapping[str, TensorHeader]

    @property
    def tokenizer_dir(self) -> Path | None: ...

    def read(self, name: str, index: Index | None = None) -> np.ndarray: ...


def slice_bounds(
    name: str, shape: tuple[int, ...], index: Index | None
) -> tuple[tuple[int, int], ...]:
    """Turn `index` into one (start, stop) per axis of `shape`.

    Raises IndexError when `index` has more axes than the tensor or a step other than 1.
    """
    index = () if index is None else index
    if len(index) > len(shape):
        raise IndexError(f"{name} has shape {shape}, but the index {index} has {len(index)} axes")
    bounds = []
    for axis, size in enumerate(shape):
        start, stop, step = (index[axis] if axis < len(index) else slice(None)).indices(size)
        if step != 1:
            raise IndexError(f"{name}: only slices with step 1 can be read, asked: {index[axis]}")
        bounds.append((start, max(start, stop)))
    return tuple(bounds)
