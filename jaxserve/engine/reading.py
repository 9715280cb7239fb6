"""What a text was read as: the values of its steps, put together on the host.

A prefill-only request ends with its last prompt token. Scores and the last token's hidden state
are whole in its last step, the first token's in its first; a mean grows with every step.
"""

from __future__ import annotations

import numpy as np

from jaxserve.scheduler.scheduler import Batch
from model_defs.decoder import DecoderSpec
from model_defs.layers.embedding import Pooling

TINY = 1e-12  # the least length a vector is divided by


def keep_read(spec: DecoderSpec, batch: Batch, values: np.ndarray) -> None:
    """Add a step's values to its requests' results.

    Steps must come in the order in which they were scheduled. A request that was preempted begins
    again at position 0, which drops what had been added for it.

    Args:
        values: f32[ranks, R, O], as `Decoder.read` gives them.
    """
    kind = spec.head.kind if isinstance(spec.head, Pooling) else "last"
    for rows, of_rank in zip(batch.ranks, values, strict=True):
        for row, value in zip(rows, of_rank, strict=False):
            request = row.request
            if kind == "mean":
                before = request.result if row.start else 0.0
                request.result = before + value.astype(np.float64)
            elif row.start == 0 if kind == "cls" else row.samples:
                request.result = value.copy()


def finish_read(spec: DecoderSpec, result: np.ndarray, num_tokens: int) -> np.ndarray:
    """A request's result, complete, from what its steps added up to.

    Returns:
        f32[L] scores, or the f32[D] embedding, of length 1 where the head says so.
    """
    if not isinstance(spec.head, Pooling):
        return result
    if spec.head.kind == "mean":
        result = result / num_tokens
    return unit(result) if spec.head.normalize else result.astype(np.float32)


def unit(vector: np.ndarray) -> np.ndarray:
    """`vector` with Euclidean length 1, in float32; the zero vector stays."""
    wide = vector.astype(np.float64)
    return (wide / max(float(np.linalg.norm(wide)), TINY)).astype(np.float32)
