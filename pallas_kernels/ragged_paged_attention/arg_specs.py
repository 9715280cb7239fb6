"""Named real shapes of ragged paged attention, shared by tests, bench and tuning."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.ragged_paged_attention.block_sparse import BlockSparse
from pallas_kernels.ragged_paged_attention.layout import pack_cache


@dataclass(frozen=True)
class ArgSpec:
    """One call: a model's attention and a batch.

    rows: (new tokens, kv tokens) of each live row; rows with one new token first, as schedulers
    put them. tokens, row_slots: padded sizes T and R. pages_per_row: P, or None for just enough.
    block_sparse: head n has the offset n. shared_kv: values are part of their key.
    """

    name: str
    rows: tuple[tuple[int, int], ...]
    tokens: int
    row_slots: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    page_size: int = 64
    pages_per_row: int | None = None
    window: int | None = None
    softcap: float | None = None
    alibi: bool = False
    block_sparse: BlockSparse | None = None
    shared_kv: bool = False
    dtype: str = "float32"

    def options(self) -> dict:
        """Keyword arguments of the call."""
        slopes = None
        if self.alibi:
            heads = np.arange(1, self.num_heads + 1)
            slopes = jnp.asarray(2.0 ** (-8.0 * heads / self.num_heads), jnp.float32)
        return {
            "scale": self.head_dim**-0.5,
            "window": self.window,
            "softcap": self.softcap,
            "alibi_slopes": slopes,
            "block_sparse": self.block_sparse,
            "block_offsets": jnp.arange(self.num_heads) if self.block_sparse else None,
            "v_head_dim": self.v_head_dim,
        }

    def arguments(self, seed: int = 0, platform: str = "cpu") -> tuple[Any, ...]:
        """Random q, k, v (None if shared), cache, kv_lens, page_table, query_starts, distribution.

        The cache is laid out as `platform` keeps it.

        Pages are handed out in random order; what no row has written yet (spare pages, and slots
        from each row's first new token on) is NaN.
        """
        rng = np.random.default_rng(seed)
        counts = [-(-kv_len // self.page_size) for _, kv_len in self.rows]
        num_pages = sum(counts) + 3
        max_pages = self.pages_per_row or max([1, *counts])
        free = list(rng.permutation(num_pages))

        kv_lens = np.zeros(self.row_slots, np.int32)
        page_table = np.full((self.row_slots, max_pages), free.pop(), np.int32)
        query_starts = np.zeros(self.row_slots + 1, np.int32)
        shape = (num_pages, self.num_kv_heads, self.page_size)
        keys = np.full((*shape, self.head_dim), np.nan, np.float32)
        values = np.full((*shape, self.v_head_dim), np.nan, np.float32)
        for row, ((num_new, kv_len), count) in enumerate(zip(self.rows, counts, strict=True)):
            kv_lens[row] = kv_len
            query_starts[row + 1] = query_starts[row] + num_new
            for column in range(count):
                page = page_table[row, column] = free.pop()
                known = min(self.page_size, max(0, kv_len - num_new - column * self.page_size))
                for pages in (keys, values):
                    filled = pages[page, :, :known]
                    filled[...] = rng.standard_normal(filled.shape)
        query_starts[len(self.rows) + 1 :] = query_starts[len(self.rows)]
        singles = 0
        while singles < len(self.rows) and self.rows[singles][0] == 1:
            singles += 1
        distribution = np.array([singles, len(self.rows), len(self.rows)], np.int32)

        def normal(*shape: int) -> jax.Array:
            return jnp.asarray(rng.standard_normal(shape), self.dtype)

        return (
            normal(self.tokens, self.num_heads, self.head_dim),
            normal(self.tokens, self.num_kv_heads, self.head_dim),
            None if self.shared_kv else normal(self.tokens, self.num_kv_heads, self.v_head_dim),
            pack_cache(
                jnp.asarray(keys, self.dtype),
                None if self.shared_kv else jnp.asarray(values, self.dtype),
                platform=platform,
            ),
            *map(jnp.asarray, (kv_lens, page_table, query_starts, distribution)),
        )


_SMOLLM2_135M = ArgSpec("smollm2_135m", (), 1, 1, 9, 3, 64, 64)
_LLAMA_3_8B_TP4 = ArgSpec("llama3_8b_tp4", (), 1, 1, 8, 2, 128, 128, dtype="bfloat16")
_GEMMA3_270M = ArgSpec("gemma3_270m", (), 1, 1, 4, 1, 256, 256, window=512)
_GEMMA2_9B_TP8 = ArgSpec(
    "gemma2_9b_tp8", (), 1, 1, 2, 1, 256, 256, window=4096, softcap=50.0, dtype="bfloat16"
)
_MHA_ALIBI = ArgSpec("mha_alibi", (), 1, 1, 8, 8, 64, 64, alibi=True, dtype="float16")
_WIDE_VALUES = ArgSpec("wide_values", (), 1, 1, 4, 2, 48, 96)
_WIDE_KEYS = ArgSpec("wide_keys", (), 1, 1, 6, 2, 96, 64)
_PHI3_SMALL_TP4 = ArgSpec(
    "phi3_small_tp4", (), 1, 1, 8, 2, 128, 128, block_sparse=BlockSparse(64, 16, 8)
)
_DEEPSEEK_V3_TP8 = ArgSpec("deepseek_v3_tp8", (), 1, 1, 16, 1, 576, 512, shared_kv=True)


def _batch(model: ArgSpec, name: str, rows, tokens: int, row_slots: int, **changes) -> ArgSpec:
    return replace(
        model,
        name=f"{model.name}-{name}",
        rows=tuple(rows),
        tokens=tokens,
        row_slots=row_slots,
        **changes,
    )


_MIX = ((1, 37), (1, 200), (1, 1), (70, 70), (0, 0), (5, 133))

ARG_SPECS: tuple[ArgSpec, ...] = (
    _batch(_SMOLLM2_135M, "decode_1x512", [(1, 512)], 1, 1, pages_per_row=32),
    _batch(_SMOLLM2_135M, "decode_8x512", [(1, 512)] * 8, 8, 8, pages_per_row=32),
    _batch(_SMOLLM2_135M, "decode_ragged", [(1, 1), (1, 64), (1, 65), (1, 900)], 8, 8),
    _batch(_SMOLLM2_135M, "prefill_512", [(512, 512)], 512, 8, pages_per_row=32),
    _batch(_SMOLLM2_135M, "chunk_256_of_700", [(256, 700)], 256, 8),
    _batch(_SMOLLM2_135M, "twelve_prompts", [(1, 90), *[(40, 40)] * 12], 512, 16),
    _batch(_SMOLLM2_135M, "tile_remainders", [(300, 320), (150, 150), (33, 100)], 512, 8),
    _batch(_SMOLLM2_135M, "mixed", _MIX, 128, 8),
    _batch(_SMOLLM2_135M, "mixed_page16", _MIX, 128, 8, page_size=16),
    _batch(_SMOLLM2_135M, "mixed_page128", _MIX, 128, 8, page_size=128),
    _batch(_SMOLLM2_135M, "nothing", [], 8, 8),
    _batch(_LLAMA_3_8B_TP4, "mixed", _MIX, 128, 8),
    _batch(_LLAMA_3_8B_TP4, "decode_4x300", [(1, 300)] * 4, 4, 4),
    _batch(_GEMMA3_270M, "windowed_decode", [(1, 700), (1, 513)], 2, 2),
    _batch(_GEMMA3_270M, "windowed_chunk", [(1, 600), (100, 650)], 128, 4),
    _batch(_GEMMA2_9B_TP8, "mixed", _MIX, 128, 8, window=48),
    _batch(_MHA_ALIBI, "mixed", _MIX, 128, 8, page_size=16),
    _batch(_WIDE_VALUES, "mixed", _MIX, 128, 8, page_size=16),
    _batch(_WIDE_KEYS, "mixed", _MIX, 128, 8, page_size=32),
    _batch(_PHI3_SMALL_TP4, "decode_2500", [(1, 2500), (1, 1100)], 2, 2),
    _batch(_PHI3_SMALL_TP4, "chunk_100_of_2000", [(1, 40), (100, 2000)], 128, 4),
    _batch(_PHI3_SMALL_TP4, "narrow_mixed", _MIX, 128, 8, block_sparse=BlockSparse(16, 2, 3)),
    _batch(_DEEPSEEK_V3_TP8, "decode_4x300", [(1, 300)] * 4, 4, 4),
    _batch(_DEEPSEEK_V3_TP8, "mixed", _MIX, 128, 8, page_size=16, dtype="bfloat16"),
)

# Widths, page sizes and groups that models use, each on the same small batch.
WIDTHS: tuple[ArgSpec, ...] = tuple(
    ArgSpec(
        f"width{head_dim}-page{page_size}-group{group}-{dtype}",
        ((1, 37), (1, 20), (1, 1), (19, 19), (0, 0), (5, 40)),
        32,
        8,
        2 * group,
        2,
        head_dim,
        head_dim,
        page_size=page_size,
        window=window,
        dtype=dtype,
    )
    for head_dim, page_size, group, window, dtype in (
        (64, 16, 7, None, "bfloat16"),
        (80, 32, 1, None, "float32"),
        (96, 64, 1, 9, "bfloat16"),
        (112, 16, 4, None, "float16"),
        (120, 128, 4, None, "bfloat16"),
        (128, 256, 12, None, "bfloat16"),
        (128, 16, 5, 9, "float32"),
        (160, 64, 2, None, "bfloat16"),
        (192, 32, 8, None, "bfloat16"),
        (256, 16, 2, 9, "bfloat16"),
    )
)
