"""From logits to tokens, one set of sampling parameters per row.

`arrays` turns requests into the columns that the device reads; `sample` holds the pure functions
that the jitted step calls. Neither knows of schedulers, pages or models.
"""

from jaxserve.sampling.arrays import (
    NUM_COLUMNS,
    POSITION,
    SamplingArrays,
    fill,
    pack_into,
    unpack,
)
from jaxserve.sampling.sample import sample

__all__ = [
    "NUM_COLUMNS",
    "POSITION",
    "SamplingArrays",
    "fill",
    "pack_into",
    "sample",
    "unpack",
]
