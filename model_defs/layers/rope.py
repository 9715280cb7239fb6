"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and its length extensions.

Angles in float32; the rotation in float32, the result in the input's dtype. Frequencies are rounded
to float32 where the reference rounds them: at position 1000 a last bit of the frequency is 1e-4
radians, which is more than all other rounding errors of a layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from model_defs.hf_config import HFConfig, UnsupportedConfig
from model_defs.interface import ForwardBatch


class Scaling(Protocol):
    """Inverse frequencies from the unscaled rope's periods; `magnitude` multiplies cos and sin."""

    @property
    def magnitude(self) -> float: ...

    def inverse_frequencies(self, periods: np.ndarray) -> np.ndarray: ...


class LengthScaling(Protocol):
    """A scaling that depends on the length of the request: one set of frequencies a token."""

    def of_tokens(
        self, periods: np.ndarray, batch: ForwardBatch
    ) -> tuple[Float[Array, "T d"], Float[Array, "T 1"] | float]:
        """Inverse frequencies and magnitude of every token."""
        ...


def running_length(batch: ForwardBatch) -> Int[Array, " T"]:
    """Length of the whole request when a token is computed.

    The prompt's for prompt tokens, the running length for generated ones; keys keep what they were
    written with, as in the reference implementations with a KV cache.
    """
    return jnp.maximum(batch.prompt_lens, batch.positions + 1)


@dataclass(frozen=True)
class Linear:
    """Positions divided by `factor` (Chen et al. 2023, arXiv:2306.15595)."""

    factor: float
    magnitude: float = 1.0

    def inverse_frequencies(self, periods: np.ndarray) -> np.ndarray:
        return 1.0 / periods / self.factor


@dataclass(frozen=True)
class Llama3:
    """Long wavelengths slowed by `factor`, short ones kept, a ramp between (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int
    magnitude: float = 1.0

    def inverse_frequencies(self, periods: np.ndarray) -> np.ndarray:
        base = 1.0 / periods
        turns = self.original_length / (2 * math.pi / base)  # rotations within the first length
        ramp = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        keep = np.clip(ramp, 0.0, 1.0)
        return (1 - keep) * base / self.factor + keep * base


@dataclass(frozen=True)
class Yarn:
    """Long wavelengths interpolated, short ones kept, a ramp between (arXiv:2309.00071).

    The ramp runs between the dimensions that turn `beta_fast` and `beta_slow` times within the
    original length.
    """

    factor: float
    original_length: int
    theta: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    magnitude: float = 1.0
    truncate: bool = True

    def inverse_frequencies(self, periods: np.ndarray) -> np.ndarray:
        dim = 2 * len(periods)

        def dimension(turns: float) -> float:
            length = self.original_length / (turns * 2 * math.pi)
            return dim * math.log(length) / (2 * math.log(self.theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        places = np.arange(dim // 2, dtype=periods.dtype)
        ramp = np.clip((places - low) / max(high - low, 0.001), 0, 1).astype(periods.dtype)
        return ramp / (self.factor * periods) + (1 - ramp) / periods


def yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    """`0.1 mscale ln(factor) + 1` (arXiv:2309.00071, section 3.4)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclass(frozen=True)
class LongRope:
    """Per-frequency factors, one set up to the original length and one beyond (arXiv:2402.13753).

    The set is chosen by the running length of the request. `long_magnitude` is that of the second
    set where it differs.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_length: int
    magnitude: float
    long_magnitude: float | None = None

    def inverse_frequencies(self, periods: np.ndarray) -> np.ndarray:
        return 1.0 / (np.asarray(self.short, periods.dtype) * periods)

    def long_inverse_frequencies(self, periods: np.ndarray) -> np.ndarray:
        return 1.0 / (np.asarray(self.long, periods.dtype) * periods)

    def of_tokens(self, periods: np.ndarray, batch: ForwardBatch):
        short = jnp.asarray(self.inverse_frequencies(periods), jnp.float32)
        long = jnp.asarray(self.long_inverse_frequencies(periods), jnp.float32)
        beyond = (running_length(batch) > self.original_length)[:, None]
        freqs = jnp.where(beyond, long, short)
        if self.long_magnitude is None:
            return freqs, self.magnitude
        return freqs, jnp.where(beyond, self.long_magnitude, self.magnitude)


@dataclass(frozen=True)
class DynamicNTK:
    """The base grows with the request beyond the original length ("dynamic" on the hub).

    `base' = base * (factor * L / M - (factor - 1)) ** (d / (d - 2))` for a running length L > M.
    """

    factor: float
    original_length: int

    def of_tokens(self, periods: np.ndarray, batch: ForwardBatch):
        ratio = running_length(batch).astype(jnp.float32) / self.original_length
        return _with_larger_base(periods, self.factor * ratio - (self.factor - 1)), 1.0


@dataclass(frozen=True)
class PromptNTK:
    """The base grows in steps with the prompt's length L (Qwen 1's own code).

    `base' = base * alpha ** (d / (d - 2))` with `alpha = 2 ** ceil(log2(L / M) + 1) - 1`, at
    least 1; generated tokens keep what the prompt gave.
    """

    original_length: int

    def of_tokens(self, periods: np.ndarray, batch: ForwardBatch):
        # The power of two in integers: ceil(log2(x)) is exact at the powers themselves.
        parts = -(-jnp.maximum(batch.prompt_lens, 1) // self.original_length)
        doublings = 32 - jax.lax.clz(jnp.maximum(parts - 1, 0))
        alpha = jnp.left_shift(2, doublings) - 1
        return _with_larger_base(periods, alpha.astype(jnp.float32)), 1.0


def _with_larger_base(periods: np.ndarray, alpha: Float[Array, " T"]) -> Float[Array, "T d"]:
    """Inverse frequencies for a base multiplied by `max(alpha, 1) ** (d / (d - 2))`."""
    pairs = len(periods)
    exponents = jnp.asarray(np.arange(pairs) / (pairs - 1), jnp.float32)  # 2i / (d - 2)
    shrink = jnp.exp(-jnp.log(jnp.maximum(alpha, 1.0))[:, None] * exponents)
    return shrink * jnp.asarray(1.0 / periods, jnp.float32)


@dataclass(frozen=True)
class Rope:
    """Rotate the first `dim` dimensions of each head.

    Pairs are halves `(i, i + dim/2)`, or neighbours `(2i, 2i + 1)` where `interleaved`.
    """

    theta: float
    dim: int
    scaling: Linear | Llama3 | Yarn | LongRope | DynamicNTK | PromptNTK | None = None
    interleaved: bool = False

    @property
    def grows(self) -> bool:
        """Whether the rope stretches with the request, to any length."""
        return isinstance(self.scaling, DynamicNTK | PromptNTK)

    @property
    def periods(self) -> np.ndarray:
        """`f32[dim/2]`: positions per radian of each pair, without scaling."""
        exponents = np.arange(0, self.dim, 2, dtype=np.float32) / self.dim
        return (self.theta ** exponents.astype(np.float64)).astype(np.float32)

    def tables(self, batch: ForwardBatch) -> tuple[Float[Array, "T d"], Float[Array, "T d"]]:
        """cos and sin of every token, `f32[T, dim/2]`; equal ropes share them (XLA merges them)."""
        periods, scaling = self.periods, self.scaling
        freqs: Any
        magnitude: Any = 1.0
        if scaling is None:
            freqs = jnp.asarray(1.0 / periods, jnp.float32)
        elif isinstance(scaling, LongRope | DynamicNTK | PromptNTK):
            freqs, magnitude = scaling.of_tokens(periods, batch)
        else:
            freqs = jnp.asarray(scaling.inverse_frequencies(periods), jnp.float32)
            magnitude = scaling.magnitude
        angles = batch.positions.astype(jnp.float32)[:, None] * freqs
        return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude

    def rotate(
        self, x: Float[Array, "T N H"], tables: tuple[Float[Array, "T d"], Float[Array, "T d"]]
    ) -> Float[Array, "T N H"]:
        cos, sin = (t[:, None, :] for t in tables)
        half = self.dim // 2
        rotary = x[..., : self.dim].astype(jnp.float32)
        if self.interleaved:
            a, b = rotary[..., 0::2], rotary[..., 1::2]
            pairs = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
            rotated = pairs.reshape(rotary.shape).astype(x.dtype)
        else:
            a, b = rotary[..., :half], rotary[..., half:]
            rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
            rotated = rotated.astype(x.dtype)
        if self.dim == x.shape[-1]:
            return rotated
        return jnp.concatenate([rotated, x[..., self.dim :]], axis=-1)


def _scaling(cfg: HFConfig, kind: str, read: HFConfig, dim: int, theta: float) -> Any:
    """Build the scaling named `kind` from the keys of `read`."""
    if kind == "linear":
        return Linear(read["factor"])
    if kind == "dynamic":
        return DynamicNTK(read["factor"], cfg["max_position_embeddings"])
    if kind == "llama3":
        return Llama3(
            read["factor"],
            read["low_freq_factor"],
            read["high_freq_factor"],
            read["original_max_position_embeddings"],
        )
    if kind == "yarn":
        return _yarn(cfg, read, theta)
    if kind in ("longrope", "su"):
        return _longrope(cfg, read, dim)
    raise UnsupportedConfig(
        f"{cfg.architecture}: rope scaling {kind!r} is not implemented; implemented: default, "
        f"linear, dynamic, llama3, yarn, longrope."
    )


def _yarn(cfg: HFConfig, read: HFConfig, theta: float) -> Yarn:
    factor, magnitude = read["factor"], read.get("attention_factor")
    part, whole = read.get("mscale"), read.get("mscale_all_dim")
    if magnitude is None and part and whole:
        magnitude = yarn_magnitude(factor, part) / yarn_magnitude(factor, whole)
    return Yarn(
        factor,
        read.get("original_max_position_embeddings") or cfg["max_position_embeddings"],
        theta,
        read.get("beta_fast", 32.0),
        read.get("beta_slow", 1.0),
        yarn_magnitude(factor) if magnitude is None else magnitude,
        read.get("truncate", True),
    )


def _longrope(cfg: HFConfig, read: HFConfig, dim: int) -> LongRope:
    longest = cfg["max_position_embeddings"]
    original = read.get(
        "original_max_position_embeddings", cfg.get("original_max_position_embeddings", longest)
    )
    ratio = read.get("factor", longest / original)
    magnitude = read.get(
        "attention_factor",
        math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0,
    )
    short, long = tuple(read["short_factor"]), tuple(read["long_factor"])
    if len(short) != dim // 2 or len(long) != dim // 2:
        raise UnsupportedConfig(
            f"{cfg.architecture}: longrope has {len(short)} short and {len(long)} long factors,"
            f" the rotary dimension {dim} needs {dim // 2}. Correct the checkpoint's config."
        )
    return LongRope(
        short,
        long,
        original,
        read.get("short_mscale", magnitude),
        read.get("long_mscale"),
    )


def rope_from_hf(
    cfg: HFConfig,
    head_dim: int,
    *,
    theta: float = 10000.0,
    section: str | None = None,
    interleaved: bool = False,
    fraction: float = 1.0,
) -> Rope:
    """Read a rope from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`.

    Args:
        head_dim: of a query head; multiplied by `partial_rotary_factor` where given.
        theta: the default base.
        section: key of `rope_parameters` to read where it holds one entry per layer kind; the
            config's own `rope_theta`, which names no kind, is then left to the caller.
        interleaved: the family rotates neighbours.
        fraction: the default of `partial_rotary_factor`.
    """
    modern = cfg.raw.get("rope_parameters") is not None
    params = cfg.sub("rope_parameters" if modern else "rope_scaling", default=_empty(cfg))
    if section and modern:
        params = params.sub(section)
    else:
        theta = cfg.get("rope_theta", theta)
    theta = params.get("rope_theta", theta)
    fraction = params.get("partial_rotary_factor", cfg.get("partial_rotary_factor", fraction))
    dim = int(head_dim * fraction)
    kind = params.get("rope_type", params.get("type", "default"))
    scaling = None if kind == "default" else _scaling(cfg, kind, params, dim, theta)
    return Rope(theta, dim, scaling, interleaved)


def _empty(cfg: HFConfig) -> HFConfig:
    return HFConfig({}, cfg.architecture)
