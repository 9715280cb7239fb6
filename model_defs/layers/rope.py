"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and its length extensions.

Angles in float32; the rotation in float32, the result in the input's dtype. Frequencies are rounded
to float32 where the reference rounds them: at position 1000 a last bit of the frequency is 1e-4
radians, which is more than all other rounding errors of a layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from model_defs.hf_config import HFConfig, UnsupportedConfig
from model_defs.interface import ForwardBatch


class Scaling(Protocol):
    """Inverse frequencies from the unscaled rope's periods; `magnitude` multiplies cos and sin."""

    @property
    def magnitude(self) -> float: ...

    def inverse_frequencies(self, periods: np.ndarray) -> np.ndarray: ...


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
class LongRope:
    """Per-frequency factors, one set up to the original length and one beyond (arXiv:2402.13753).

    The set is chosen by the length of the whole request when a token is computed: the prompt's
    for prompt tokens, the running length for generated ones. Keys keep the set they were
    written with, as in the reference implementation with a KV cache.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_length: int
    magnitude: float

    def inverse_frequencies(self, periods: np.ndarray) -> np.ndarray:
        return 1.0 / (np.asarray(self.short, periods.dtype) * periods)

    def long_inverse_frequencies(self, periods: np.ndarray) -> np.ndarray:
        return 1.0 / (np.asarray(self.long, periods.dtype) * periods)


@dataclass(frozen=True)
class Rope:
    """Rotate the first `dim` dimensions of each head, in halves `(i, i + dim/2)`."""

    theta: float
    dim: int
    scaling: Linear | Llama3 | LongRope | None = None

    @property
    def periods(self) -> np.ndarray:
        """`f32[dim/2]`: positions per radian of each pair, without scaling."""
        exponents = np.arange(0, self.dim, 2, dtype=np.float32) / self.dim
        return (self.theta ** exponents.astype(np.float64)).astype(np.float32)

    def angles(self, batch: ForwardBatch) -> Float[Array, "T dim/2"]:
        periods = self.periods
        if self.scaling is None:
            freqs: Any = jnp.asarray(1.0 / periods, jnp.float32)
        else:
            freqs = jnp.asarray(self.scaling.inverse_frequencies(periods), jnp.float32)
        if isinstance(self.scaling, LongRope):
            length = jnp.maximum(batch.prompt_lens, batch.positions + 1)
            long = jnp.asarray(self.scaling.long_inverse_frequencies(periods), jnp.float32)
            freqs = jnp.where((length > self.scaling.original_length)[:, None], long, freqs)
        return batch.positions.astype(jnp.float32)[:, None] * freqs

    def tables(self, batch: ForwardBatch) -> tuple[Float[Array, "T d"], Float[Array, "T d"]]:
        """cos and sin of every token, `f32[T, dim/2]`; equal ropes share them (XLA merges them)."""
        angles = self.angles(batch)
        magnitude = self.scaling.magnitude if self.scaling else 1.0
        return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude

    def rotate(
        self, x: Float[Array, "T N H"], tables: tuple[Float[Array, "T d"], Float[Array, "T d"]]
    ) -> Float[Array, "T N H"]:
        cos, sin = (t[:, None, :] for t in tables)
        half = self.dim // 2
        rotary = x[..., : self.dim].astype(jnp.float32)
        a, b = rotary[..., :half], rotary[..., half:]
        rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
        if self.dim == x.shape[-1]:
            return rotated
        return jnp.concatenate([rotated, x[..., self.dim :]], axis=-1)


def _scaling(cfg: HFConfig, kind: str, read: HFConfig, dim: int) -> Any:
    """Build the scaling named `kind` from the keys of `read`."""
    longest = cfg["max_position_embeddings"]
    if kind == "linear":
        return Linear(read["factor"])
    if kind == "llama3":
        return Llama3(
            read["factor"],
            read["low_freq_factor"],
            read["high_freq_factor"],
            read["original_max_position_embeddings"],
        )
    if kind in ("longrope", "su"):
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
        return LongRope(short, long, original, magnitude)
    raise UnsupportedConfig(
        f"{cfg.architecture}: rope scaling {kind!r} is not implemented; implemented: default, "
        f"linear, llama3, longrope."
    )


def rope_from_hf(
    cfg: HFConfig, head_dim: int, *, theta: float = 10000.0, section: str | None = None
) -> Rope:
    """Read a rope from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`.

    Args:
        head_dim: of a query head; multiplied by `partial_rotary_factor` where given.
        theta: the default base.
        section: key of `rope_parameters` to read where it holds one entry per layer kind; the
            config's own `rope_theta`, which names no kind, is then left to the caller.
    """
    modern = cfg.raw.get("rope_parameters") is not None
    params = cfg.sub("rope_parameters" if modern else "rope_scaling", default=_empty(cfg))
    if section and modern:
        params = params.sub(section)
    else:
        theta = cfg.get("rope_theta", theta)
    theta = params.get("rope_theta", theta)
    fraction = params.get("partial_rotary_factor", cfg.get("partial_rotary_factor", 1.0))
    dim = int(head_dim * fraction)
    kind = params.get("rope_type", params.get("type", "default"))
    return Rope(theta, dim, None if kind == "default" else _scaling(cfg, kind, params, dim))


def _empty(cfg: HFConfig) -> HFConfig:
    return HFConfig({}, cfg.architecture)
