"""The GPU kernel of the grouped matrix product: interpreted here, and lowered for CUDA.

On a machine with a GPU, JAXSERVE_TEST_DEVICE=gpu runs it on the card as well.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh

from pallas_kernels.grouped_matmul import gpu, grouped_matmul
from pallas_kernels.grouped_matmul.arg_specs import ARG_SPECS, GPU_SPECS, ArgSpec, gated

from ..quick_compile import quick_jit
from .cuda_lowering import A100, CARD, H100, lowered_for_cuda

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-3}  # of the norm of the result
MOST_ROWS, MOST_NUMBERS = 600, 2**20  # of x, and of one group's matrix, when interpreted
AWKWARD = ArgSpec("awkward", 150, 9, 48, 40, (0, 70, 0, 1, 16, 0, 33))
SIZES = (
    gpu.Tiling(16, 16, 16, 4, 2),
    gpu.Tiling(64, 32, 32, 4, 2),
    gpu.Tiling(128, 64, 64, 4, 2),
)
TRITON = partial(grouped_matmul, implementation="triton")


def relative_error(spec: ArgSpec, seed: int = 0, **options) -> float:
    """Of the kernel against a product per group in float64; checks the rows that are unused."""
    arguments = spec.arguments(seed)
    out = quick_jit(partial(gpu.grouped_matmul, **spec.options, **options))(*arguments)
    assert out.shape == (spec.num_rows, spec.outer // 2 if spec.halves else spec.outer)
    assert out.dtype == spec.dtype
    used = sum(spec.group_sizes)
    np.testing.assert_array_equal(np.asarray(out[used:], np.float32), 0.0)
    return difference(spec, arguments, out)


def difference(spec: ArgSpec, arguments, out) -> float:
    """Norm of the error relative to the norm of the result; a group's matrix at a time."""
    x, w, _, *rows = arguments
    error, norm, start = 0.0, 0.0, 0
    for group, size in enumerate(spec.group_sizes):
        if size:
            places = slice(start, start + size)
            sources = np.asarray(rows[0])[places] if rows else places
            wanted = np.asarray(x[sources], np.float64) @ np.asarray(w[group], np.float64)
            if spec.halves:
                halves = np.split(wanted.astype(np.float32), 2, axis=1)
                wanted = np.asarray(gated(*map(jnp.asarray, halves)), np.float64)
            error += np.sum((np.asarray(out[places], np.float64) - wanted) ** 2)
            norm += np.sum(wanted**2)
            start += size
    return float(np.sqrt(error / max(norm, 1e-30)))


def shrink(spec: ArgSpec) -> ArgSpec:
    """The spec with at most so many rows and columns as the interpreter takes in a second."""
    if spec.num_rows > MOST_ROWS:
        sizes = tuple(size * MOST_ROWS // spec.num_rows for size in spec.group_sizes)
        spec = replace(spec, num_rows=MOST_ROWS, group_sizes=sizes)
    if spec.inner * spec.outer > MOST_NUMBERS:
        spec = replace(spec, inner=spec.inner // 4, outer=spec.outer // 4)
    return spec


def lowered(spec: ArgSpec, call=TRITON) -> str:
    return lowered_for_cuda(partial(call, **spec.options), *spec.shapes())


@pytest.mark.parametrize("spec", [shrink(spec) for spec in ARG_SPECS], ids=lambda spec: spec.name)
def test_kernel_is_the_product_of_every_group(spec: ArgSpec) -> None:
    assert relative_error(spec, interpret=True) < TOLERANCE[spec.dtype]


@pytest.mark.parametrize("tiling", SIZES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "sizes",
    [AWKWARD.group_sizes, (), (150,), (0, 0, 150), (0,) * 8 + (150,), (16,) * 9, (1,) * 9],
    ids=str,
)
def test_awkward_sizes_in_any_tiling(sizes: tuple[int, ...], dtype: str, tiling) -> None:
    spec = replace(AWKWARD, group_sizes=sizes, dtype=dtype)
    assert relative_error(spec, tiling=tiling, interpret=True) < TOLERANCE[dtype]


def test_matrices_of_empty_groups_are_not_touched() -> None:
    x, w, group_sizes = arguments = AWKWARD.arguments()
    poisoned = jnp.where((group_sizes == 0)[:, None, None], jnp.nan, w)
    for tiling in SIZES:
        call = partial(gpu.grouped_matmul, tiling=tiling, interpret=True)
        out = quick_jit(call)(x, poisoned, group_sizes)
        assert difference(AWKWARD, arguments, out) < 1e-5


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=9),
    spare=st.integers(0, 40),
    rows=st.sampled_from([16, 32, 64]),
)
def test_tiles_hold_every_row_once(sizes, spare, rows) -> None:
    num_groups, num_rows = len(sizes), max(1, sum(sizes) + spare)
    problem = gpu.Problem(num_rows, num_groups, 16, 16, "float32")
    padded = jnp.pad(jnp.asarray(sizes, jnp.int32), (0, 16 - num_groups))
    tiles = jnp.arange(problem.num_tiles(rows) + 2, dtype=jnp.int32)
    found = jax.vmap(lambda tile: jnp.stack(gpu.find_tile(problem, rows, padded, tile)))(tiles)
    groups = np.repeat(np.arange(num_groups + 1), [*sizes, num_rows - sum(sizes)])
    seen = []
    for group, start, stop in np.asarray(found):
        if group <= num_groups:
            assert 0 < stop - start <= rows
            assert (groups[start:stop] == group).all()
            seen += range(start, stop)
    assert seen == list(range(num_rows))
    assert (found[-2:, 0] > num_groups).all(), "there are never more tiles"


@pytest.mark.parametrize("experts", [(64, 2048, 2048), (64, 1024, 2048), (8, 4096, 28672)])
@pytest.mark.parametrize("num_rows", [8, 512, 65536])
def test_real_shapes_lower_for_cuda(experts: tuple[int, int, int], num_rows: int) -> None:
    spec = ArgSpec("", num_rows, *experts, (), "bfloat16")
    for device_kind in (None, H100):
        text = lowered(spec, partial(TRITON, device_kind=device_kind))
        assert text.count("__gpu$xla.gpu.triton") == 1
        assert "ragged_dot" not in text


@pytest.mark.parametrize("spec", [AWKWARD, *ARG_SPECS], ids=lambda spec: spec.name)
def test_every_shape_lowers_for_cuda(spec: ArgSpec) -> None:
    assert "__gpu$xla.gpu.triton" in lowered(spec)


@pytest.mark.parametrize("sizes", [(0, 4, 32, 32), (8, 256, 7168, 4096)])
def test_arrays_without_elements_or_with_too_many_are_refused(sizes: tuple[int, ...]) -> None:
    spec = ArgSpec("", *sizes, (), "bfloat16")
    with pytest.raises(NotImplementedError, match=r"at least one row|no array of 7516192768"):
        jax.eval_shape(gpu.grouped_matmul, *spec.shapes())


def test_gpus_get_it() -> None:
    text = lowered(AWKWARD, grouped_matmul)
    assert "__gpu$xla.gpu.triton" in text
    assert "ragged_dot" not in text


def test_local_shapes_inside_shard_map() -> None:
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    arguments = AWKWARD.arguments()
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("n",), devices=jax.devices()[:2], axis_types=auto)
    cards = AbstractMesh((2,), ("n",), axis_types=auto, abstract_device=CARD)

    def sharded(call, mesh):
        return jax.shard_map(
            call,
            mesh=mesh,
            in_specs=(jax.P(), jax.P(None, None, "n"), jax.P()),
            out_specs=jax.P(None, "n"),
            check_vma=False,
        )

    out = quick_jit(sharded(partial(gpu.grouped_matmul, interpret=True), mesh))(*arguments)
    assert difference(AWKWARD, arguments, out) < 1e-5
    assert "__gpu$xla.gpu.triton" in lowered(AWKWARD, sharded(TRITON, cards))


@pytest.mark.parametrize("spec", GPU_SPECS, ids=lambda spec: spec.name)
def test_sizes_suit_the_rows_and_the_card(spec: ArgSpec) -> None:
    x, w, _, *rows = spec.shapes()
    problem = gpu.problem_of(x, w, *rows, **spec.options)
    for device_kind in (None, A100, H100):
        tiling = gpu.choose_tiling(problem, device_kind)
        average = spec.num_rows / spec.num_groups
        assert tiling.rows >= min(128, average) / 2, "matrices are not read too often"
        tiles = problem.num_tiles(tiling.rows)
        assert tiles * (spec.outer // tiling.columns) >= 128, "every multiprocessor has work"
        block = (tiling.rows + tiling.columns) * tiling.inner * 2
        limit = 227 if device_kind == H100 else 99
        assert block * tiling.num_stages <= limit * 1024


@pytest.mark.parametrize("num_rows", [8, 512, 65536])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_candidates_fit_the_card(num_rows: int, dtype: str) -> None:
    found = gpu.candidates(gpu.Problem(num_rows, 64, 2048, 2048, dtype))
    assert len(found) == len(set(found)) >= 4
    itemsize = jnp.dtype(dtype).itemsize
    for each in found:
        block = (each.rows + each.columns) * each.inner * itemsize
        assert block * each.num_stages <= 227 * 1024


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [AWKWARD, *ARG_SPECS], ids=lambda spec: spec.name)
@pytest.mark.parametrize("device_kind", ["this", "any"])
def test_kernel_on_the_card_is_the_product(spec: ArgSpec, device_kind: str) -> None:
    kind = jax.devices()[0].device_kind if device_kind == "this" else None
    assert relative_error(spec, seed=7, device_kind=kind) < TOLERANCE[spec.dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("spec", GPU_SPECS, ids=lambda spec: spec.name)
def test_large_products_on_the_card_are_those_of_blocks_of_rows(spec: ArgSpec) -> None:
    arguments = spec.device_arguments(seed=7)
    kind = jax.devices()[0].device_kind
    out, wanted = (
        jax.jit(partial(grouped_matmul, implementation=name, device_kind=kind, **spec.options))(
            *arguments
        )
        for name in ("triton", "blocks")
    )
    error = jnp.linalg.norm(out.astype(jnp.float32) - wanted.astype(jnp.float32))
    assert error < TOLERANCE[spec.dtype] * jnp.linalg.norm(wanted.astype(jnp.float32))
