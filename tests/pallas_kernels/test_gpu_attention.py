"""The GPU kernels: interpreted here against the specification, and lowered for CUDA.

On a machine with a GPU, JAXSERVE_TEST_DEVICE=gpu runs them on the card as well.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ragged_paged_attention import (
    cache_shape,
    gpu,
    hopper,
    ragged_paged_attention,
)
from pallas_kernels.ragged_paged_attention.arg_specs import ARG_SPECS, WIDTHS, ArgSpec

from ..quick_compile import quick_jit
from .cuda_lowering import A100, H100, lowered_for_cuda

NAMES = [spec.name for spec in ARG_SPECS]
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}


def relative_error(spec: ArgSpec, seed: int, **options) -> float:
    """Of the kernels in interpret mode against the float32 reference; checks the cache too."""
    arguments = spec.arguments(seed, platform="gpu")
    exact = [x if x is None or x.dtype == jnp.int32 else x.astype(jnp.float32) for x in arguments]
    wanted, wanted_cache = quick_jit(
        partial(ragged_paged_attention, **spec.options(), implementation="reference")
    )(*exact)
    given = spec.options()
    per_head = given.pop("alibi_slopes"), given.pop("block_offsets")
    call = partial(gpu.ragged_paged_attention, **given, **{"interpret": True, **options})
    out, cache = quick_jit(call)(*arguments, *per_head)
    np.testing.assert_array_equal(np.asarray(cache, np.float32), np.asarray(wanted_cache))
    difference = np.asarray(out, np.float64) - np.asarray(wanted, np.float64)
    return float(np.linalg.norm(difference) / max(1e-30, np.linalg.norm(np.asarray(wanted))))


@pytest.mark.parametrize("spec", ARG_SPECS, ids=lambda spec: spec.name)
def test_kernels_equal_the_reference(spec):
    assert relative_error(spec, seed=1) < TOLERANCE[spec.dtype]


@pytest.mark.parametrize("spec", WIDTHS, ids=lambda spec: spec.name)
def test_every_width_and_page_size_equals_the_reference(spec):
    assert relative_error(spec, seed=2) < TOLERANCE[spec.dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [*ARG_SPECS, *WIDTHS], ids=lambda spec: spec.name)
@pytest.mark.parametrize("device_kind", ["this", "any"])
def test_kernels_on_the_card_equal_the_reference(spec, device_kind):
    kind = jax.devices()[0].device_kind if device_kind == "this" else None
    error = relative_error(spec, seed=7, interpret=False, device_kind=kind)
    assert error < TOLERANCE[spec.dtype]


def test_many_tokens_are_written_several_at_a_time():
    rows, page_size, num_heads, width = ((1, 9), (700, 700), (318, 400)), 16, 3, 24
    used, tokens = sum(new for new, _ in rows), 1029
    starts = np.cumsum([0, *(new for new, _ in rows)])
    table = np.random.default_rng(0).permutation(3 * 50).reshape(3, 50)
    keys, values = (
        jax.random.normal(jax.random.key(seed), (tokens, num_heads, width)) for seed in (0, 1)
    )
    shape = cache_shape(150, page_size, num_heads, width, width, jnp.float32, platform="gpu")
    metadata = ([kv_len for _, kv_len in rows], table, starts, [1, 3, 3])
    written = gpu.write(
        jnp.zeros(shape),
        *(keys, values),
        *(jnp.asarray(x, jnp.int32) for x in metadata),
        interpret=True,
    )
    wanted = np.zeros(shape, np.float32)
    for row, (new, kv_len) in enumerate(rows):
        for i in range(new):
            page, slot = divmod(kv_len - new + i, page_size)
            place = table[row, page], slice(None), slot
            wanted[place] = np.concatenate([keys[starts[row] + i], values[starts[row] + i]], -1)
    assert used < tokens
    np.testing.assert_array_equal(written, wanted)


@pytest.mark.parametrize("programs", [1, 4, 10_000])
def test_the_cut_into_items_changes_nothing(programs):
    spec = replace(ARG_SPECS[0], rows=((1, 700), (1, 3), (1, 64), (1, 129)), tokens=4, row_slots=6)
    tiling = gpu.Tiling(rows=16, keys=16, num_warps=4, num_stages=2, programs=programs)
    assert relative_error(spec, seed=3, decode=tiling) < 1e-5
    assert relative_error(replace(spec, window=100), seed=3, decode=tiling) < 1e-5


def merged_outputs(seed: int, *, num_rows: int, longest: int, repeats: int, interpret: bool):
    """Random rows of one token, cut into one item and into very many: outputs of each, repeated."""
    rng = np.random.default_rng(seed)
    lens = rng.integers(0, longest, num_rows)
    pages = -(-longest // 16)
    metadata = [
        jnp.asarray(x, jnp.int32)
        for x in (
            lens,
            rng.permutation(num_rows * pages).reshape(num_rows, pages),
            np.arange(num_rows + 1),
            [num_rows] * 3,
        )
    ]
    keys = jax.random.split(jax.random.key(seed))
    q = jax.random.normal(keys[0], (num_rows, 8, 64))
    cache = jax.random.normal(keys[1], (num_rows * pages, 2, 16, 128))
    outputs = []
    for programs in (1, 100_000):
        tiling = gpu.Tiling(rows=16, keys=16, num_warps=4, num_stages=2, programs=programs)
        call = quick_jit(
            partial(
                gpu.attend,
                shared_kv=False,
                scale=0.125,
                v_head_dim=64,
                decode_only=True,
                decode=tiling,
                interpret=interpret,
            )
        )
        outputs.append([call(q, cache, *metadata) for _ in range(repeats)])
    return lens, outputs


def check_merged(lens, outputs) -> None:
    (whole, *_), merged = outputs
    for out in merged:
        np.testing.assert_array_equal(out, merged[0])
    np.testing.assert_allclose(merged[0], whole, rtol=1e-4, atol=1e-5)
    assert not np.any(np.asarray(whole)[lens == 0])


def test_items_are_merged_in_their_order():
    check_merged(*merged_outputs(0, num_rows=5, longest=300, repeats=2, interpret=True))


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(8))
def test_items_are_merged_on_this_card_in_their_order(seed):
    check_merged(*merged_outputs(seed, num_rows=40, longest=2500, repeats=50, interpret=False))


def test_a_decode_only_step_equals_a_mixed_one():
    spec = replace(ARG_SPECS[0], rows=((1, 700), (1, 3), (1, 64)), tokens=4, row_slots=4)
    assert relative_error(spec, seed=4, decode_only=True) < 1e-5
    assert relative_error(replace(spec, tokens=7), seed=4, decode_only=True) < 1e-5


@pytest.mark.parametrize("spec", WIDTHS, ids=lambda spec: spec.name)
def test_kernels_lower_for_cuda(spec):
    arguments = jax.eval_shape(partial(spec.arguments, platform="gpu"))
    call = partial(ragged_paged_attention, **spec.options())
    assert lowered_for_cuda(call, *arguments).count("triton") >= 3, "write, decode and prefill"


def test_prompts_go_to_the_hopper_kernel_where_it_takes_them():
    spec = replace(ARG_SPECS[NAMES.index("llama3_8b_tp4-mixed")], page_size=16)
    q, _, _, cache, *metadata = jax.eval_shape(partial(spec.arguments, platform="gpu"))
    call = partial(
        gpu.attend,
        shared_kv=False,
        v_head_dim=spec.v_head_dim,
    )

    def lowered(**options) -> str:
        options = {"scale": 1.0, **options}
        return lowered_for_cuda(partial(call, **options), q, cache, *metadata)

    assert "mosaic_gpu" in lowered(prefill=hopper.PrefillConfig())
    assert "mosaic_gpu" in lowered(device_kind=H100)
    assert "mosaic_gpu" not in lowered(device_kind=A100)
    assert "mosaic_gpu" not in lowered(device_kind="NVIDIA H200", softcap=30.0, scale=-1.0)


def test_a_cache_of_a_cpu_is_left_to_others():
    spec = ARG_SPECS[0]
    arguments = spec.arguments(platform="cpu")
    text = lowered_for_cuda(partial(ragged_paged_attention, **spec.options()), *arguments)
    assert "triton" not in text


def test_a_padded_width_takes_no_memory():
    for head_dim in (64, 80, 96, 112, 120, 128, 160, 192, 256):
        shape = cache_shape(10, 16, 4, head_dim, head_dim, jnp.bfloat16, platform="gpu")
        assert np.prod(shape) == 10 * 16 * 4 * 2 * head_dim


def test_tiles_cover_every_token_once():
    problem = gpu.Problem(8, 2, 64, 64, 16, False, 1.0, None, None, None, False, False, True)
    tiling = gpu.Tiling(rows=32, keys=16, num_warps=4, num_stages=2)
    lens, starts = np.array([9, 40, 0, 23, 0]), np.array([0, 1, 31, 31, 37, 37])
    tiles = np.asarray(
        gpu.prefill_tiles(
            problem, tiling, 50, *map(jnp.asarray, (lens, starts, np.array([1, 4, 4])))
        )
    )
    seen = {}
    for _, start, stop, position in tiles[tiles[:, 0] >= 0]:
        for token in range(start, stop):
            assert token not in seen
            seen[token] = -1 if position < 0 else position + token - start
    assert sorted(seen) == list(range(1, 50))
    assert [seen[t] for t in (1, 30, 31, 36)] == [10, 39, 17, 22]
    assert all(seen[t] == -1 for t in range(37, 50))


@pytest.mark.parametrize(("programs", "is_sorted"), [(8, True), (1000, False)])
def test_items_cover_every_key_once_and_whole_rows_go_longest_first(programs, is_sorted):
    problem = gpu.Problem(8, 2, 64, 64, 16, False, 1.0, None, None, None, False, False, True)
    tiling = gpu.Tiling(rows=16, keys=16, num_warps=4, num_stages=2, programs=programs)
    lens = np.array([40, 300, 0, 17, 16, 90, 500])
    given = (jnp.asarray(x, jnp.int32) for x in (lens, np.arange(8), [6, 7, 7]))
    items = np.asarray(gpu.decode_items(problem, tiling, *given, num_cleared=3))
    assert sorted(items[:, 6]) == list(range(len(items)))
    sizes = np.where(items[:, 0] >= 0, items[:, 2] - items[:, 1], -1)
    assert (np.diff(sizes) <= 0).all() == is_sorted
    used = items[sizes >= 0]
    for row, kv_len in enumerate([*lens[:6], 0]):
        mine = used[used[:, 0] == row]
        mine = mine[mine[:, 6].argsort()]
        numbers = [] if not len(mine) else list(range(mine[0, 4], mine[0, 4] + mine[0, 5]))
        assert list(mine[:, 6]) == numbers
        assert [k for _, low, high, *_ in mine for k in range(low, high)] == list(range(kv_len))
    assert (used[used[:, 0] == 2][:, 1:4] == 0).all()
