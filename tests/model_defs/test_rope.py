"""Rotary embeddings against their formulas, and how they are read from a config."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from model_defs.hf_config import HFConfig, UnsupportedConfig
from model_defs.interface import AttentionMetadata, ForwardBatch
from model_defs.layers.rope import (
    Linear,
    Llama3,
    LongRope,
    PromptNTK,
    Rope,
    rope_from_hf,
)


def batch(positions: list[int], prompt_len: int = 1) -> ForwardBatch:
    where = jnp.asarray(positions, jnp.int32)
    none = jnp.zeros(1, jnp.int32)
    attention = AttentionMetadata(
        none, none[None], jnp.zeros(2, jnp.int32), jnp.zeros(3, jnp.int32)
    )
    return ForwardBatch(where, where, jnp.full_like(where, prompt_len), attention, none)


def rotate(rope: Rope, x: np.ndarray, positions: list[int], prompt_len: int = 1) -> np.ndarray:
    tables = rope.tables(batch(positions, prompt_len))
    return np.asarray(rope.rotate(jnp.asarray(x), tables))


def formula(x: np.ndarray, positions: list[int], freqs: np.ndarray, scale: float = 1.0):
    """Each pair (i, i + d/2) is a complex number, turned by position * frequency."""
    half = len(freqs)
    turn = scale * np.exp(1j * np.asarray(positions)[:, None] * freqs)[:, None]
    turned = (x[..., :half] + 1j * x[..., half : 2 * half]) * turn
    return np.concatenate([turned.real, turned.imag, x[..., 2 * half :]], -1)


def heads(num: int, head_dim: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(num, 3, head_dim)).astype(np.float32)


POSITIONS = [0, 1, 7, 100]
BASE = 10000.0 ** -(np.arange(0, 16, 2) / 16)


def test_rope_turns_each_pair_by_position_times_frequency() -> None:
    x = heads(4, 16)
    np.testing.assert_allclose(
        rotate(Rope(10000.0, 16), x, POSITIONS), formula(x, POSITIONS, BASE), atol=2e-5
    )


@pytest.mark.parametrize(("theta", "dim"), [(1e4, 128), (1e6, 256), (5e5, 128), (1e4, 96)])
def test_frequencies_are_rounded_like_the_reference(theta: float, dim: int) -> None:
    reference = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    ours = 1.0 / Rope(theta, dim).periods
    assert ours.dtype == np.float32
    # All but the rare frequencies whose power torch rounds wrongly are the same to the last bit.
    assert (ours == reference.numpy()).mean() > 0.95
    np.testing.assert_allclose(1000 * ours, 1000 * reference.numpy(), rtol=0, atol=2e-6)


def test_partial_rope_leaves_the_rest_alone() -> None:
    x = heads(4, 24)
    out = rotate(Rope(10000.0, 16), x, POSITIONS)
    np.testing.assert_allclose(out, formula(x, POSITIONS, BASE), atol=2e-5)
    np.testing.assert_array_equal(out[..., 16:], x[..., 16:])


def test_scores_depend_on_the_distance_only() -> None:
    rope = Rope(500.0, 16)
    q, k = heads(1, 16), heads(2, 16)[1:]
    scores = [(rotate(rope, q, [p + 5]) * rotate(rope, k, [p])).sum(-1) for p in (0, 3, 50)]
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-4)
    np.testing.assert_allclose(scores[2], scores[0], atol=1e-4)


def test_rotation_is_in_float32_and_the_result_in_the_input_dtype() -> None:
    x = jnp.asarray(heads(1, 16), jnp.bfloat16)
    rope = Rope(10000.0, 16)
    out = rope.rotate(x, rope.tables(batch([1000])))
    exact = formula(np.asarray(x, np.float32), [1000], BASE)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), exact, atol=0.02, rtol=0.01)


def test_linear_scaling_divides_positions() -> None:
    x = heads(4, 16)
    scaled = rotate(Rope(10000.0, 16, Linear(4.0)), x, [4 * p for p in POSITIONS])
    np.testing.assert_allclose(scaled, rotate(Rope(10000.0, 16), x, POSITIONS), atol=2e-5)


def test_llama3_scaling_by_wavelength() -> None:
    scaling = Llama3(8.0, 1.0, 4.0, 64)
    freqs = scaling.inverse_frequencies(1 / BASE)
    for before, after in zip(BASE, freqs, strict=True):
        wavelength = 2 * math.pi / before
        if wavelength < 64 / 4:
            assert after == pytest.approx(before, rel=1e-12)
        elif wavelength > 64 / 1:
            assert after == pytest.approx(before / 8)
        else:
            smooth = (64 / wavelength - 1) / (4 - 1)
            assert after == pytest.approx((1 - smooth) * before / 8 + smooth * before)
    assert len({round(b / a, 6) for b, a in zip(BASE, freqs, strict=True)}) >= 3  # all three bands


LONG = LongRope((1.0,) * 8, (4.0,) * 8, original_length=32, magnitude=1.2)


@pytest.mark.parametrize(
    ("prompt_len", "position", "divisor"),
    [
        (32, 3, 1.0),  # a prompt that just fits
        (33, 3, 4.0),  # every token of a longer one
        (10, 31, 1.0),  # decoding up to the original length
        (10, 32, 4.0),  # and past it
    ],
)
def test_longrope_chooses_by_the_length_when_a_token_is_computed(
    prompt_len: int, position: int, divisor: float
) -> None:
    x = heads(1, 16)
    out = rotate(Rope(10000.0, 16, LONG), x, [position], prompt_len)
    np.testing.assert_allclose(out, formula(x, [position], BASE / divisor, 1.2), atol=2e-5)


def test_longrope_mixes_requests_in_one_step() -> None:
    rope = Rope(10000.0, 16, LONG)
    x = heads(2, 16)
    step = batch([5, 5])
    step = ForwardBatch(
        step.tokens, step.positions, jnp.array([8, 80]), step.attention, step.sample_at
    )
    out = np.asarray(rope.rotate(jnp.asarray(x), rope.tables(step)))
    np.testing.assert_allclose(out[:1], rotate(rope, x[:1], [5], 8), atol=1e-6)
    np.testing.assert_allclose(out[1:], rotate(rope, x[1:], [5], 80), atol=1e-6)


def test_interleaved_rope_turns_neighbours() -> None:
    x = heads(4, 20)
    # Neighbours, put into halves, are what plain rope turns.
    halves = np.concatenate([x[..., 0:16:2], x[..., 1:16:2], x[..., 16:]], -1)
    turned = formula(halves, POSITIONS, BASE)
    expected = np.concatenate(
        [np.stack([turned[..., :8], turned[..., 8:16]], -1).reshape(4, 3, 16), x[..., 16:]], -1
    )
    out = rotate(Rope(10000.0, 16, interleaved=True), x, POSITIONS)
    np.testing.assert_allclose(out, expected, atol=2e-5)


@pytest.mark.parametrize("prompt_len", [1, 4, 5, 8, 9, 16, 17, 33])
def test_prompt_ntk_grows_the_base_in_steps_with_the_prompt(prompt_len: int) -> None:
    x = heads(4, 16)
    out = rotate(Rope(10000.0, 16, PromptNTK(4)), x, POSITIONS, prompt_len)
    alpha = max(2 ** math.ceil(math.log2(prompt_len / 4) + 1) - 1, 1)
    freqs = (10000.0 * alpha ** (16 / 14)) ** -(np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(out, formula(x, POSITIONS, freqs), atol=3e-5)


@pytest.mark.parametrize(
    ("prompt_len", "position", "length"),
    [(10, 3, 16), (16, 15, 16), (40, 3, 40), (10, 29, 30)],  # the last is a generated token
)
def test_dynamic_scaling_grows_the_base_with_the_running_length(
    prompt_len: int, position: int, length: int
) -> None:
    rope = read(rope_scaling={"type": "dynamic", "factor": 2.0}, max_position_embeddings=16)
    x = heads(1, 16)
    base = 10000.0 * (2.0 * length / 16 - (2.0 - 1)) ** (16 / 14)
    freqs = base ** -(np.arange(0, 16, 2) / 16)
    out = rotate(rope, x, [position], prompt_len)
    np.testing.assert_allclose(out, formula(x, [position], freqs), atol=2e-5)


# ---- reading ---------------------------------------------------------------------------------


def read(head_dim: int = 16, **fields) -> Rope:
    cfg = HFConfig({"max_position_embeddings": 128, **fields}, "TestForCausalLM")
    rope = rope_from_hf(cfg, head_dim)
    cfg.check_all_read("family.py")
    return rope


def test_both_spellings_give_the_same_rope() -> None:
    fields = {"factor": 2.0}
    new = read(rope_parameters={"rope_type": "linear", "rope_theta": 5e5, **fields})
    assert new == read(rope_theta=5e5, rope_scaling={"type": "linear", **fields})
    assert new == read(rope_theta=5e5, rope_scaling={"rope_type": "linear", **fields})
    assert new == Rope(5e5, 16, Linear(2.0))


def test_plain_rope_is_the_default() -> None:
    assert read() == read(rope_scaling=None) == Rope(10000.0, 16)
    assert read(rope_scaling={"type": "default"}) == Rope(10000.0, 16)


def test_partial_factor_is_read_from_both_places() -> None:
    assert read(partial_rotary_factor=0.5).dim == 8
    assert read(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.25}).dim == 4


@pytest.mark.parametrize(
    "fields",
    [
        {"original_max_position_embeddings": 32},
        {"rope_scaling": {"original_max_position_embeddings": 32}},
        {"original_max_position_embeddings": 32, "rope_scaling": {"factor": 4.0}},
    ],
)
def test_longrope_magnitude_follows_from_the_lengths(fields: dict) -> None:
    scaling = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    scaling |= fields.pop("rope_scaling", {})
    rope = read(rope_scaling=scaling, **fields)
    assert rope.scaling.original_length == 32
    assert rope.scaling.magnitude == pytest.approx(math.sqrt(1 + math.log(4) / math.log(32)))


def test_longrope_with_too_few_factors_is_refused() -> None:
    scaling = {"type": "longrope", "short_factor": [1.0] * 7, "long_factor": [2.0] * 8}
    with pytest.raises(UnsupportedConfig, match=r"7 short and 8 long.*needs 8"):
        read(rope_scaling=scaling)


@pytest.mark.parametrize("kind", ["mrope", "spiral"])
def test_other_scalings_are_refused_by_name(kind: str) -> None:
    with pytest.raises(UnsupportedConfig, match=kind):
        read(rope_scaling={"type": kind, "factor": 2.0})


def test_unknown_keys_of_a_scaling_are_refused() -> None:
    with pytest.raises(UnsupportedConfig, match=r"rope_scaling\.beta"):
        read(rope_scaling={"type": "linear", "factor": 2.0, "beta": 1})
