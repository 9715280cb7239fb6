"""Ragged paged attention: every implementation against the specification and a plain formula."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import Implementation, NoImplementation, dispatch
from pallas_kernels.ragged_paged_attention import (
    BlockSparse,
    cache_axes,
    cache_shape,
    default_page_size,
    ragged_paged_attention,
)
from pallas_kernels.ragged_paged_attention.arg_specs import ARG_SPECS, ArgSpec
from pallas_kernels.ragged_paged_attention.layout import unpack_cache
from pallas_kernels.ragged_paged_attention.xla import tile_blocks, tile_sizes, work_items

from ..quick_compile import quick_jit

TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 2e-3}
SMALL = ArgSpec("small", (), 24, 6, 6, 2, 16, 16, page_size=4)
NAMES = [spec.name for spec in ARG_SPECS]


def run(spec: ArgSpec, arguments, implementation: str | None = None):
    def call(*arrays):
        return ragged_paged_attention(*arrays, **spec.options(), implementation=implementation)

    out, cache = quick_jit(call)(*arguments)
    return np.asarray(out, np.float32), cache


def assert_same_cache(cache, wanted) -> None:
    np.testing.assert_array_equal(np.asarray(cache, np.float32), np.asarray(wanted, np.float32))


def stored(spec: ArgSpec, cache) -> tuple[np.ndarray, np.ndarray]:
    """Keys [pages, K, page_size, H] and values [pages, K, page_size, Hv] of a whole cache."""
    parts = unpack_cache(cache, spec.head_dim, spec.v_head_dim, shared_kv=spec.shared_kv)
    keys, values = (np.asarray(part, np.float64) for part in parts)
    return keys, values


def seen_keys(spec: ArgSpec, i: int, head: int) -> list[int]:
    """Positions of the keys that the query at i sees."""
    keys = range(0 if spec.window is None else max(0, i - spec.window + 1), i + 1)
    if spec.block_sparse is None:
        return list(keys)
    size, local, stride = (
        spec.block_sparse.block_size,
        spec.block_sparse.local_blocks,
        spec.block_sparse.vertical_stride,
    )
    return [
        j for j in keys if i // size - j // size < local or (j // size + head + 1) % stride == 0
    ]


def formula(spec: ArgSpec, arguments, cache) -> np.ndarray:
    """Softmax attention of one query at a time, from the pages of the new cache."""
    q, page_table, query_starts = (np.asarray(arguments[i]) for i in (0, 5, 6))
    slopes = spec.options()["alibi_slopes"]
    slopes = np.zeros(spec.num_heads) if slopes is None else np.asarray(slopes)
    out = np.zeros((spec.tokens, spec.num_heads, spec.v_head_dim))
    all_keys, all_values = stored(spec, cache)
    for row, (num_new, kv_len) in enumerate(spec.rows):
        pages = page_table[row, : -(-kv_len // spec.page_size)]
        for token in range(num_new):
            i = kv_len - num_new + token
            for head in range(spec.num_heads):
                kv_head = head // (spec.num_heads // spec.num_kv_heads)
                seen = seen_keys(spec, i, head)
                keys = np.concatenate([all_keys[p, kv_head] for p in pages])[seen]
                values = np.concatenate([all_values[p, kv_head] for p in pages])[seen]
                query = np.asarray(q[query_starts[row] + token, head], np.float64)
                scores = keys @ query * spec.head_dim**-0.5
                if spec.softcap is not None:
                    scores = spec.softcap * np.tanh(scores / spec.softcap)
                scores = scores + slopes[head] * (np.array(seen) - i)
                weights = np.exp(scores - scores.max())
                out[query_starts[row] + token, head] = weights @ values / weights.sum()
    return out


def random_rows(rng: np.random.Generator, tokens: int, slots: int, max_kv: int):
    """Some rows with one token, then chunks (some empty), within the sizes given."""
    rows = [(1, int(rng.integers(1, max_kv))) for _ in range(rng.integers(0, slots))]
    left = tokens - len(rows)
    while len(rows) < slots and left > 0 and rng.random() < 0.85:
        num_new = int(rng.integers(0, left + 1))
        rows.append((num_new, num_new + int(rng.integers(0, max_kv))))
        left -= num_new
    return tuple(rows)


@pytest.mark.parametrize("spec", ARG_SPECS, ids=NAMES)
def test_xla_equals_reference(spec):
    check_xla(spec, "cpu")


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("-mixed")])
def test_xla_equals_reference_in_other_layouts(name, platform):
    check_xla(ARG_SPECS[NAMES.index(name)], platform)


def check_xla(spec: ArgSpec, platform: str) -> None:
    arguments = spec.arguments(platform=platform)
    wanted, wanted_cache = run(spec, arguments, "reference")
    out, cache = run(spec, arguments, "xla")
    np.testing.assert_allclose(out, wanted, atol=TOLERANCE[spec.dtype], rtol=0)
    assert_same_cache(cache, wanted_cache)


@pytest.mark.parametrize("seed", range(12))
def test_random_batches_equal_a_plain_formula(seed):
    rng = np.random.default_rng(seed)
    heads, kv_heads = [(6, 2), (4, 1), (3, 3), (8, 2)][seed % 4]
    spec = replace(
        SMALL,
        rows=random_rows(rng, SMALL.tokens, SMALL.row_slots, 30),
        num_heads=heads,
        num_kv_heads=kv_heads,
        v_head_dim=[16, 8, 24][seed % 3],
        page_size=[4, 8, 1][seed % 3],
        window=[None, 5, 1][seed // 2 % 3],
        softcap=[None, 3.0][seed // 3 % 2],
        alibi=seed % 5 == 0,
        pages_per_row=64,
    )
    arguments = spec.arguments(seed)
    for implementation in ("reference", "xla"):
        out, cache = run(spec, arguments, implementation)
        np.testing.assert_allclose(
            out, formula(spec, arguments, cache), atol=2e-5, rtol=0, err_msg=implementation
        )


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_many_heads_and_long_rows_equal_a_plain_formula(implementation):
    """XLA's optimised programs, which other tests here do not run: one of them was wrong."""
    spec = replace(
        SMALL, rows=((1, 300), (2, 257)), num_heads=128, head_dim=64, v_head_dim=64, page_size=16
    )
    arguments = spec.arguments(0)
    call = partial(ragged_paged_attention, **spec.options(), implementation=implementation)
    out, cache = jax.jit(call)(*arguments)
    np.testing.assert_allclose(out, formula(spec, arguments, cache), atol=2e-5, rtol=0)


@pytest.mark.parametrize("seed", range(12))
def test_block_sparse_and_shared_values_equal_a_plain_formula(seed):
    rng = np.random.default_rng(100 + seed)
    heads, kv_heads = [(6, 2), (4, 1), (3, 3), (8, 2)][seed % 4]
    spec = replace(
        SMALL,
        rows=random_rows(rng, SMALL.tokens, SMALL.row_slots, 60),
        num_heads=heads,
        num_kv_heads=kv_heads,
        v_head_dim=[16, 12, 1][seed % 3],
        page_size=[4, 8, 1][seed % 3],
        window=[None, None, 7][seed // 2 % 3],
        softcap=[None, 3.0][seed // 3 % 2],
        alibi=seed % 5 == 0,
        block_sparse=[None, BlockSparse(4, 2, 3), BlockSparse(3, 1, 5)][seed // 2 % 3],
        shared_kv=seed % 3 > 0,
        pages_per_row=128,
    )
    arguments = spec.arguments(seed)
    for implementation in ("reference", "xla"):
        out, cache = run(spec, arguments, implementation)
        np.testing.assert_allclose(
            out, formula(spec, arguments, cache), atol=2e-5, rtol=0, err_msg=implementation
        )


def test_a_shared_cache_holds_the_keys_and_nothing_else():
    shape = cache_shape(10, 16, 1, 576, 512, jnp.bfloat16, shared_kv=True)
    assert np.prod(shape) == 10 * 16 * (512 + 64)


def test_shared_keys_are_written_to_their_slots_and_nowhere_else():
    spec = replace(SMALL, rows=((1, 5), (7, 10)), v_head_dim=12, shared_kv=True)
    arguments = spec.arguments()
    _, k, _, before, _, page_table, _, _ = arguments
    _, after = run(spec, arguments)
    keys, old_keys = stored(spec, after)[0].copy(), stored(spec, before)[0]
    for token, (row, position) in enumerate([(0, 4), *((1, p) for p in range(3, 10))]):
        page, slot = page_table[row, position // 4], position % 4
        np.testing.assert_array_equal(keys[page, :, slot], k[token])
        keys[page, :, slot] = old_keys[page, :, slot]
    np.testing.assert_array_equal(keys, old_keys)


@pytest.mark.parametrize("name", ["alibi", "block_sparse"])
def test_per_head_arguments_are_split_with_the_heads(name):
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    value = {"alibi": True, "block_sparse": BlockSparse(2, 1, 3)}[name]
    spec = replace(SMALL, rows=((1, 9), (6, 11)), **{name: value})
    arguments, options = spec.arguments(), spec.options()
    argument = {"alibi": "alibi_slopes", "block_sparse": "block_offsets"}[name]
    per_head = options.pop(argument)
    wanted, _ = run(spec, arguments)
    mesh = jax.make_mesh(
        (2,), ("x",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,)
    )
    heads, whole = jax.P(None, "x", None), jax.P()
    pages = jax.P(*("x" if axis == "kv_heads" else None for axis in cache_axes()))
    out, _ = quick_jit(
        jax.shard_map(
            lambda each, *arrays: ragged_paged_attention(*arrays, **options, **{argument: each}),
            mesh=mesh,
            in_specs=(jax.P("x"), heads, heads, heads, pages, whole, whole, whole, whole),
            out_specs=(heads, pages),
        )
    )(per_head, *arguments)
    np.testing.assert_allclose(out, wanted, atol=1e-6)


def test_tokens_are_written_to_their_slots_and_nowhere_else():
    spec = replace(SMALL, rows=((1, 5), (7, 10)))
    arguments = spec.arguments()
    _, k, v, before, _, page_table, _, _ = arguments
    _, after = run(spec, arguments)
    keys, values = map(np.array, stored(spec, after))
    old_keys, old_values = stored(spec, before)
    for token, (row, position) in enumerate([(0, 4), *((1, p) for p in range(3, 10))]):
        page, slot = page_table[row, position // 4], position % 4
        np.testing.assert_array_equal(keys[page, :, slot], k[token])
        np.testing.assert_array_equal(values[page, :, slot], v[token])
        keys[page, :, slot] = old_keys[page, :, slot]
        values[page, :, slot] = old_values[page, :, slot]
    np.testing.assert_array_equal(keys, old_keys)
    np.testing.assert_array_equal(values, old_values)


def test_padding_is_zero_and_ignores_what_padded_entries_hold():
    spec = replace(SMALL, rows=((1, 5), (7, 10)))
    arguments = list(spec.arguments())
    clean, clean_cache = run(spec, arguments)
    kv_lens, page_table, query_starts = arguments[4:7]
    arguments[4] = kv_lens.at[2:].set(999)
    arguments[5] = page_table.at[2:].set(10_000)
    arguments[6] = query_starts.at[3:].set(0)
    arguments[0] = arguments[0].at[8:].set(jnp.nan)
    out, cache = run(spec, arguments)
    assert np.all(out[8:] == 0)
    np.testing.assert_array_equal(out, clean)
    assert_same_cache(cache, clean_cache)


def test_chunks_and_single_tokens_equal_one_prefill():
    whole = replace(SMALL, rows=((20, 20),), page_size=4)
    q, k, v, cache, kv_lens, page_table, query_starts, _ = whole.arguments()
    wanted, wanted_cache = run(whole, whole.arguments())
    call = quick_jit(lambda *arrays: ragged_paged_attention(*arrays, **whole.options()))
    start = 0
    for num_new in (7, 1, 9, 1, 1, 1):
        window = slice(start, start + num_new)
        single = int(num_new == 1)
        out, cache = call(
            *(x[window] for x in (q, k, v)),
            cache,
            kv_lens.at[0].set(start + num_new),
            page_table,
            query_starts.at[1:].set(num_new),
            jnp.array([single, 1, 1], jnp.int32),
        )
        np.testing.assert_allclose(out, wanted[window], atol=2e-5, rtol=0)
        start += num_new
    assert_same_cache(cache, wanted_cache)


def counted(rows, *, slots: int, singles: int, window: int | None = None):
    """work_items for rows of (new, kv) in pages of 16 and tiles of 128 and 64."""
    starts = np.zeros(slots + 1, np.int32)
    starts[1 : len(rows) + 1] = np.cumsum([num_new for num_new, _ in rows])
    starts[len(rows) + 1 :] = starts[len(rows)]
    lens = np.zeros(slots, np.int32)
    lens[: len(rows)] = [kv_len for _, kv_len in rows]
    items = work_items(
        jnp.asarray(lens),
        jnp.asarray(starts),
        jnp.array([singles, len(rows), len(rows)], jnp.int32),
        page_size=16,
        tile=128,
        small_tile=64,
        window=window,
    )
    return [np.asarray(each) for each in items]


def test_work_follows_the_tokens_and_not_the_bucket():
    rows = [(1, 33), (1, 1), (1, 160)]
    for slots in (3, 64):
        pages, _, tiles, small = counted(rows, slots=slots, singles=3)
        assert pages.sum() == 3 + 1 + 10
        assert tiles.sum() == small.sum() == 0
    pages, _, tiles, small = counted([(0, 0), (300, 300), (40, 900)], slots=32, singles=0)
    assert pages.sum() == 0
    assert list(tiles[:3]) == [0, 2, 0]
    assert list(small[:3]) == [0, 1, 1]


def test_a_window_skips_old_pages():
    pages, first, _, _ = counted([(1, 1600)], slots=1, singles=1, window=20)
    assert (first[0], pages[0]) == (98, 2)
    first, end = tile_blocks(jnp.int32(1000), jnp.int32(1064), block=64, window=100)
    assert (first, end) == (14, 17)


def test_key_blocks_stop_at_the_causal_limit():
    first, end = tile_blocks(jnp.int32(128), jnp.int32(256), block=64, window=None)
    assert (first, end) == (0, 4)


def test_tile_sizes_never_exceed_the_bucket():
    for tokens in (1, 8, 64, 100, 512):
        for group in (1, 3, 8, 64):
            tile, small = tile_sizes(tokens, group)
            assert small <= tile <= tokens


@pytest.mark.parametrize("shared_kv", [False, True], ids=["", "shared_kv"])
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_a_donated_cache_is_updated_in_place(tokens, platform, shared_kv):
    rows = ((tokens, tokens + 3),)
    spec = replace(SMALL, rows=rows, tokens=tokens, row_slots=1)
    if shared_kv:
        spec = replace(spec, num_kv_heads=1, v_head_dim=12, shared_kv=True)
    q, k, v, _, *metadata = spec.arguments()
    shape = cache_shape(
        100_000,
        4,
        spec.num_kv_heads,
        spec.head_dim,
        spec.v_head_dim,
        q.dtype,
        shared_kv=shared_kv,
        platform=platform,
    )
    cache = jax.ShapeDtypeStruct(shape, q.dtype)

    def step(cache, q, k, v, metadata):
        return ragged_paged_attention(q, k, v, cache, *metadata, **spec.options())

    compiled = jax.jit(step, donate_argnums=0).lower(cache, q, k, v, metadata).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < cache.size * 4 / 10
    assert memory.alias_size_in_bytes == cache.size * 4


def test_local_shapes_inside_shard_map():
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    spec = replace(SMALL, rows=((1, 9), (6, 11)))
    arguments = spec.arguments()
    wanted, wanted_cache = run(spec, arguments)
    mesh = jax.make_mesh(
        (2,), ("x",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,)
    )
    heads = jax.P(None, "x", None)
    pages = jax.P(*("x" if axis == "kv_heads" else None for axis in cache_axes()))
    sharded = jax.shard_map(
        lambda *arrays: ragged_paged_attention(*arrays, **spec.options()),
        mesh=mesh,
        in_specs=(heads, heads, heads, pages, jax.P(), jax.P(), jax.P(), jax.P()),
        out_specs=(heads, pages),
    )
    out, cache = quick_jit(sharded)(*arguments)
    np.testing.assert_allclose(out, wanted, atol=1e-6)
    assert_same_cache(cache, wanted_cache)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_for_other_platforms(platform):
    spec = replace(SMALL, rows=((1, 9), (6, 11)))
    traced = jax.jit(lambda *arrays: ragged_paged_attention(*arrays, **spec.options())).trace(
        *spec.arguments()
    )
    assert "while" in traced.lower(lowering_platforms=(platform,)).as_text()


def test_wrong_shapes_are_all_named():
    q, k, v, cache, kv_lens, page_table, query_starts, distribution = SMALL.arguments()
    with pytest.raises(ValueError, match=r"cache has shape .*query_starts has shape \(6,\)"):
        ragged_paged_attention(
            q, k, v, cache[..., :-1], kv_lens, page_table, query_starts[1:], distribution, scale=1
        )
    with pytest.raises(ValueError, match=r"v_head_dim is 17; .* to the head_dim 16"):
        ragged_paged_attention(
            q,
            k,
            None,
            cache,
            kv_lens,
            page_table,
            query_starts,
            distribution,
            scale=1,
            v_head_dim=17,
        )
    with pytest.raises(ValueError, match="block_offsets is absent; give both or neither"):
        ragged_paged_attention(*SMALL.arguments(), scale=1, block_sparse=BlockSparse(1, 1, 1))
    with pytest.raises(ValueError, match=r"local_blocks=0.*at least 1"):
        BlockSparse(1, 0, 1)
    with pytest.raises(ValueError, match="window is 0"):
        ragged_paged_attention(*SMALL.arguments(), scale=1, window=0)
    with pytest.raises(ValueError, match="choose one of: gpu, tpu, xla, reference"):
        ragged_paged_attention(*SMALL.arguments(), scale=1, implementation="magic")


def test_default_page_size_is_known_for_every_platform():
    assert all(default_page_size(platform) > 0 for platform in ("cpu", "tpu", "cuda", "rocm"))


def refuse(x):
    raise NotImplementedError(f"not for shape {x.shape}")


def test_dispatch_takes_the_first_that_accepts():
    implementations = (
        Implementation("refuses", refuse),
        Implementation("tpu", lambda x: x + 2, platforms=("tpu",)),
        Implementation("any", lambda x: x + 1),
    )
    assert dispatch("op", implementations, jnp.zeros(())) == 1
    lowered = jax.jit(lambda x: dispatch("op", implementations, x)).trace(jnp.zeros(()))
    assert "2.000000e+00" in lowered.lower(lowering_platforms=("tpu",)).as_text()
    assert "2.000000e+00" not in lowered.lower(lowering_platforms=("cpu",)).as_text()


def test_dispatch_reports_every_refusal():
    implementations = (Implementation("a", refuse), Implementation("b", refuse))
    with pytest.raises(NoImplementation, match=r"every implementation .* refused \(a, b\)") as info:
        dispatch("op", implementations, jnp.zeros(3))
    assert len(info.value.exceptions) == 2


def test_dispatch_runs_unautomatic_ones_only_when_named():
    implementations = (Implementation("slow", lambda x: x, automatic=False),)
    assert dispatch("op", implementations, jnp.ones(()), implementation="slow") == 1
    with pytest.raises(NotImplementedError, match="no implementation exists"):
        dispatch("op", implementations, jnp.ones(()))
