"""The contract between a model and whoever runs it: what a step gives, what a layer must offer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionMetadata:
    """Which tokens of the step belong to which row, and where the row's KV pages are.

    With data parallelism every array is the concatenation of one such block per rank, and the
    numbers inside a block are local to the rank.
    """

    kv_lens: Int[Array, " R"]  # tokens in KV after this step
    page_table: Int[Array, "R P"]
    query_starts: Int[Array, " R+1"]
    distribution: Int[Array, " 3"]  # (decode rows, end of the prefill chunks, live rows)
    # Every live row has one token in this step; known when it is compiled.
    decode_only: bool = field(default=False, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ForwardBatch:
    """Everything a decoder reads in one step, padded to a bucket of T tokens and R rows."""

    tokens: Int[Array, " T"]
    positions: Int[Array, " T"]
    prompt_lens: Int[Array, " T"]  # prompt length of the token's request; 0: the token is padding
    attention: AttentionMetadata
    sample_at: Int[Array, " R"]  # token index, local to the rank, whose logits row r wants

    @property
    def live(self) -> Bool[Array, " T"]:
        """Which tokens are not padding."""
        return self.prompt_lens > 0


@dataclass(frozen=True)
class CacheSpec:
    """What one layer keeps per token.

    `num_kv_heads` counts heads as placed on the mesh (replicated and padded heads included).
    `shared_kv`: the first `v_head_dim` numbers of a key are its value, which is not kept again.
    """

    kind: str  # "paged"
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: np.dtype
    window: int | None = None
    shared_kv: bool = False

    @property
    def token_bytes(self) -> int:
        """Bytes per token over the whole mesh."""
        width = self.head_dim if self.shared_kv else self.head_dim + self.v_head_dim
        return self.num_kv_heads * width * self.dtype.itemsize


Cache = Any  # opaque to everyone but the kernel that reads it
Caches = tuple[Cache, ...]


class Mixer(Protocol):
    """Token mixing: attention or whatever replaces it."""

    def __call__(
        self, x: Float[Array, "T D"], batch: ForwardBatch, cache: Cache
    ) -> tuple[Float[Array, "T D"], Cache]: ...

    @property
    def cache_spec(self) -> CacheSpec: ...


class FeedForward(Protocol):
    """Channel mixing: one token at a time. Nobody reads what tokens that are not `live` become."""

    def __call__(
        self, x: Float[Array, "T D"], live: Bool[Array, " T"] | None = None
    ) -> Float[Array, "T D"]: ...
