"""The TPU kernel in interpret mode: numbers against the specification, and its lists of work.

Interpret mode fills memory that nobody wrote with NaN, outputs included; `ArgSpec` does the same
with unused pages and slots.
"""

import weakref
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged_paged_attention import (
    cache_axes,
    cache_shape,
    ragged_paged_attention,
    reference,
    tpu,
    tpu_work,
)
from pallas_kernels.ragged_paged_attention.arg_specs import ARG_SPECS, ArgSpec
from pallas_kernels.ragged_paged_attention.layout import unpack_cache
from pallas_kernels.ragged_paged_attention.tpu_kernel import Blocks, Kernel, Shape

from ..quick_compile import quick_jit

RELATIVE_ERROR = {"float32": 1e-5, "bfloat16": 1e-2}
SEED = 11
SMALL_MIX = ((1, 30), (1, 1), (9, 40), (0, 0), (3, 3))
SMALL = ArgSpec("small", SMALL_MIX, 24, 8, 4, 2, 128, 128, page_size=16)

REFUSED = tuple(s for s in ARG_SPECS if s.block_sparse is not None or s.dtype == "float16")
SERVED = tuple(s for s in ARG_SPECS if s not in REFUSED)
MORE = (
    replace(SMALL, name="alibi_page16", num_heads=8, num_kv_heads=8, head_dim=64, v_head_dim=64,
            alibi=True),
    replace(SMALL, name="dim80_page256", head_dim=80, v_head_dim=80, page_size=256),
    replace(SMALL, name="dim112_alibi_bfloat16_page32", head_dim=112, v_head_dim=112, page_size=32,
            alibi=True, dtype="bfloat16"),
    replace(SMALL, name="dim120_group7_bfloat16", num_heads=7, num_kv_heads=1, head_dim=120,
            v_head_dim=120, dtype="bfloat16"),
    replace(SMALL, name="dim160_window", head_dim=160, v_head_dim=160, page_size=64, window=7),
    replace(SMALL, name="dim192_value128_softcap", head_dim=192, v_head_dim=128, softcap=2.0),
    replace(SMALL, name="many_kv_heads_bfloat16", num_heads=6, num_kv_heads=6, dtype="bfloat16"),
)  # fmt: skip


def options_of(spec: ArgSpec) -> tuple[dict, tuple]:
    """Keyword arguments of an implementation, and the two arrays that follow the others."""
    options = spec.options()
    return options, (options.pop("alibi_slopes"), options.pop("block_offsets"))


def run_tpu(spec: ArgSpec, arguments, **changes):
    options, per_head = options_of(spec)
    options |= {"interpret": pltpu.InterpretParams()} | changes
    return quick_jit(partial(tpu.ragged_paged_attention, **options))(*arguments, *per_head)


def run_reference(spec: ArgSpec, arguments):
    options, per_head = options_of(spec)
    return quick_jit(partial(reference.ragged_paged_attention, **options))(*arguments, *per_head)


def assert_equal(spec: ArgSpec, found, wanted) -> None:
    out, expected = (np.asarray(each[0], np.float64) for each in (found, wanted))
    error = np.linalg.norm(out - expected)
    assert error <= RELATIVE_ERROR[spec.dtype] * np.linalg.norm(expected)
    for stored in zip(*(parts_of(spec, each[1]) for each in (found, wanted)), strict=True):
        np.testing.assert_array_equal(*stored)


def parts_of(spec: ArgSpec, cache) -> list[np.ndarray]:
    parts = unpack_cache(cache, spec.head_dim, spec.v_head_dim, shared_kv=spec.shared_kv)
    return [np.asarray(part, np.float32) for part in parts]


@pytest.mark.parametrize("spec", SERVED + MORE, ids=lambda spec: spec.name)
def test_tpu_kernel_equals_the_reference(spec):
    arguments = spec.arguments(SEED, platform="tpu")
    assert_equal(spec, run_tpu(spec, arguments), run_reference(spec, arguments))


def test_several_blocks_of_queries_keys_and_writes():
    rows = ((1, 70), (20, 90), (1, 3), (17, 17), (2, 50))
    spec = replace(SMALL, rows=rows, tokens=48, head_dim=64, v_head_dim=64, window=40)
    arguments = spec.arguments(SEED, platform="tpu")
    found = run_tpu(spec, arguments, blocks=tpu.Blocks(queries=8, pages=1, writes=2))
    assert_equal(spec, found, run_reference(spec, arguments))


def test_dma_and_arithmetic_do_not_race():
    # JAX has no public way to ask what the interpreter found.
    interpreter = pytest.importorskip("jax._src.pallas.mosaic.interpret.interpret_pallas_call")
    arguments = SMALL.arguments(SEED, platform="tpu")
    params = pltpu.InterpretParams(detect_races=True)
    blocks = tpu.Blocks(queries=8, pages=1, writes=2)
    jax.block_until_ready(run_tpu(SMALL, arguments, interpret=params, blocks=blocks))
    assert not interpreter.races.races_found


def test_queries_may_be_of_another_dtype_than_the_cache():
    spec = replace(SMALL, dtype="bfloat16")
    q, k, v, cache, *metadata = spec.arguments(SEED, platform="tpu")
    arguments = (q, k, v, cache.astype(jnp.float32), *metadata)
    assert_equal(spec, run_tpu(spec, arguments), run_reference(spec, arguments))


def test_padding_is_zero_and_ignores_what_padded_entries_hold():
    spec = replace(SMALL, rows=((1, 5), (7, 10)))
    arguments = list(spec.arguments(SEED, platform="tpu"))
    wanted = run_reference(spec, arguments)
    kv_lens, page_table, query_starts = arguments[4:7]
    arguments[4] = kv_lens.at[2:].set(999)
    arguments[5] = page_table.at[2:].set(10_000)
    arguments[6] = query_starts.at[3:].set(0)
    arguments[0] = arguments[0].at[8:].set(jnp.nan)
    out, cache = run_tpu(spec, arguments)
    assert np.all(np.asarray(out[8:]) == 0)
    assert_equal(spec, (out, cache), wanted)


def test_a_row_reads_what_another_row_writes_in_the_same_step():
    spec = replace(SMALL, rows=((16, 16), (4, 20)), tokens=20)
    arguments = list(spec.arguments(SEED, platform="tpu"))
    table = arguments[5]
    arguments[5] = table.at[1, 0].set(table[0, 0])  # the prefix of row 1 is row 0
    assert_equal(spec, run_tpu(spec, arguments), run_reference(spec, arguments))


@pytest.mark.parametrize("spec", REFUSED, ids=lambda spec: spec.name)
def test_what_the_tpu_kernel_cannot_do_is_refused(spec):
    with pytest.raises(NotImplementedError, match=r"float16: use bfloat16|block-sparse masks"):
        run_tpu(spec, spec.arguments(platform="tpu"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"page_size": 4}, "page_size is 4; the TPU kernel needs a multiple of 8"),
        ({"pages_per_row": 40_000}, "scalar memory; .* Use larger pages"),
        (
            {"page_size": 256, "num_heads": 128, "num_kv_heads": 128},
            "vector memory; .* Use smaller pages",
        ),
    ],
)
def test_sizes_beyond_the_chip_are_refused(change, reason):
    spec = replace(SMALL, rows=((1, 3),), **change)
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(partial(run_tpu, spec), spec.arguments(platform="tpu"))


def test_other_platforms_caches_are_refused():
    with pytest.raises(NotImplementedError, match="not laid out for TPUs"):
        run_tpu(SMALL, SMALL.arguments(platform="cpu"))


def test_jax_can_hold_the_kernel_by_a_weak_reference():
    """From JAX 0.11 on it does, whatever platform a call is traced for."""
    shape = Shape(1, 1, 16, 16, 256, 128, 128, 256)
    kernel = Kernel(shape, Blocks(1, 1, 1), 1.0, None, None, False, jnp.dtype(jnp.float32))
    assert weakref.ref(kernel)() is kernel
    assert hash(kernel) == hash(replace(kernel))


def test_it_can_be_traced_in_a_checked_shard_map():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    arguments = SMALL.arguments(platform="tpu")
    heads = jax.P(None, "x", None)
    pages = jax.P(*("x" if axis == "kv_heads" else None for axis in cache_axes()))
    options = SMALL.options() | {"implementation": "tpu"}
    out, cache = jax.eval_shape(
        jax.shard_map(
            lambda *arrays: ragged_paged_attention(*arrays, **options),
            mesh=mesh,
            in_specs=(heads, heads, heads, pages, *[jax.P()] * 4),
            out_specs=(heads, pages),
        ),
        *arguments,
    )
    assert (out.shape, cache.shape) == (arguments[0].shape, arguments[3].shape)


@pytest.mark.parametrize(
    ("head_dim", "v_head_dim", "shared_kv"),
    [*[(dim, dim, False) for dim in (64, 80, 96, 112, 120, 128, 160, 192, 256)], (576, 512, True)],
)
def test_padding_a_head_never_doubles_the_cache(head_dim, v_head_dim, shared_kv):
    tpu_shape, gpu_shape = (
        cache_shape(
            7, 16, 2, head_dim, v_head_dim, jnp.bfloat16, shared_kv=shared_kv, platform=platform
        )
        for platform in ("tpu", "gpu")
    )
    assert np.prod(tpu_shape) < 2 * np.prod(gpu_shape)


@pytest.mark.parametrize("seed", range(8))
def test_units_hold_every_live_token_once_and_every_block(seed):
    rng = np.random.default_rng(seed)
    new = rng.integers(0, 30, 6)
    lens = new + rng.integers(0, 50, 6)
    live, block, page_size, window = int(rng.integers(0, 7)), 16, 8, [None, 9][seed % 2]
    starts = np.concatenate([[0], np.cumsum(new)])
    units = tpu_work.unit_list(
        *(jnp.asarray(x, jnp.int32) for x in (lens, np.zeros((6, 10)), starts, [0, live, live])),
        num_blocks=12,
        block=block,
        page_size=page_size,
        window=window,
    )
    units = np.asarray(units).reshape(-1, tpu_work.UNIT_FIELDS)
    tokens = [t for unit in units for t in range(unit[tpu_work.LOW], unit[tpu_work.HIGH])]
    assert tokens == list(range(starts[live]))
    blocks = units[:, tpu_work.BLOCK]
    assert np.all(np.diff(blocks) >= 0)
    assert set(blocks) == set(range(12))
    for unit in units:
        low, high = unit[tpu_work.LOW], unit[tpu_work.HIGH]
        pages = range(unit[tpu_work.FIRST_PAGE], unit[tpu_work.END_PAGE])
        if low == high:
            assert len(pages) == 0
            continue
        assert low // block == (high - 1) // block == unit[tpu_work.BLOCK]
        row = int(np.searchsorted(starts, low, side="right")) - 1
        assert unit[tpu_work.TABLE] == row * 10
        first, last = (lens[row] - starts[row + 1] + t for t in (low, high - 1))
        seen = max(0, first - window + 1) if window else 0
        assert (pages.start, pages.stop) == (seen // page_size, last // page_size + 1)
