"""Sample one token per row from logits; pure functions, traced inside the jitted step.

A row's filters apply in the order temperature, top-k, top-p, min-p (that of HF transformers and
SGLang; vLLM applies min-p before the other two):

- top-k keeps the k largest logits and whatever equals the k-th;
- top-p keeps the most probable tokens until their mass, renormalised over what top-k kept,
  reaches top_p. The token that crosses is kept, and so is every token as probable as that one;
- min-p keeps the tokens at least min_p times as probable as the most probable one.

So equal logits share their fate, and token ids or the stability of a sort never decide.

No filter sorts. Top-k and top-p come down to "keep the keys >= t", and t is found exactly by
fixing the 32 bits of an integer key one after the other, each by one pass that adds up masses.
Measured on f32[8, 49152] with two cores of a server CPU (AMD EPYC): top-k 2.1 ms and top-p 2.3 ms,
against 72 ms for `jnp.sort`; fixing two or four bits a pass took 2.6 and 6.5 ms. `lax.top_k` is
faster (0.7 ms at 64) but needs a bound on k that is known when compiling, and top-p has none.

The draw is a race of exponentials (Gumbel-max without one of its logarithms). Its randomness is
Threefry of (seed, position) over the token id alone, and top-p adds up masses as integers, so
that a row's token depends on its logits and parameters, not on the other rows, the bucket, the
padding of the vocabulary or its sharding. `exp` and `log1p` may differ in the last bit
between platforms: across those, a row can differ only where two candidates all but tie.

All arithmetic is in float32 and int32.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.sampling.arrays import SamplingArrays

__all__ = ["filter_weights", "sample"]

_LOWEST_KEY = -(2**31)


def sample(logits: jax.Array, s: SamplingArrays) -> jax.Array:
    """Choose a token for each row.

    logits: f32[R, V], possibly sharded over V; -inf marks tokens that must not be chosen, such as
      the padding of the vocabulary. A row with NaN or without any finite logit gets some token.
    s: columns of length R; rows of temperature 0 take the largest logit, the first of equals.

    Returns i32[R]. At run time the random draw is skipped when all rows are greedy, and top-k and
    top-p each when no row uses it.
    """
    greedy = _argmax(logits)
    is_random = s.temperature > 0
    return lax.cond(
        jnp.any(is_random),
        lambda: jnp.where(is_random, _draw(logits, s), greedy),
        lambda: greedy,
    )


def _draw(logits: jax.Array, s: SamplingArrays) -> jax.Array:
    """Draw a token for each row, as if none were greedy: i32[R]."""
    token = lax.broadcasted_iota(jnp.uint32, logits.shape, 1)
    position = lax.bitcast_convert_type(s.position, jnp.uint32)
    bits = _threefry(s.seed[:, None], position[:, None], token)
    return _argmax(filter_weights(logits, s) / _exponential(bits))


def filter_weights(logits: jax.Array, s: SamplingArrays) -> jax.Array:
    """Weigh the tokens of each row for the draw: f32[R, V], 0 for those that a filter drops.

    Divided by their sum they are probabilities; as they are, the largest of a row is 1. Rows of
    temperature 0 are not filtered.
    """
    num_tokens = logits.shape[1]
    is_random = s.temperature > 0
    temperature = jnp.where(is_random, s.temperature, 1.0)[:, None]
    largest = jnp.max(logits, axis=1, keepdims=True)
    weights = jnp.exp((logits - largest) / temperature)

    uses_top_k = is_random & (s.top_k > 0) & (s.top_k < num_tokens)
    k = jnp.where(uses_top_k, s.top_k, num_tokens)
    weights = lax.cond(
        jnp.any(uses_top_k), lambda w: _keep_top_k(logits, w, k), lambda w: w, weights
    )
    uses_top_p = is_random & (s.top_p < 1)
    weights = lax.cond(
        jnp.any(uses_top_p),
        lambda w: jnp.where(uses_top_p[:, None], _keep_top_p(logits, w, s.top_p), w),
        lambda w: w,
        weights,
    )
    min_weight = jnp.where(is_random, s.min_p, 0.0)[:, None]
    return jnp.where(weights >= min_weight, weights, 0.0)


def _keep_top_k(logits: jax.Array, weights: jax.Array, k: jax.Array) -> jax.Array:
    """Zero the weights [R, V] of all but the k[R] >= 1 largest logits (more where they tie)."""
    keys = _ordered_keys(logits)
    return jnp.where(keys >= _threshold(keys, 1, k)[:, None], weights, 0.0)


def _keep_top_p(logits: jax.Array, weights: jax.Array, top_p: jax.Array) -> jax.Array:
    """Zero the weights [R, V] below the largest ones that hold a share top_p[R] < 1 of the sum."""
    # Masses are integers because those add up to the same sum in any order. Scaled by a power of
    # two their sum lies in [2**30, 2**31), up to rounding, which cannot reach 2**32.
    total_bits = lax.bitcast_convert_type(jnp.sum(weights, axis=1), jnp.int32)
    exponent = (total_bits >> 23) - 127
    scale = lax.bitcast_convert_type((127 + 30 - exponent) << 23, jnp.float32)
    masses = jnp.rint(weights * scale[:, None]).astype(jnp.int32).astype(jnp.uint32)
    total = jnp.sum(masses, axis=1, dtype=jnp.uint32)
    wanted = jnp.ceil(top_p * total.astype(jnp.float32)).astype(jnp.uint32)
    keys = _ordered_keys(logits)
    threshold = _threshold(keys, masses, jnp.clip(wanted, 1, total))
    return jnp.where(keys >= threshold[:, None], weights, 0.0)


def _threshold(keys: jax.Array, masses: jax.Array | int, wanted: jax.Array) -> jax.Array:
    """Find the largest t for which the masses of the keys >= t add up to at least `wanted`.

    keys: i32[R, V]. masses: u32[R, V], or one number for all keys. wanted: [R], at least 1 and at
    most the sum of the row's masses. Returns i32[R], each one of its row's keys.
    """

    def fix_bit(i: jax.Array, threshold: jax.Array) -> jax.Array:
        # Adding 2**31 to the lowest key wraps to 0, so the sign needs no case of its own.
        candidate = threshold + lax.shift_left(jnp.int32(1), 31 - i)
        reached = jnp.sum(
            jnp.where(keys >= candidate[:, None], masses, 0), axis=1, dtype=wanted.dtype
        )
        return jnp.where(reached >= wanted, candidate, threshold)

    return lax.fori_loop(0, 32, fix_bit, jnp.full(keys.shape[:1], _LOWEST_KEY, jnp.int32))


def _ordered_keys(x: jax.Array) -> jax.Array:
    """Map f32 to i32 such that keys compare as the numbers do, -0 equal to 0 included."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    keys = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return jnp.where(keys == -1, 0, keys)  # -1 is the key of -0


def _argmax(x: jax.Array) -> jax.Array:
    """Index of the first largest element of each row of [R, V]; V - 1 in a row with NaN.

    Two plain reductions run several times faster on CPU than the paired one of `jnp.argmax`.
    """
    last = x.shape[1] - 1
    index = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.min(jnp.where(x == jnp.max(x, axis=1, keepdims=True), index, last), axis=1)


def _exponential(bits: jax.Array) -> jax.Array:
    """Turn random u32 into standard exponentials, f32 in (2**-33, 17).

    Precise where a race is decided, near 0: an unlikely token wins only by a tiny time.
    """
    uniform = ((bits >> 1).astype(jnp.int32).astype(jnp.float32) + 0.5) * 2.0**-31
    return -jnp.log1p(-jnp.minimum(uniform, 1 - 2.0**-24))


def _threefry(key0: jax.Array, key1: jax.Array, counter: jax.Array) -> jax.Array:
    """Threefry-2x32 with 20 rounds of the counter (0, counter), its two words folded into one.

    These are the bits that `jax.random.bits` makes from the key (key0, key1), written out because
    its values may depend on JAX's flags and version, and because this fuses with its use.
    """
    keys = (key0, key1, key0 ^ key1 ^ jnp.uint32(0x1BD11BDA))
    x0, x1 = jnp.broadcast_to(key0, counter.shape), counter + key1
    for group in range(5):
        for distance in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x0 = x0 + x1
            x1 = ((x1 << distance) | (x1 >> (32 - distance))) ^ x0
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x0 ^ x1
