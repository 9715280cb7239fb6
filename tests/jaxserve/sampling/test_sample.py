"""Sampling: the kept sets against a sort in float64, the draws against their distribution."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.request import SamplingParams
from jaxserve.sampling import NUM_COLUMNS, SamplingArrays, fill, pack_into, sample, unpack
from jaxserve.sampling.sample import _exponential, _threefry, filter_weights

jit_sample = jax.jit(sample)
jit_filter = jax.jit(filter_weights)

PARAMETERS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_k=5),
    SamplingParams(temperature=1.3, top_p=0.8),
    SamplingParams(temperature=0.9, min_p=0.05),
    SamplingParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.02),
    SamplingParams(temperature=0.0, top_k=3, top_p=0.5),
    SamplingParams(temperature=2.0, top_k=1),
]


def rows_of(parameters, num_rows=None):
    """Columns for `parameters`, row r with seed 100 + r and position 7 * r."""
    rows = [(p, 100 + r, 7 * r) for r, p in enumerate(parameters)]
    return fill(rows, num_rows or len(rows))


def random_logits(num_rows, num_tokens, seed=0, scale=3.0):
    return np.random.default_rng(seed).normal(0, scale, (num_rows, num_tokens)).astype(np.float32)


def kept_tokens(logits, parameters):
    """The specification: which tokens of one row may be drawn, by a sort in float64; bool[V]."""
    z = logits.astype(np.float64)
    keep = np.isfinite(z)
    if 0 < parameters.top_k < len(z):
        keep &= z >= np.sort(z)[-parameters.top_k]
    p = np.where(keep, np.exp((z - z.max()) / parameters.temperature), 0)
    p /= p.sum()
    if parameters.top_p < 1:
        order = np.argsort(-p, kind="stable")
        crossing = np.searchsorted(np.cumsum(p[order]), parameters.top_p)
        keep &= z >= z[order][min(crossing, keep.sum() - 1)]
    return keep & (p >= parameters.min_p * p.max())


def chi_square_p_value(counts, probabilities):
    expected = probabilities * counts.sum()
    statistic = np.sum((counts - expected) ** 2 / expected)
    return float(jax.scipy.special.gammaincc((len(counts) - 1) / 2, statistic / 2))


# ---- which tokens may be drawn --------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [2, 17, 1000, 49152])
@pytest.mark.parametrize("top_k", [1, 2, 16, 17, 50, 999, 10**6])
def test_top_k_keeps_what_a_sort_keeps(num_tokens, top_k):
    logits = random_logits(4, num_tokens, seed=top_k)
    parameters = SamplingParams(temperature=0.6, top_k=top_k)
    kept = np.asarray(jit_filter(logits, rows_of([parameters] * 4))) > 0
    for r in range(4):
        np.testing.assert_array_equal(kept[r], kept_tokens(logits[r], parameters))


@pytest.mark.parametrize("num_tokens", [2, 17, 1000, 49152])
@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_top_p_keeps_what_a_sort_keeps(num_tokens, top_p, temperature):
    logits = random_logits(4, num_tokens, seed=num_tokens)
    parameters = SamplingParams(temperature=temperature, top_p=top_p)
    kept = np.asarray(jit_filter(logits, rows_of([parameters] * 4))) > 0
    for r in range(4):  # a mass within float32 rounding of top_p may count as reaching it or not
        least = kept_tokens(logits[r], replace(parameters, top_p=max(top_p - 1e-6, 1e-12)))
        most = kept_tokens(logits[r], replace(parameters, top_p=min(top_p + 1e-6, 1)))
        assert np.all(least <= kept[r])
        assert np.all(kept[r] <= most)


@pytest.mark.parametrize("seed", range(20))
def test_all_filters_together_keep_what_a_sort_keeps(seed):
    rng = np.random.default_rng(seed)
    parameters = [
        SamplingParams(
            temperature=rng.uniform(0.2, 2),
            top_k=int(rng.integers(0, 100)),
            top_p=rng.uniform(0.05, 1),
            min_p=rng.choice([0, rng.uniform(0, 0.3)]),
        )
        for _ in range(8)
    ]
    logits = random_logits(8, 300, seed)
    kept = np.asarray(jit_filter(logits, rows_of(parameters))) > 0
    for r in range(8):
        np.testing.assert_array_equal(kept[r], kept_tokens(logits[r], parameters[r]))


@pytest.mark.parametrize("seed", range(10))
def test_tied_logits_share_their_fate(seed):
    rng = np.random.default_rng(seed)
    logits = rng.integers(-4, 5, (6, 64)).astype(np.float32)  # about seven tokens for each value
    logits[rng.random((6, 64)) < 0.1] = -0.0
    parameters = [
        SamplingParams(top_k=3),
        SamplingParams(top_k=20),
        SamplingParams(top_p=0.42),
        SamplingParams(top_p=0.97),
        SamplingParams(top_k=25, top_p=0.83),
        SamplingParams(min_p=float(np.float32(np.exp(-2.5)))),
    ]
    kept = np.asarray(jit_filter(logits, rows_of(parameters))) > 0
    for r in range(6):
        np.testing.assert_array_equal(kept[r], kept_tokens(logits[r], parameters[r]))


def test_crossing_token_is_kept_and_a_reached_mass_is_enough():
    logits = np.log(np.array([[4, 2, 1, 1]] * 4, np.float32))  # shares 1/2 1/4 1/8 1/8
    parameters = [SamplingParams(top_p=p) for p in (0.5, 0.51, 0.74, 0.76)]
    kept = np.asarray(jit_filter(logits, rows_of(parameters))) > 0
    assert kept.sum(axis=1).tolist() == [1, 2, 2, 4]


def test_top_p_is_a_share_of_what_top_k_kept():
    logits = np.log(np.array([[4, 3, 2, 1]], np.float32))
    # The first token holds 4/7 of the two that top-k keeps, but only 4/10 of all four.
    kept = jit_filter(logits, rows_of([SamplingParams(top_k=2, top_p=0.55)]))
    assert np.count_nonzero(kept) == 1
    kept = jit_filter(logits, rows_of([SamplingParams(top_p=0.55)]))
    assert np.count_nonzero(kept) == 2


def test_uniform_logits_keep_every_token():
    logits = np.zeros((3, 4096), np.float32)
    parameters = [SamplingParams(top_k=1), SamplingParams(top_p=0.01), SamplingParams(min_p=1.0)]
    assert np.all(np.asarray(jit_filter(logits, rows_of(parameters))) == 1)


def test_extreme_parameters_keep_the_largest_logit():
    logits = random_logits(5, 100)
    logits[:, 50:] = -np.inf
    parameters = [
        SamplingParams(top_k=1),
        SamplingParams(min_p=1.0),
        SamplingParams(top_p=1e-30),
        SamplingParams(temperature=1e-30),
        SamplingParams(temperature=1e-7, top_k=50, top_p=0.5, min_p=0.5),
    ]
    np.testing.assert_array_equal(jit_sample(logits, rows_of(parameters)), logits.argmax(axis=1))


def test_kept_tokens_are_those_of_hf_transformers():
    torch = pytest.importorskip("torch")
    generation = pytest.importorskip("transformers.generation.logits_process")
    logits = random_logits(6, 500, seed=5)
    parameters = [
        SamplingParams(temperature=0.7, top_k=40, top_p=0.9, min_p=0.01),
        SamplingParams(temperature=1.5, top_k=10, top_p=0.6),
        SamplingParams(temperature=1.0, top_p=0.95, min_p=0.1),
        SamplingParams(temperature=0.2, top_k=500, min_p=0.3),
        SamplingParams(temperature=3.0, top_p=0.3),
        SamplingParams(temperature=1.1, top_k=7),
    ]
    weights = np.asarray(jit_filter(logits, rows_of(parameters)))
    for r, p in enumerate(parameters):
        warpers = [generation.TemperatureLogitsWarper(p.temperature)]
        if p.top_k:
            warpers.append(generation.TopKLogitsWarper(p.top_k))
        if p.top_p < 1:
            warpers.append(generation.TopPLogitsWarper(p.top_p))
        if p.min_p:
            warpers.append(generation.MinPLogitsWarper(p.min_p))
        scores = torch.from_numpy(logits[r : r + 1])
        for warper in warpers:
            scores = warper(None, scores)
        probabilities = torch.softmax(scores, dim=-1)[0].numpy()
        np.testing.assert_allclose(weights[r] / weights[r].sum(), probabilities, rtol=2e-5)


# ---- greedy ---------------------------------------------------------------------------------


def test_greedy_rows_take_the_first_largest_logit():
    logits = random_logits(4, 1000)
    logits[1, [30, 600]] = 100.0
    logits[2, :] = 0.0
    logits[3, 999] = 100.0
    expected = [logits[0].argmax(), 30, 0, 999]
    greedy, warm = SamplingParams(temperature=0.0), SamplingParams()
    assert jit_sample(logits, rows_of([greedy] * 4)).tolist() == expected
    both = jit_sample(np.concatenate([logits, logits]), rows_of([greedy] * 4 + [warm] * 4))
    assert both.tolist()[:4] == expected
    assert both.dtype == jnp.int32


def test_rows_without_finite_logits_get_a_token_of_the_range():
    logits = np.full((4, 64), np.nan, np.float32)
    logits[2:] = -np.inf
    greedy, warm = SamplingParams(temperature=0.0), SamplingParams(top_k=5, top_p=0.5, min_p=0.1)
    tokens = np.asarray(jit_sample(logits, rows_of([greedy, warm, greedy, warm])))
    assert np.all((tokens >= 0) & (tokens < 64))


def test_nothing_is_sorted_and_filters_are_conditional():
    program = str(jax.make_jaxpr(sample)(random_logits(2, 64), rows_of(PARAMETERS[:2])))
    assert "sort" not in program
    assert program.count("cond[") == 3


# ---- the draw -------------------------------------------------------------------------------


def draw_counts(logits, parameters, seeds, positions):
    """How often each token of one row is drawn over all (seed, position): i64[V]."""
    num_rows = len(seeds)
    column = partial(np.full, num_rows)
    s = SamplingArrays(
        temperature=column(parameters.temperature, np.float32),
        top_p=column(parameters.top_p, np.float32),
        min_p=column(parameters.min_p, np.float32),
        top_k=column(parameters.top_k, np.int32),
        seed=np.asarray(seeds, np.uint32),
        position=np.asarray(positions, np.int32),
    )
    tokens = jit_sample(np.broadcast_to(logits, (num_rows, len(logits))), s)
    return np.bincount(tokens, minlength=len(logits))


@pytest.mark.parametrize("parameters", [p for p in PARAMETERS if p.temperature])
@pytest.mark.parametrize("varied", ["seed", "position"])
def test_draws_follow_the_filtered_distribution(parameters, varied):
    logits = random_logits(1, 24, seed=3, scale=1.5)[0]
    many, one = np.arange(40000), np.full(40000, 1234)
    seeds, positions = (many, one) if varied == "seed" else (one, many)
    counts = draw_counts(logits, parameters, seeds, positions)
    kept = kept_tokens(logits, parameters)
    assert counts[~kept].sum() == 0
    p = np.exp(logits[kept].astype(np.float64) / parameters.temperature)
    if kept.sum() > 1:
        assert chi_square_p_value(counts[kept], p / p.sum()) > 1e-3


def test_rare_tokens_come_as_often_as_they_should():
    logits = np.zeros(16, np.float32)
    logits[1:] = np.log(1e-5)  # fifteen tokens that hold 1.5e-4 together
    counts = draw_counts(logits, SamplingParams(), np.arange(2**20), np.zeros(2**20))
    expected = 2**20 * 1.5e-4 / (1 + 1.5e-4)
    assert abs(counts[1:].sum() - expected) < 4 * np.sqrt(expected)


def test_neighbouring_positions_and_seeds_are_independent():
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    shares = np.exp(logits.astype(np.float64))
    s = fill([(SamplingParams(), r // 100, r % 100) for r in range(40000)], 40000)
    tokens = np.asarray(jit_sample(np.broadcast_to(logits, (40000, 4)), s)).reshape(400, 100)
    for first, second in ((tokens[:, :-1], tokens[:, 1:]), (tokens[:-1], tokens[1:])):
        pairs = np.bincount((first * 4 + second).ravel(), minlength=16)
        assert chi_square_p_value(pairs, np.outer(shares, shares).ravel()) > 1e-3


def test_random_bits_are_those_of_jax_random():
    key = jax.random.wrap_key_data(jnp.array([7, 2**31 + 9], jnp.uint32), impl="threefry2x32")
    with jax.threefry_partitionable(True):
        expected = jax.random.bits(key, (1000,))
    bits = _threefry(jnp.uint32(7), jnp.uint32(2**31 + 9), jnp.arange(1000, dtype=jnp.uint32))
    np.testing.assert_array_equal(bits, expected)


def test_exponentials_are_finite_and_precise_near_zero():
    bits = jnp.array([0, 1, 2, 2**16, 2**31, 2**32 - 2, 2**32 - 1], jnp.uint32)
    drawn = np.asarray(_exponential(bits))
    expected = -np.log1p(-(np.asarray(bits, np.int64) // 2 + 0.5) / 2**31)
    assert np.all((drawn > 0) & (drawn < 17))
    np.testing.assert_allclose(drawn[:5], expected[:5], rtol=1e-6)


# ---- the same whatever is beside it ---------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [1000, 1021])
@pytest.mark.parametrize("num_rows", [8, 16, 64])
def test_token_does_not_depend_on_the_batch(num_rows, num_tokens):
    logits = random_logits(8, num_tokens)
    rows = [(p, 40 + i, i) for i, p in enumerate(PARAMETERS)]
    alone = [
        int(jit_sample(logits[i : i + 1], fill(row, 1))[0])
        for i, row in enumerate([r] for r in rows)
    ]
    place = np.random.default_rng(num_rows).permutation(num_rows)[:8]
    batch = random_logits(num_rows, num_tokens, seed=1)
    batch[place] = logits
    mixed = [(SamplingParams(top_k=3, top_p=0.9), r, r) for r in range(num_rows)]
    for i, row in zip(place, rows, strict=True):
        mixed[i] = row
    assert jit_sample(batch, fill(mixed, num_rows))[place].tolist() == alone


def test_token_does_not_depend_on_the_padding_of_the_vocabulary():
    logits = random_logits(8, 1000)
    padded = np.pad(logits, ((0, 0), (0, 24)), constant_values=-np.inf)
    for position in range(20):
        s = fill([(p, 5, position) for p in PARAMETERS], 8)
        np.testing.assert_array_equal(jit_sample(logits, s), jit_sample(padded, s))


@pytest.mark.parametrize("mesh_shape", [(1, 8), (2, 4)])
def test_token_does_not_depend_on_the_sharding_of_the_vocabulary(mesh_shape):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(mesh_shape), ("data", "tensor"))
    logits = random_logits(8, 4096, seed=2)
    logits[0, [700, 3000]] = 50.0  # a greedy tie between shards
    logits[2] = np.round(logits[2])
    logits[:, 4000:] = -np.inf
    sharded = jax.device_put(logits, NamedSharding(mesh, PartitionSpec("data", "tensor")))
    for position in range(5):
        s = fill([(p, 9, position) for p in PARAMETERS], 8)
        replicated = jax.device_put(s, NamedSharding(mesh, PartitionSpec()))
        np.testing.assert_array_equal(jit_sample(sharded, replicated), jit_sample(logits, s))


# ---- packing --------------------------------------------------------------------------------


def test_unpacked_columns_are_the_filled_ones():
    rows = [
        (SamplingParams(temperature=0.7, top_p=0.9, min_p=0.05, top_k=40), 2**32 - 1, 17),
        (SamplingParams(temperature=0.0, top_k=-1), 2**40 + 3, 2**31 - 1),
        (SamplingParams(), -1, 0),
    ]
    packed = np.full((NUM_COLUMNS, 5), -7, np.int32)
    pack_into(packed, rows)
    columns, filled = jax.jit(unpack)(packed), fill(rows, 5)
    for name, dtype, values in [
        ("temperature", np.float32, [0.7, 0, 1, 0, 0]),
        ("top_p", np.float32, [0.9, 1, 1, 1, 1]),
        ("min_p", np.float32, [0.05, 0, 0, 0, 0]),
        ("top_k", np.int32, [40, -1, 0, 0, 0]),
        ("seed", np.uint32, [2**32 - 1, 3, 2**32 - 1, 0, 0]),
        ("position", np.int32, [17, 2**31 - 1, 0, 0, 0]),
    ]:
        for column in (getattr(columns, name), getattr(filled, name)):
            assert column.dtype == dtype
            np.testing.assert_array_equal(column, np.array(values, dtype), err_msg=name)


def test_packing_writes_into_a_part_of_a_larger_buffer():
    whole = np.full((3 + NUM_COLUMNS, 10), -7, np.int32)
    rows = [(p, r, r) for r, p in enumerate(PARAMETERS)]
    pack_into(whole[3:, 1:9], rows)
    expected = np.empty((NUM_COLUMNS, 8), np.int32)
    pack_into(expected, rows)
    np.testing.assert_array_equal(whole[3:, 1:9], expected)
    assert np.all(whole[:3] == -7)
    assert np.all(whole[:, [0, 9]] == -7)


def test_no_rows_give_greedy_padding():
    assert jit_sample(random_logits(4, 16), fill([], 4)).shape == (4,)
