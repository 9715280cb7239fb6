"""The gated product on Hopper GPUs (compute capability 9.0): one kernel, which never writes y.

A thread block makes tiles of the result one after the other: one warpgroup copies blocks of x and
of both halves of w into a ring in shared memory with the tensor memory accelerator, two others
multiply 64 rows each. They wait for each other only through the ring, so that one can multiply
while the other combines and writes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper_blocks import ROWS, SWIZZLE_BYTES, refuse, swizzled
from pallas_kernels.tuning import is_hopper, multiprocessors

_WARPGROUPS = 2  # That multiply.
_INNER = SWIZZLE_BYTES // 2  # Of a block: a swizzled line of shared memory, in 16 bits.
_COMPUTE_REGISTERS, _COPY_REGISTERS = 240, 24  # A thread.
TILE_ROWS = _WARPGROUPS * ROWS
# What Mosaic lowers, of what activations are made of.
_ARITHMETIC = {"add", "sub", "mul", "neg", "max", "min", "integer_pow", "convert_element_type"}
_ELEMENTWISE = _ARITHMETIC | {"exp", "logistic", "tanh"}


@dataclass(frozen=True)
class Tiling:
    """What may be tuned without changing the result.

    columns: of a tile of the result; a block has as many of each half of w.
    stages: blocks in the ring.
    panel: rows of tiles that take turns before the next columns, for the sake of the cache.
    programs: thread blocks.
    """

    columns: int = 128
    stages: int = 4
    panel: int = 16
    programs: int = 132

    @property
    def shared_memory_bytes(self) -> int:
        """Of one thread block with numbers of 16 bits, barriers aside."""
        block = TILE_ROWS * _INNER + _INNER * 2 * self.columns
        return 2 * (self.stages * block + TILE_ROWS * self.columns)


def gated_matmul(
    x: jax.Array,
    w: jax.Array,
    *,
    combine: Callable[[jax.Array, jax.Array], jax.Array],
    device_kind: str | None = None,
    tiling: Tiling | None = None,
    interpret: Any = None,
) -> jax.Array:
    """As `api.gated_matmul`. `interpret` is passed to the kernel, for tests.

    Raises NotImplementedError for what it does not do.
    """
    if tiling is None:
        tiling = Tiling(programs=multiprocessors(device_kind))
    _check(x, w, combine, device_kind, tiling)
    transforms = swizzled(x.dtype)
    blocks = {
        "x_smem": (tiling.stages, TILE_ROWS, _INNER),
        "w_smem": (tiling.stages, 2, _INNER, tiling.columns),
        "out_smem": (_WARPGROUPS, ROWS, tiling.columns),
    }
    kernel = plgpu.kernel(
        functools.partial(_kernel, combine=combine, tiling=tiling, interpret=interpret is not None),
        out_type=jax.ShapeDtypeStruct((x.shape[0], w.shape[1] // 2), x.dtype),
        scratch_types={
            **{
                name: plgpu.SMEM(shape, x.dtype, transforms=transforms)
                for name, shape in blocks.items()
            },
            "ready": plgpu.Barrier(num_arrivals=3, num_barriers=tiling.stages),
            "free": plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=tiling.stages),
        },
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        grid=(tiling.programs,),
        grid_names=("program",),
        num_threads=_WARPGROUPS + 1,
        thread_name="warpgroup",
        **({} if interpret is None else {"interpret": interpret}),
    )
    return kernel(x, w)


def _check(
    x: jax.Array, w: jax.Array, combine: Callable, device_kind: str | None, tiling: Tiling
) -> None:
    """Refuse what the kernel does not do."""
    (num_rows, inner), width = x.shape, w.shape[1] // 2
    half = jax.ShapeDtypeStruct((ROWS, tiling.columns), x.dtype)
    strange = _primitives(jax.make_jaxpr(combine)(half, half).jaxpr) - _ELEMENTWISE
    columns = tiling.columns
    refusals = {
        f"device {device_kind}, not a Hopper GPU": not is_hopper(device_kind),
        f"dtype {x.dtype}, not bfloat16 or float16": x.dtype not in (jnp.bfloat16, jnp.float16),
        f"{num_rows} rows, no multiple of {TILE_ROWS}": num_rows == 0 or num_rows % TILE_ROWS != 0,
        f"{inner} columns of x, no multiple of {_INNER}": inner == 0 or inner % _INNER != 0,
        f"halves of {width} columns, no multiple of {columns}": width == 0 or width % columns != 0,
        f"functions with {', '.join(sorted(strange))}": bool(strange),
    }
    refuse("hopper.gated_matmul", refusals, shared_memory_bytes=tiling.shared_memory_bytes)


def _primitives(jaxpr: Any) -> set[str]:
    """Names of what a function consists of."""
    names = set()
    for equation in jaxpr.eqns:
        inner = equation.params.get("jaxpr")
        if equation.primitive.name in ("jit", "pjit") and inner is not None:
            names |= _primitives(inner.jaxpr)
        else:
            names.add(equation.primitive.name)
    return names


def _kernel(
    x_ref,
    w_ref,
    out_ref,
    *,
    x_smem,
    w_smem,
    out_smem,
    ready,
    free,
    combine: Callable[[jax.Array, jax.Array], jax.Array],
    tiling: Tiling,
    interpret: bool,
):
    (num_rows, inner), width = x_ref.shape, out_ref.shape[1]
    columns, stages = tiling.columns, tiling.stages
    steps = inner // _INNER
    tile_rows, tile_columns = num_rows // TILE_ROWS, width // columns
    program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")

    def for_each_tile(body):
        """body(blocks before, first row, first column) for this program's tiles, in order.

        Returns how many blocks there were.
        """

        def tile(index, done):
            number = program + index * tiling.programs
            panel = lax.div(number, tiling.panel * tile_columns)
            rest = number - panel * (tiling.panel * tile_columns)
            height = jnp.minimum(tiling.panel, tile_rows - panel * tiling.panel)
            row = panel * tiling.panel + lax.rem(rest, height)
            body(done, row * TILE_ROWS, lax.div(rest, height) * columns)
            return done + steps

        count = lax.div(tile_rows * tile_columns - program + tiling.programs - 1, tiling.programs)
        return lax.fori_loop(0, count, tile, jnp.int32(0))

    def copy():
        def tile(done, row, column):
            def step(k, _):
                slot = lax.rem(done + k, stages)

                @pl.when(done + k >= stages)
                def _():
                    plgpu.barrier_wait(free.at[slot])

                block = pl.ds(k * _INNER, _INNER)
                plgpu.copy_gmem_to_smem(
                    x_ref.at[pl.ds(row, TILE_ROWS), block], x_smem.at[slot], ready.at[slot]
                )
                for half in range(2):
                    plgpu.copy_gmem_to_smem(
                        w_ref.at[block, pl.ds(half * width + column, columns)],
                        w_smem.at[slot, half],
                        ready.at[slot],
                    )

            lax.fori_loop(0, steps, step, None)

        total = for_each_tile(tile)

        def drain(number, _):
            plgpu.barrier_wait(free.at[lax.rem(number, stages)])

        lax.fori_loop(jnp.maximum(total - stages, 0), total, drain, None)

    def compute():
        rows = pl.ds(warpgroup * ROWS, ROWS)

        def start(acc, number):
            """Begin to add the products of one block to `acc`; returns the sum."""
            slot = lax.rem(number, stages)
            plgpu.barrier_wait(ready.at[slot])
            x = x_smem.at[slot, rows]
            if interpret:  # It has no asynchronous products.
                y = [
                    jnp.dot(x[...], w_smem[slot, half], preferred_element_type=jnp.float32)
                    for half in range(2)
                ]
                return acc + jnp.concatenate(y, axis=1)
            for half in range(2):
                part = acc.at[:, half * columns : (half + 1) * columns]
                plgpu.wgmma(part, x, w_smem.at[slot, half])
            return acc

        def release(number):
            plgpu.barrier_arrive(free.at[lax.rem(number, stages)])

        def product(done):
            shape = (ROWS, 2 * columns)
            if interpret:

                def step(k, acc):
                    acc = start(acc, done + k)
                    release(done + k)
                    return acc

                return lax.fori_loop(0, steps, step, jnp.zeros(shape, jnp.float32))

            def sums(acc):
                start(acc, done)

                def step(k, _):
                    start(acc, done + k)
                    plgpu.wgmma_wait(2)  # All but this block's.
                    release(done + k - 1)

                lax.fori_loop(1, steps, step, None)
                return plgpu.wgmma_accumulator_load(acc, wait_n=0)

            y = pl.run_scoped(sums, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
            release(done + steps - 1)
            return y

        def tile(done, row, column):
            y = product(done).astype(x_ref.dtype)
            out = combine(y[:, :columns], y[:, columns:])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_smem[warpgroup] = out
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(
                out_smem.at[warpgroup],
                out_ref.at[pl.ds(row + warpgroup * ROWS, ROWS), pl.ds(column, columns)],
            )

        for_each_tile(tile)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup < _WARPGROUPS)
    def _():
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        compute()

    @pl.when(warpgroup == _WARPGROUPS)
    def _():
        plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")
        copy()
