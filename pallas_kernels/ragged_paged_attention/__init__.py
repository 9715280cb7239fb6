"""Attention over a ragged batch of requests whose keys and values live in pages."""

from pallas_kernels.ragged_paged_attention.api import (
    BlockSparse,
    cache_axes,
    cache_shape,
    default_page_size,
    import_kernels,
    ragged_paged_attention,
)

__all__ = [
    "BlockSparse",
    "cache_axes",
    "cache_shape",
    "default_page_size",
    "import_kernels",
    "ragged_paged_attention",
]
