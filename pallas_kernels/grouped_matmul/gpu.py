"""The grouped matrix product for NVIDIA GPUs: a Pallas kernel that is lowered through Triton.

The rows of every group are cut into tiles of `Tiling.rows`, the columns into blocks of
`Tiling.columns`; one program makes one block of one tile. It finds its tile in the group sizes by
itself. The number of tiles is bounded by the shapes; programs without a tile end at once, and
matrices of groups without rows are not read. Rows past the last group's are tiles, too, whose
programs only write zeros.

Rows of x are gathered as they are read, and the two halves of the columns combined before they are
written: neither the gathered rows nor the halves are ever in memory.

Sums are kept in float32; products of float32 are exact (IEEE), not rounded to a shorter type.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.triton_blocks import block_mask, load_block
from pallas_kernels.tuning import is_hopper, shape_key, tuned

OP = "grouped_matmul"
_SMALLEST = 16  # Rows, columns and inner sizes of a tensor-core product, at least.
_PROGRAMS = 128  # to aim at for few rows: about one for each of an H100's 132 multiprocessors
_TILES_TOGETHER = 8  # row tiles whose programs for the same columns run side by side
_MOST_NUMBERS = 2**31  # of an array: Triton counts them in 32 bits
_ERROR_FUNCTION = re.compile(r"\berfc?\b")  # in a jaxpr; what Pallas does not lower to Triton


@dataclass(frozen=True)
class Tiling:
    """How the product is cut into programs.

    rows, columns: of the block of the product that one program makes; where halves are combined, it
    makes half as many columns of each. inner: numbers of a row of x per trip of its loop. All three
    are powers of two, 16 or more. num_warps, num_stages: Triton's.
    """

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Problem:
    """What is static about a call: num_rows rows times w [num_groups, inner, outer].

    halves: whether the halves of the product's columns are combined.
    """

    num_rows: int
    num_groups: int
    inner: int
    outer: int
    dtype: str
    halves: bool = False

    @property
    def precise(self) -> bool:
        return self.dtype == "float32"

    @property
    def num_halves(self) -> int:
        return 2 if self.halves else 1

    @property
    def width(self) -> int:
        """Columns of the result."""
        return self.outer // self.num_halves

    def num_tiles(self, rows: int) -> int:
        """The most tiles that any group sizes give; each group begins one, the unused rows, too."""
        starts = min(self.num_groups + 1, self.num_rows)
        return (self.num_rows + starts * (rows - 1)) // rows

    def key(self) -> str:
        """What the best sizes depend on, for `tuning`."""
        return shape_key(
            rows=pl.next_power_of_2(self.num_rows),
            groups=self.num_groups,
            inner=self.inner,
            outer=self.outer,
            itemsize=jnp.dtype(self.dtype).itemsize,
            halves=int(self.halves),
        )


def problem_of(x, w, rows=None, combine=None) -> Problem:
    """What is static about `api.grouped_matmul` of these arrays, or of their shapes and dtypes."""
    num_groups, inner, outer = w.shape
    num_rows = (x if rows is None else rows).shape[0]
    return Problem(num_rows, num_groups, inner, outer, str(x.dtype), combine is not None)


def choose_tiling(problem: Problem, device_kind: str | None = None) -> Tiling:
    """The sizes measured on the device, else what suits the rows a group gets on average.

    With few rows the matrices in use have to be read, once each: rows of 16, and columns as narrow
    as it takes to keep the card busy. With many rows, square blocks reuse what was read. The
    defaults need at most 99 KB of shared memory a program, more only where device_kind is a Hopper.
    """
    measured = tuned(device_kind, OP, problem.key())
    tiling = Tiling(**measured) if measured is not None else _default(problem, device_kind)
    return _fit(problem, tiling)


def candidates(problem: Problem) -> list[Tiling]:
    """Sizes worth trying."""
    average = problem.num_rows / problem.num_groups
    if problem.precise:
        sizes = [(16, 64, 32, 4, 2), (32, 64, 32, 4, 2), (64, 64, 32, 4, 2), (64, 64, 16, 8, 2)]
    elif average <= 64:
        sizes = [
            (rows, columns, inner, num_warps, num_stages)
            for rows in ((16,) if average <= 4 else (16, 32) if average <= 16 else (32, 64))
            for columns, inner, num_warps, num_stages in (
                *((64, 64, 4, 5), (64, 128, 4, 3), (64, 128, 2, 4), (128, 64, 4, 4)),
                *((128, 64, 4, 5), (128, 128, 4, 3), (128, 64, 8, 5), (256, 64, 8, 4)),
            )
        ]
    else:
        sizes = [
            *((64, 128, 64, 4, 4), (64, 256, 64, 8, 4), (128, 128, 64, 4, 4), (128, 128, 64, 8, 3)),
            *((128, 256, 64, 8, 3), (128, 256, 64, 8, 4)),
        ]
    fitted = (_fit(problem, Tiling(*each)) for each in sizes)
    return list(dict.fromkeys(fitted))


def grouped_matmul(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    rows: jax.Array | None = None,
    *,
    combine: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    device_kind: str | None = None,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `api.grouped_matmul`; the tiling is chosen here where it is None.

    Raises NotImplementedError for arrays without elements, or with 2**31 and more.
    """
    if combine is not None and _ERROR_FUNCTION.search(_jaxpr_text(combine, x.dtype)):
        options = {"device_kind": device_kind, "tiling": tiling, "interpret": interpret}
        halves = grouped_matmul(x, w, group_sizes, rows, **options)
        return combine(*jnp.split(halves, 2, axis=-1))
    problem = problem_of(x, w, rows, combine)
    num_groups, width = problem.num_groups, problem.width
    numbers = max(x.size, w.size, problem.num_rows * width)
    if 0 in (x.size, w.size, problem.num_rows):
        raise NotImplementedError("the GPU kernel needs at least one row, column and group")
    if numbers >= _MOST_NUMBERS:
        raise NotImplementedError(f"the GPU kernel takes no array of {numbers} numbers")
    tiling = tiling or choose_tiling(problem, device_kind)
    together = _TILES_TOGETHER if tiling.rows >= 64 else 1
    num_tiles = pl.cdiv(problem.num_tiles(tiling.rows), together) * together
    num_columns = tiling.columns // problem.num_halves
    blocks = -(-width // num_columns)
    # All programs of `together` tiles for some columns, then for the next: what they read of x
    # and w is small enough for the card's cache.
    span = together * blocks

    def kernel(sizes_ref, x_ref, w_ref, *refs):
        *rows_refs, out_ref = refs
        program = pl.program_id(0)
        within = lax.rem(program, span)
        tile = lax.div(program, span) * together + lax.rem(within, together)
        groups = jnp.arange(pl.next_power_of_2(num_groups + 1), dtype=jnp.int32)
        sizes = plt.load(sizes_ref.at[groups], mask=groups < num_groups, other=0)
        group, start, stop = find_tile(problem, tiling.rows, sizes, tile)
        places = start + jnp.arange(tiling.rows, dtype=jnp.int32)
        first = lax.div(within, together) * num_columns
        columns = first + jnp.arange(num_columns, dtype=jnp.int32)
        own = places < stop

        def store(value):
            exists = None if width % num_columns == 0 else columns < width
            plt.store(
                out_ref.at[places[:, None], columns[None]],
                value.astype(out_ref.dtype),
                mask=block_mask(value.shape, own, exists),
            )

        @pl.when(group < num_groups)
        def _():
            sources = places
            if rows_refs:
                sources = plt.load(rows_refs[0].at[places], mask=own, other=0)
            product = _product(problem, tiling, x_ref, w_ref, group, sources, own, first)
            if combine is not None:
                product = combine(*(half.astype(x_ref.dtype) for half in _halves(product)))
            store(product)

        @pl.when(group == num_groups)
        def _():
            store(jnp.zeros((tiling.rows, num_columns), jnp.float32))

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((problem.num_rows, width), x.dtype),
        grid=(num_tiles * blocks,),
        compiler_params=plt.CompilerParams(
            num_warps=tiling.num_warps, num_stages=tiling.num_stages
        ),
        interpret=interpret,
        name="grouped_matmul",
    )(group_sizes, x, w, *([] if rows is None else [rows]))


def _jaxpr_text(combine: Callable, dtype: jnp.dtype) -> str:
    half = jax.ShapeDtypeStruct((1, 1), dtype)
    return str(jax.make_jaxpr(combine)(half, half))


def find_tile(
    problem: Problem, rows: int, sizes: jax.Array, tile: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Find a tile: its group, first row and the end of its rows, each i32[].

    The rows of every group, and behind them those of no group, are cut into tiles of `rows`.

    sizes: i32[P], of the groups, then zeros, at least one.
    The group is num_groups for rows that no group owns, and larger for tiles past the last.
    """
    groups = jnp.arange(sizes.size, dtype=jnp.int32)
    rest = problem.num_rows - sizes.sum(dtype=jnp.int32)
    sizes = jnp.where(groups == problem.num_groups, rest, sizes)
    counts = lax.div(sizes + (rows - 1), rows)
    group = (jnp.cumsum(counts, dtype=jnp.int32) <= tile).sum(dtype=jnp.int32)
    before = groups < group
    start = jnp.where(before, sizes, 0).sum(dtype=jnp.int32)
    stop = start + jnp.where(groups == group, sizes, 0).sum(dtype=jnp.int32)
    start += (tile - jnp.where(before, counts, 0).sum(dtype=jnp.int32)) * rows
    return group, start, jnp.minimum(start + rows, stop)


def _product(problem, tiling, x_ref, w_ref, group, sources, own, first_column):
    """Rows of x times columns of w[group]: f32[rows, columns].

    sources, own: rows of x, and which of them exist. first_column: of the result. Where halves are
    combined, columns of both stand side by side, so that one product makes both.
    """
    precision = lax.Precision.HIGHEST if problem.precise else None
    num_columns = tiling.columns // problem.num_halves
    place = jnp.arange(tiling.columns, dtype=jnp.int32)
    columns = first_column + lax.rem(place, num_columns)
    exists = None if problem.width % num_columns == 0 else columns < problem.width
    columns += lax.div(place, num_columns) * problem.width

    def step(trip, total, masked=False):
        inner = trip * tiling.inner + jnp.arange(tiling.inner, dtype=jnp.int32)
        valid = inner < problem.inner if masked else None
        x = load_block(
            x_ref.at[sources[:, None], inner[None]], (tiling.rows, tiling.inner), own, valid
        )
        w = load_block(
            w_ref.at[group, inner[:, None], columns[None]],
            (tiling.inner, tiling.columns),
            valid,
            exists,
        )
        return total + lax.dot(x, w, precision=precision, preferred_element_type=jnp.float32)

    whole = problem.inner // tiling.inner
    total = jnp.zeros((tiling.rows, tiling.columns), jnp.float32)
    total = lax.fori_loop(0, whole, step, total)
    return total if problem.inner % tiling.inner == 0 else step(whole, total, masked=True)


def _halves(product: jax.Array) -> list[jax.Array]:
    """The left and the right half of the columns."""
    rows, columns = product.shape
    both = product.reshape(rows, 2, columns // 2)
    side = lax.broadcasted_iota(jnp.int32, both.shape, 1)
    return [jnp.where(side == half, both, 0.0).sum(1) for half in (0, 1)]


def _default(problem: Problem, device_kind: str | None) -> Tiling:
    average = problem.num_rows / problem.num_groups
    rows = 16 if average <= 8 else 32 if average <= 16 else 64 if average <= 64 else 128
    if problem.precise:
        return Tiling(min(rows, 64), 64, 32, 4, 2)
    if rows == 128:
        wide = is_hopper(device_kind) and problem.outer >= 1024
        return Tiling(128, 256, 64, 8, 4) if wide else Tiling(128, 128, 64, 8, 3)
    if rows == 64:
        return Tiling(64, 128, 64, 4, 4)
    tiles = problem.num_tiles(rows)
    columns = 128 if tiles * -(-problem.outer // 128) >= _PROGRAMS else 64
    return Tiling(rows, columns, 64, 4, 4)


def _fit(problem: Problem, tiling: Tiling) -> Tiling:
    """No block larger than the arrays, whole trips if a smaller power of two allows them."""
    inner = min(tiling.inner, max(_SMALLEST, pl.next_power_of_2(problem.inner)))
    divisor = problem.inner & -problem.inner
    if _SMALLEST * 2 <= divisor < inner:
        inner = divisor
    smallest = _SMALLEST * problem.num_halves
    columns = min(tiling.columns, max(smallest, pl.next_power_of_2(problem.outer)))
    columns = max(columns, smallest)
    return Tiling(tiling.rows, columns, inner, tiling.num_warps, tiling.num_stages)
