"""The block-sparse mask of local blocks and vertical stripes."""

from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class BlockSparse:
    """Which blocks of keys a block of queries sees, both counted from position 0.

    Query block i sees key block j <= i iff i - j < local_blocks, or
    (j + offset + 1) % vertical_stride == 0 with an offset of the query head's own (Abdin et al.
    2024, arXiv:2404.14219, section 2: each head keeps other blocks).

    Attributes:
        block_size: tokens per block.
        local_blocks: blocks up to and including its own that every query sees; at least 1.
        vertical_stride: one block in so many is seen by all later queries of a head.
    """

    block_size: int
    local_blocks: int
    vertical_stride: int

    def __post_init__(self) -> None:
        if min(self.block_size, self.local_blocks, self.vertical_stride) < 1:
            raise ValueError(f"{self}: every number must be at least 1")

    def visible(
        self, query_positions: jax.Array, key_positions: jax.Array, offsets: jax.Array
    ) -> jax.Array:
        """The mask, causality apart; the i32 arguments are broadcast against each other."""
        query_block = query_positions // self.block_size
        key_block = key_positions // self.block_size
        local = query_block - key_block < self.local_blocks
        return local | ((key_block + offsets + 1) % self.vertical_stride == 0)
