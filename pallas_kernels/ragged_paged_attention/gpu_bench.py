"""The cases that attention kernels on a GPU are measured by, beside FlashAttention 3's figures.

Batches are made on the device: random queries, keys and values, pages in random order. Bytes count
every key and value once, operations the causal half of the score matrix twice (queries by keys,
weights by values).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import tuning
from pallas_kernels.gpu_timing import compile_timer
from pallas_kernels.ragged_paged_attention import gpu, hopper, hopper_decode
from pallas_kernels.ragged_paged_attention.layout import cache_shape

LAYERS = 32  # Calls in a row, which share what is worked out from the step's metadata.
CACHE_BYTES = 2**27  # calls in a row read as much in all: more than the card keeps


@dataclass(frozen=True)
class Case:
    """Rows of equal length, or of many lengths.

    new, kv: tokens of each row in this step, and in all. shortest: where given, the rows have from
    so many to `kv` tokens, each number as likely as another. fa3_us: FlashAttention 3 (paged, pages
    of 16 tokens) on an H100 80GB HBM3, torch 2.11, CUDA 13.0; None where it was not measured.
    """

    name: str
    rows: int
    new: int
    kv: int
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    shortest: int | None = None
    fa3_us: float | None = None

    @property
    def is_decode(self) -> bool:
        return self.new == 1

    @property
    def kv_lens(self) -> np.ndarray:
        if self.shortest is None:
            return np.full(self.rows, self.kv)
        return np.random.default_rng(0).integers(self.shortest, self.kv + 1, self.rows)

    @property
    def kv_bytes(self) -> int:
        return int(self.kv_lens.sum()) * self.num_kv_heads * 2 * self.head_dim * 2

    @property
    def flops(self) -> int:
        pairs = self.new * int(self.kv_lens.sum()) - self.rows * self.new * (self.new - 1) // 2
        if self.new == self.kv:  # the convention of the published figures
            pairs = self.rows * self.new**2 // 2
        return 4 * pairs * self.num_heads * self.head_dim

    def metadata(self) -> tuple[jax.Array, ...]:
        """kv_lens, page_table, query_starts, distribution."""
        per_row = -(-self.kv // self.page_size)
        table = np.random.default_rng(0).permutation(self.rows * per_row)
        return tuple(
            jnp.asarray(x, jnp.int32)
            for x in (
                self.kv_lens,
                table.reshape(self.rows, per_row),
                np.arange(self.rows + 1) * self.new,
                [self.rows if self.is_decode else 0, self.rows, self.rows],
            )
        )

    def queries(self, seed: int) -> jax.Array:
        shape = (self.rows * self.new, self.num_heads, self.head_dim)
        return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)

    def cache(self, seed: int) -> jax.Array:
        shape = cache_shape(
            self.rows * -(-self.kv // self.page_size),
            self.page_size,
            self.num_kv_heads,
            self.head_dim,
            self.head_dim,
            jnp.bfloat16,
            platform="gpu",
        )
        return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)

    def key(self) -> str:
        """Where the tuned sizes of this case's shape are found."""
        return tuning.shape_key(
            head_dim=self.head_dim,
            v_head_dim=self.head_dim,
            group=self.num_heads // self.num_kv_heads,
            itemsize=2,
        )


def case_timer(
    case: Case,
    *,
    device_kind: str | None,
    sizes: gpu.Tiling | hopper.PrefillConfig | hopper_decode.DecodeConfig | None = None,
    **options: Any,
) -> Callable[[], float]:
    """Compile one attention call, without the write of new tokens; the result times it, in seconds.

    options: of `gpu.attend`.
    """
    copies = min(LAYERS, max(1, math.ceil(CACHE_BYTES / case.kv_bytes)))
    given = {"decode" if case.is_decode else "prefill": sizes}

    def make():
        caches = [case.cache(seed) for seed in range(copies)]
        inputs = [(case.queries(i), caches[i % copies]) for i in range(LAYERS)]
        return inputs, case.metadata()

    def call(inputs, *metadata):
        return gpu.attend(
            *inputs,
            *metadata,
            shared_kv=False,
            scale=case.head_dim**-0.5,
            v_head_dim=case.head_dim,
            decode_only=case.is_decode,
            device_kind=device_kind,
            **given,
            **options,
        )

    return compile_timer(call, make, LAYERS)


def candidates(
    case: Case, device_kind: str | None
) -> dict[str, list[gpu.Tiling | hopper.PrefillConfig | hopper_decode.DecodeConfig]]:
    """The sizes worth trying on a device, by the operation that they are kept under."""
    group, on_hopper = case.num_heads // case.num_kv_heads, tuning.is_hopper(device_kind)
    if case.is_decode:
        rows = max(16, min(64, 1 << (group - 1).bit_length()))
        tilings = [
            gpu.Tiling(rows, keys, num_warps, num_stages, programs)
            for keys, num_warps, num_stages in (
                *((32, 4, 5), (64, 4, 2), (64, 4, 3), (64, 4, 5), (128, 4, 3), (128, 4, 5)),
            )
            for programs in (440, 528, 1056)
        ]
        if not on_hopper:
            return {gpu.DECODE: tilings}
        default = hopper_decode.default_config(case.head_dim, group)
        changes = (
            *({}, {"stages": 3}, {"programs": 528}, {"programs": 396}),
            *({"programs": 132, "stages": 4}, {"keys": 128, "stages": 2, "programs": 132}),
            {"stages": 1, "programs": 660},
        )
        configs = [dataclasses.replace(default, **each) for each in changes]
        return {gpu.DECODE: tilings, gpu.HOPPER_DECODE: configs}
    if on_hopper:
        default = hopper.default_config(case.head_dim, group)
        changes = (
            *({}, {"num_programs": None}, {"take_turns": True}, {"heads_per_tile": 1}),
            *({"heads_per_tile": 4}, {"query_stages": 1}, {"block_kv": 64, "stages": 4}),
        )
        configs = [dataclasses.replace(default, **each) for each in changes]
        return {gpu.HOPPER_PREFILL: configs}
    tilings = [
        gpu.Tiling(rows, keys, num_warps, num_stages)
        for rows, keys, num_warps, num_stages in (
            *((128, 64, 8, 3), (128, 128, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3)),
            *((128, 128, 8, 2), (128, 64, 8, 5)),
        )
    ]
    return {gpu.PREFILL: tilings}


CASES: tuple[Case, ...] = (
    Case("decode_1x1024", 1, 1, 1024, fa3_us=16.7),
    Case("decode_64x200", 64, 1, 200),
    Case("decode_64x1024", 64, 1, 1024, fa3_us=107.0),
    Case("decode_256x1024", 256, 1, 1024, fa3_us=379.5),
    Case("decode_64x8192", 64, 1, 8192, fa3_us=715.4),
    Case("decode_16x32768", 16, 1, 32768, fa3_us=715.5),
    Case("decode_200x75to1500", 200, 1, 1500, shortest=75),
    Case("decode_16x1600to32000", 16, 1, 32000, shortest=1600),
    Case("decode_64x4096_64heads", 64, 1, 4096, num_heads=64, fa3_us=368.6),
    Case("decode_8x1024_16kvheads", 8, 1, 1024, num_heads=16, num_kv_heads=16),
    Case("decode_64x1024_16kvheads", 64, 1, 1024, num_heads=16, num_kv_heads=16),
    Case("decode_64x75to1500_64heads", 64, 1, 1500, num_heads=64, shortest=75),
    Case("prefill_1x2048", 1, 2048, 2048, fa3_us=80.9),
    Case("prefill_1x8192", 1, 8192, 8192, fa3_us=868.9),
    Case("prefill_4x2048", 4, 2048, 2048, fa3_us=301.7),
    Case("prefill_8x1024", 8, 1024, 1024, fa3_us=194.4),
)
