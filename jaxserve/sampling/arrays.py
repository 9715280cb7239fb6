"""Sampling parameters as arrays: packed on the host, unpacked on the device.

A step's parameters travel as one i32[NUM_COLUMNS, R] array (floats by their bits), so that they
cost one host-to-device copy, or none when the caller keeps them in a larger buffer:

    row of the buffer   0            1      2      3      4     5
    column              temperature  top_p  min_p  top_k  seed  position
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.request import SamplingParams

__all__ = ["NUM_COLUMNS", "POSITION", "SamplingArrays", "fill", "pack_into", "unpack"]

NUM_COLUMNS = 6
POSITION = 5  # the only column that changes from step to step

_COLUMNS = struct.Struct("=3fiIi")  # in the order of the module docstring
_GREEDY = np.frombuffer(_COLUMNS.pack(0.0, 1.0, 0.0, 0, 0, 0), np.int32)[:, None]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "top_p", "min_p", "top_k", "seed", "position"],
    meta_fields=[],
)
@dataclass(frozen=True)
class SamplingArrays:
    """How to sample each row.

    temperature: f32[R]; 0 is greedy, and such a row ignores the other columns.
    top_p, min_p: f32[R]; 1 and 0 switch them off.
    top_k: i32[R]; 0 or less switches it off.
    seed: u32[R]. position: i32[R], the index in its request of the token being sampled.
    """

    temperature: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    top_k: jax.Array
    seed: jax.Array
    position: jax.Array


def pack_into(buffer: np.ndarray, rows: Sequence[tuple[SamplingParams, int, int]]) -> None:
    """Write `rows` into the first columns of `buffer`; make the remaining columns greedy padding.

    buffer: i32[NUM_COLUMNS, R] with R >= len(rows), any strides (a slice of a larger buffer).
    rows: (parameters, seed, position) for each row; of a seed the low 32 bits are used.
    """
    assert buffer.dtype == np.int32, f"the buffer must be int32, not {buffer.dtype}"
    num_rows = len(rows)
    pack = _COLUMNS.pack
    packed = b"".join(
        [
            pack(p.temperature, p.top_p, p.min_p, p.top_k, seed & 0xFFFFFFFF, position)
            for p, seed, position in rows
        ]
    )
    buffer[:, :num_rows] = np.frombuffer(packed, np.int32).reshape(num_rows, NUM_COLUMNS).T
    buffer[:, num_rows:] = _GREEDY


def unpack(packed: jax.Array) -> SamplingArrays:
    """Read the columns that `pack_into` wrote; pure, to be traced inside the step.

    packed: i32[NUM_COLUMNS, R].
    """
    temperature, top_p, min_p = jax.lax.bitcast_convert_type(packed[:3], jnp.float32)
    seed = jax.lax.bitcast_convert_type(packed[4], jnp.uint32)
    return SamplingArrays(temperature, top_p, min_p, packed[3], seed, packed[5])


def fill(rows: Sequence[tuple[SamplingParams, int, int]], num_rows: int) -> SamplingArrays:
    """Make the numpy columns of `rows`, padded with greedy rows up to `num_rows`."""
    buffer = np.empty((NUM_COLUMNS, num_rows), np.int32)
    pack_into(buffer, rows)
    temperature, top_p, min_p = buffer[:3].view(np.float32)
    return SamplingArrays(
        temperature, top_p, min_p, buffer[3], buffer[4].view(np.uint32), buffer[5]
    )
