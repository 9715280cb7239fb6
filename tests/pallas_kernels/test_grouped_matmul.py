"""Grouped matrix product: every implementation against a plain loop over the groups."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.grouped_matmul import group_rows, grouped_matmul
from pallas_kernels.grouped_matmul.arg_specs import ARG_SPECS, ArgSpec
from pallas_kernels.grouped_matmul.xla import block_size, blocks

from ..quick_compile import quick_jit
from .cuda_lowering import lowered_for_cuda

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-3}  # of the largest result
LARGE = 2**25  # multiplications of a row with a matrix of which the slow ones do not get more
SMALL = ArgSpec("small", 200, 8, 64, 40, (3, 17, 0, 33, 1, 0, 9, 2))


def formula(x, w, group_sizes, rows=None, *, combine=None) -> np.ndarray:
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    x = x if rows is None else x[np.asarray(rows)]
    out, start = np.zeros((x.shape[0], w.shape[2])), 0
    for group, size in enumerate(np.asarray(group_sizes)):
        out[start : start + size] = x[start : start + size] @ w[group]
        start += size
    if combine is None:
        return out
    return np.asarray(combine(*jnp.split(jnp.asarray(out, jnp.float32), 2, axis=1)))


def check(spec: ArgSpec, implementation: str | None) -> None:
    arguments = spec.arguments()
    call = partial(grouped_matmul, implementation=implementation, **spec.options)
    out = quick_jit(call)(*arguments)
    assert out.dtype == spec.dtype
    wanted = formula(*arguments, **spec.options)
    assert out.shape == wanted.shape
    scale = max(1.0, np.abs(wanted).max())
    np.testing.assert_allclose(
        np.asarray(out, np.float64), wanted, atol=TOLERANCE[spec.dtype] * scale
    )
    unused = np.asarray(out[sum(spec.group_sizes) :], np.float32)
    np.testing.assert_array_equal(unused, np.zeros_like(unused))


@pytest.mark.parametrize("spec", ARG_SPECS, ids=lambda spec: spec.name)
def test_automatic_choice_is_the_formula(spec: ArgSpec) -> None:
    check(spec, None)


@pytest.mark.parametrize("implementation", ["reference", "ragged_dot"])
@pytest.mark.parametrize(
    "spec",
    [s for s in ARG_SPECS if s.num_rows * s.num_groups * s.inner * s.outer <= LARGE],
    ids=lambda spec: spec.name,
)
def test_other_implementations_are_the_formula(spec: ArgSpec, implementation: str) -> None:
    check(spec, implementation)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=7),
    spare=st.integers(0, 9),
    block=st.sampled_from([1, 2, 5, 16, 64]),
)
def test_any_sizes_in_any_blocks(sizes: list[int], spare: int, block: int) -> None:
    num_rows = max(1, sum(sizes) + spare)
    x, w, group_sizes = ArgSpec("", num_rows, len(sizes), 5, 3, tuple(sizes)).arguments()
    out = blocks(x, w, group_sizes, block)
    np.testing.assert_allclose(out, formula(x, w, group_sizes), atol=1e-5)


def test_matrices_of_empty_groups_are_not_touched() -> None:
    x, w, group_sizes = SMALL.arguments()
    poisoned = jnp.where((group_sizes == 0)[:, None, None], jnp.nan, w)
    out = quick_jit(grouped_matmul)(x, poisoned, group_sizes)
    np.testing.assert_allclose(out, formula(x, w, group_sizes), atol=1e-4)


@pytest.mark.parametrize(
    ("num_rows", "num_groups", "block"),
    [(1, 64, 1), (8, 64, 1), (64, 32, 4), (512, 32, 16), (4096, 32, 32), (5, 1, 4)],
)
def test_blocks_fit_the_rows_a_group_gets(num_rows: int, num_groups: int, block: int) -> None:
    assert block_size(num_rows, num_groups) == block


def test_cpu_work_follows_the_rows_in_use() -> None:
    """The compiled program has one product, of one block, in a loop."""
    x, w, group_sizes = replace(SMALL, num_groups=64, num_rows=2048).arguments()
    text = jax.jit(grouped_matmul).lower(x, w, group_sizes).compile().as_text()
    assert " while(" in text
    dots = [line for line in text.splitlines() if " dot(" in line]
    assert len(dots) == 1
    assert f"f32[32,{SMALL.outer}]" in dots[0]


def test_local_shapes_inside_shard_map() -> None:
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    x, w, group_sizes = SMALL.arguments()
    mesh = jax.make_mesh(
        (2,), ("n",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,)
    )
    sharded = jax.shard_map(
        grouped_matmul,
        mesh=mesh,
        in_specs=(jax.P(), jax.P(None, None, "n"), jax.P()),
        out_specs=jax.P(None, "n"),
        check_vma=False,
    )
    out = quick_jit(sharded)(x, w, group_sizes)
    np.testing.assert_allclose(out, formula(x, w, group_sizes), atol=1e-4)


@pytest.mark.parametrize("platform", ["tpu", "rocm"])
def test_accelerators_without_a_kernel_get_the_ragged_dot(platform: str) -> None:
    traced = jax.jit(grouped_matmul).trace(*SMALL.arguments())
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "ragged_dot" in text
    assert "stablehlo.while" not in text


@settings(max_examples=40, deadline=None)
@given(groups=st.lists(st.integers(0, 6), min_size=1, max_size=50))
def test_rows_are_ordered_by_group(groups: list[int]) -> None:
    wanted = np.argsort(groups, kind="stable")
    for implementation in ("sorted", "counted"):
        order, places, sizes = group_rows(
            jnp.asarray(groups, jnp.int32), 5, implementation=implementation
        )
        np.testing.assert_array_equal(order, wanted)
        np.testing.assert_array_equal(wanted[np.asarray(places)], np.arange(len(groups)))
        np.testing.assert_array_equal(sizes, np.bincount(groups, minlength=7)[:5])
        assert order.dtype == places.dtype == sizes.dtype == jnp.int32


@pytest.mark.parametrize(("num_rows", "sorts"), [(2048, False), (2049, True)])
def test_few_rows_are_not_sorted_on_a_gpu(num_rows: int, sorts: bool) -> None:
    groups = jax.ShapeDtypeStruct((num_rows,), "int32")
    assert (
        "stablehlo.sort" in lowered_for_cuda(partial(group_rows, num_groups=8), groups)
    ) == sorts


def test_wrong_arguments_are_all_named() -> None:
    x, w, group_sizes = SMALL.arguments()
    with pytest.raises(ValueError, match=r"63 rows per group.*7 groups.*group_sizes has 8.*int32"):
        grouped_matmul(x, w[:7, :63], group_sizes.astype(jnp.int16))
    with pytest.raises(ValueError, match=r"dtype float32 and w bfloat16"):
        grouped_matmul(x, w.astype(jnp.bfloat16), group_sizes)
    with pytest.raises(ValueError, match=r"rows is float32\[4\].*39 columns, which have no two"):
        grouped_matmul(x, w[:, :, :39], group_sizes, jnp.ones(4), combine=jnp.add)
    with pytest.raises(ValueError, match=r"need x \[L,K\]"):
        grouped_matmul(x[0], w, group_sizes)
    with pytest.raises(ValueError, match="choose one of: triton, ragged_dot, blocks, reference"):
        grouped_matmul(x, w, group_sizes, implementation="magic")
