"""Named real shapes of the grouped matrix product, shared by tests, bench and tuning.

ARG_SPECS fit anywhere. GPU_SPECS are a gigabyte or so each: for a card, or for their shapes alone.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class ArgSpec:
    """One call: a layer's experts and how many rows each of them gets.

    group_sizes: rows of the first groups; those not named get none.
    num_rows: M, at least the sum of group_sizes.
    copies: x has a row for each `copies` rows of the product, which take them in some order; 0: x
        has the rows themselves.
    halves: whether the halves of the product are combined.
    """

    name: str
    num_rows: int
    num_groups: int
    inner: int
    outer: int
    group_sizes: tuple[int, ...]
    dtype: str = "float32"
    copies: int = 0
    halves: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Further arguments of the operation."""
        return {"combine": gated} if self.halves else {}

    def arguments(self, seed: int = 0) -> tuple[jax.Array, ...]:
        """Random x, w, group_sizes, and rows if the spec has them; unused rows of x are NaN."""
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((self._num_sources, self.inner), np.float32)
        x[self._unused] = np.nan
        w = rng.standard_normal((self.num_groups, self.inner, self.outer), np.float32)
        return jnp.asarray(x, self.dtype), jnp.asarray(w, self.dtype), *self._metadata()

    def device_arguments(self, seed: int = 0) -> tuple[jax.Array, ...]:
        """Like `arguments`, but made on the device, where large ones take no time."""
        x, w, *_ = self.shapes()
        x_key, w_key = jax.random.split(jax.random.key(seed))
        x = jax.random.normal(x_key, x.shape, x.dtype)
        x = jnp.where(jnp.asarray(self._unused)[:, None], jnp.nan, x)
        return x, jax.random.normal(w_key, w.shape, w.dtype), *self._metadata()

    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and dtypes of `arguments`, without making them."""
        matrices = (self.num_groups, self.inner, self.outer)
        integers = [(self.num_groups,), (self.num_rows,)] if self.copies else [(self.num_groups,)]
        return (
            jax.ShapeDtypeStruct((self._num_sources, self.inner), self.dtype),
            jax.ShapeDtypeStruct(matrices, self.dtype),
            *(jax.ShapeDtypeStruct(shape, "int32") for shape in integers),
        )

    @property
    def _num_sources(self) -> int:
        """Rows of x; with copies there is one more, which only unused rows are copies of."""
        return self.num_rows // self.copies + 1 if self.copies else self.num_rows

    @property
    def _unused(self) -> np.ndarray:
        """bool, the rows of x that nothing may come from."""
        if self.copies:
            return np.arange(self._num_sources) == self._num_sources - 1
        return np.arange(self.num_rows) >= sum(self.group_sizes)

    def _metadata(self) -> tuple[jax.Array, ...]:
        """group_sizes, and rows if there are."""
        unnamed = self.num_groups - len(self.group_sizes)
        sizes = jnp.asarray((*self.group_sizes, *(0,) * unnamed), jnp.int32)
        if not self.copies:
            return (sizes,)
        rows = np.random.default_rng(0).permutation(self.num_rows) // self.copies
        rows[sum(self.group_sizes) :] = self._num_sources - 1
        return sizes, jnp.asarray(rows, jnp.int32)

    @property
    def used_bytes(self) -> int:
        """Bytes of the matrices in use, of the rows of x and of the result, once each."""
        used = sum(size > 0 for size in self.group_sizes)
        numbers = used * self.inner * self.outer
        sources = self._num_sources if self.copies else sum(self.group_sizes)
        width = self.outer // 2 if self.halves else self.outer
        numbers += sources * self.inner + self.num_rows * width
        return numbers * jnp.dtype(self.dtype).itemsize

    @property
    def flops(self) -> int:
        return 2 * sum(self.group_sizes) * self.inner * self.outer


def gated(left: jax.Array, right: jax.Array) -> jax.Array:
    """What most gated networks make of their halves, in the dtype of both."""
    return jax.nn.silu(left.astype(jnp.float32)).astype(left.dtype) * right


def _spread(num_rows: int, num_groups: int, seed: int = 0) -> tuple[int, ...]:
    """num_rows dealt to the groups at random, as a router does."""
    choice = np.random.default_rng(seed).integers(0, num_groups, num_rows)
    return tuple(np.bincount(choice, minlength=num_groups).tolist())


_GRANITE_1B = (32, 1024, 1024)  # experts, d_model, gate and up of 512 each; top 8
_OLMOE_1B = (64, 2048, 2048)
_OLMOE_1B_DOWN = (64, 1024, 2048)
_MIXTRAL_8X7B_TP8 = (8, 4096, 3584)

ARG_SPECS: tuple[ArgSpec, ...] = (
    ArgSpec("granite_1b-decode_1", 8, *_GRANITE_1B, (1,) * 8),
    ArgSpec("granite_1b-decode_8", 64, *_GRANITE_1B, _spread(64, 32)),
    ArgSpec("granite_1b-prefill_64", 512, *_GRANITE_1B, _spread(512, 32)),
    ArgSpec("granite_1b-prefill_512", 4096, *_GRANITE_1B, _spread(4096, 32)),
    ArgSpec("granite_1b-down_64", 512, 32, 512, 1024, _spread(512, 32)),
    ArgSpec("olmoe_1b-decode_1", 8, *_OLMOE_1B, (1,) * 8),
    ArgSpec("mixtral_8x7b_tp8-decode_4", 8, *_MIXTRAL_8X7B_TP8, (3, 0, 2, 0, 0, 2, 1), "bfloat16"),
    ArgSpec("empty_groups", 100, 16, 48, 32, (0, 0, 37, 0, 1, 0, 0, 8, 0, 54)),
    ArgSpec("one_giant_group", 300, 8, 64, 40, (0, 0, 0, 300)),
    ArgSpec("unused_rows", 200, 8, 64, 40, (3, 17, 0, 33, 1, 0, 9, 2)),
    ArgSpec("no_rows", 16, 4, 32, 32, ()),
    ArgSpec("one_row", 1, 4, 32, 32, (0, 0, 1)),
    ArgSpec("one_group", 37, 1, 32, 24, (31,)),
    ArgSpec("half", 50, 6, 32, 24, (9, 0, 20, 5), "float16"),
    ArgSpec("gathered", 128, 6, 48, 40, (9, 0, 60, 35), copies=8),
    ArgSpec("combined", 100, 6, 48, 80, (9, 0, 20, 50), halves=True),
    ArgSpec("gathered_combined", 96, 6, 64, 64, (9, 0, 20, 67), "bfloat16", 4, True),
)


def _olmoe(tokens: int, name: str) -> tuple[ArgSpec, ArgSpec]:
    """A step of OLMoE-1B-7B, 8 of 64 experts a token: gate and up combined, and down."""
    rows = 8 * tokens
    sizes = (1,) * 8 if tokens == 1 else _spread(rows, 64)
    return (
        ArgSpec(f"olmoe_1b-{name}-gate_up", rows, *_OLMOE_1B, sizes, "bfloat16", 8, True),
        ArgSpec(f"olmoe_1b-{name}-down", rows, *_OLMOE_1B_DOWN, sizes, "bfloat16"),
    )


GPU_SPECS: tuple[ArgSpec, ...] = (
    *_olmoe(1, "decode_1"),
    *_olmoe(8, "decode_8"),
    *_olmoe(64, "decode_64"),
    *_olmoe(256, "decode_256"),
    *_olmoe(1024, "prefill_1024"),
    *_olmoe(8192, "prefill_8192"),
)
