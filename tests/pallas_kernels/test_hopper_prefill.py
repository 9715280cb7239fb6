"""The Hopper prefill kernel without a Hopper: tiles, lowering, and numbers when interpreted."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ragged_paged_attention import hopper, reference
from pallas_kernels.ragged_paged_attention.arg_specs import ArgSpec
from pallas_kernels.ragged_paged_attention.layout import write_tokens

from .cuda_lowering import lowered_for_cuda
from .gpu_interpreter import InterpretGPUParams

ROWS = ((1, 37), (70, 70), (0, 0), (5, 133), (33, 300))
# Tokens enough that every tile of queries lies in the array. On a card, what lies past its end
# reads as zeros; the interpreter raises in one of its threads, and the others wait for ever.
SPEC = ArgSpec("ragged", ROWS, 256, 5, 4, 2, 64, 64, page_size=16, dtype="bfloat16")
LLAMA = ArgSpec("llama", (), 2048, 8, 32, 8, 128, 128, page_size=16, dtype="bfloat16")
SMALL = hopper.PrefillConfig(num_programs=2)


def options(spec: ArgSpec, config: hopper.PrefillConfig | None) -> dict:
    return {
        "scale": spec.head_dim**-0.5,
        "window": spec.window,
        "softcap": spec.softcap,
        "config": config,
    }


def shapes(spec: ArgSpec) -> tuple[jax.ShapeDtypeStruct, ...]:
    pages, rows, i32 = 512, spec.row_slots, jnp.int32
    cache = (pages, spec.num_kv_heads, spec.page_size, 2 * spec.head_dim)
    return (
        jax.ShapeDtypeStruct((spec.tokens, spec.num_heads, spec.head_dim), spec.dtype),
        jax.ShapeDtypeStruct(cache, spec.dtype),
        jax.ShapeDtypeStruct((rows,), i32),
        jax.ShapeDtypeStruct((rows, pages), i32),
        jax.ShapeDtypeStruct((rows + 1,), i32),
        jax.ShapeDtypeStruct((3,), i32),
    )


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (SMALL, {}),
        (replace(SMALL, heads_per_tile=1), {"window": 48}),
        (
            replace(SMALL, heads_per_tile=4, block_kv=64, stages=3, query_stages=1),
            {"num_heads": 8, "page_size": 128, "window": 100, "softcap": 30.0},
        ),
        (
            replace(SMALL, take_turns=False, num_programs=3),
            {"head_dim": 128, "v_head_dim": 128, "page_size": 32, "dtype": "float16"},
        ),
    ],
)
def test_interpreted_kernel_agrees_with_the_reference(config, changes):
    spec = replace(SPEC, **changes)
    q, k, v, cache, *metadata = spec.arguments(seed=3, platform="gpu")
    cache = write_tokens(cache, k, v, *metadata)
    kernel = partial(hopper.prefill, **options(spec, config), interpret=InterpretGPUParams())
    out = np.asarray(jax.jit(kernel)(q, cache, *metadata), np.float64)
    kv_lens, page_table, query_starts, distribution = metadata
    wanted, _ = reference.ragged_paged_attention(
        q,
        k,
        v,
        cache,
        kv_lens,
        page_table,
        query_starts,
        distribution,
        alibi_slopes=None,
        block_offsets=None,
        scale=spec.head_dim**-0.5,
        window=spec.window,
        softcap=spec.softcap,
        block_sparse=None,
        v_head_dim=spec.v_head_dim,
    )
    live = slice(*(int(query_starts[distribution[end]]) for end in (0, 2)))
    wanted = np.asarray(wanted, np.float64)[live]
    error = np.linalg.norm(out[live] - wanted) / np.linalg.norm(wanted)
    assert error < (1e-3 if spec.dtype == "float16" else 4e-3)


@pytest.mark.parametrize("window", [None, 1000])
@pytest.mark.parametrize("softcap", [None, 50.0])
@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256])
def test_kernel_lowers_for_cuda(page_size, softcap, window):
    spec = replace(LLAMA, page_size=page_size, softcap=softcap, window=window)
    text = lowered_for_cuda(partial(hopper.prefill, **options(spec, None)), *shapes(spec))
    assert "mosaic_gpu" in text


@pytest.mark.parametrize(
    ("head_dim", "num_heads", "num_kv_heads", "dtype"),
    [
        (64, 14, 2, "float16"),
        (128, 40, 8, "bfloat16"),
        (128, 16, 1, "bfloat16"),
        (192, 16, 16, "bfloat16"),
        (256, 8, 4, "bfloat16"),
    ],
)
def test_every_head_dim_lowers_for_cuda(head_dim, num_heads, num_kv_heads, dtype):
    spec = replace(
        LLAMA,
        head_dim=head_dim,
        v_head_dim=head_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        dtype=dtype,
    )
    text = lowered_for_cuda(partial(hopper.prefill, **options(spec, None)), *shapes(spec))
    assert "mosaic_gpu" in text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float32"}, "dtype float32"),
        ({"head_dim": 80, "v_head_dim": 80}, "head_dim 80"),
        ({"page_size": 48}, "page size 48"),
        ({"tokens": 100}, "100 tokens"),
        ({"tokens": 32}, "32 tokens"),
    ],
)
def test_what_the_kernel_does_not_do_is_refused(changes, reason):
    spec = replace(LLAMA, **changes)
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(partial(hopper.prefill, **options(spec, None)), *shapes(spec))


def test_configs_that_do_not_fit_are_refused():
    for config, reason in (
        (hopper.PrefillConfig(stages=3, query_stages=2), "bytes of shared memory"),
        (hopper.PrefillConfig(compute_registers=248), "registers"),
        (hopper.PrefillConfig(heads_per_tile=8), "tiles of 8"),
    ):
        with pytest.raises(NotImplementedError, match=reason):
            jax.eval_shape(partial(hopper.prefill, **options(LLAMA, config)), *shapes(LLAMA))


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("tile_tokens", [16, 64, 128])
def test_tiles_cover_each_token_of_the_rows_once_and_all_its_keys(tile_tokens, window):
    rng = np.random.default_rng(tile_tokens)
    for _ in range(5):
        num_new = np.concatenate([np.ones(3, int), rng.integers(0, 200, 5)])
        starts = np.concatenate([[0], np.cumsum(num_new)]).astype(np.int32)
        kv_lens = (num_new + rng.integers(0, 300, 8)).astype(np.int32)
        num_rows = int(rng.integers(3, 9))
        num_tokens = int(starts[-1]) + 5
        tiles = hopper.make_tiles(
            jnp.asarray(kv_lens),
            jnp.asarray(starts),
            jnp.asarray([3, num_rows, num_rows], jnp.int32),
            num_tokens,
            tile_tokens=tile_tokens,
            block_kv=128,
            key_alignment=16,
            window=window,
        )
        count = int(tiles.count[0])
        assert count <= tiles.fields.shape[0]
        seen = np.zeros(num_tokens, int)
        work = []
        for row, token, low, high, position, key, blocks, _ in np.asarray(tiles.fields)[:count]:
            assert token % 8 == 0
            assert low < high <= tile_tokens
            assert starts[row] <= token + low
            assert token + high <= starts[row + 1]
            assert position + starts[row + 1] - token == kv_lens[row]
            first = 0 if window is None else max(0, position + low - window + 1)
            assert key % 16 == 0
            assert first - 16 < key <= first
            last = position + high
            assert key + (blocks - 1) * 128 < last <= key + blocks * 128
            seen[token + low : token + high] += 1
            work.append(blocks)
        assert work == sorted(work, reverse=True)
        live = np.zeros(num_tokens, int)
        live[starts[3] : starts[num_rows]] = 1
        np.testing.assert_array_equal(seen, live)
