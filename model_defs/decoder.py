"""The decoder: what a text model is (`DecoderSpec`), and the only layer loop of the project.

The residual stream is in the model's dtype; logits are float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from model_defs.hf_config import HFConfig
from model_defs.interface import Cache, Caches, CacheSpec, ForwardBatch
from model_defs.layers.attention import GQA
from model_defs.layers.embedding import Embedding, Head
from model_defs.layers.linear import BuildContext, Placed
from model_defs.layers.mlp import MLP
from model_defs.layers.norm import RMSNorm
from model_defs.sharding import DATA, Axis


@dataclass(frozen=True)
class Norms:
    """Norms around the two branches of a layer; None where there is none."""

    pre_mixer: RMSNorm | None = None
    post_mixer: RMSNorm | None = None
    pre_ffn: RMSNorm | None = None
    post_ffn: RMSNorm | None = None


def PreNorm(norm: RMSNorm) -> Norms:
    """A norm before each branch."""
    return Norms(pre_mixer=norm, pre_ffn=norm)


def SandwichNorm(norm: RMSNorm) -> Norms:
    """A norm before and after each branch."""
    return Norms(norm, norm, norm, norm)


@dataclass(frozen=True)
class Layer:
    """One layer: a token mixer and a feed-forward network, each added to the residual."""

    mixer: GQA
    ffn: MLP
    norms: Norms

    def build(self, ctx: BuildContext, embed: Axis) -> LayerModule:
        return LayerModule(self, ctx, embed)


@dataclass(frozen=True)
class DecoderSpec:
    """A text model, whole. There is no other model config between Hugging Face's and this.

    Attributes:
        embed_scale: factor of the embeddings, rounded to the model's dtype first.
        tied: the output head is the embedding table.
        logit_softcap: logits become `softcap * tanh(logits / softcap)`.
        max_length: positions the checkpoint was made for.
    """

    vocab: int
    d_model: int
    layers: tuple[Layer, ...]
    final_norm: RMSNorm
    max_length: int
    tied: bool = False
    embed_scale: float | None = None
    logit_softcap: float | None = None

    @classmethod
    def from_hf(
        cls,
        cfg: HFConfig,
        *,
        layers: Sequence[Layer],
        final_norm: RMSNorm,
        tied: bool = False,
        embed_scale: float | None = None,
        logit_softcap: float | None = None,
    ) -> DecoderSpec:
        """Read the sizes under their usual names; `tied` is the family's default."""
        return cls(
            vocab=cfg["vocab_size"],
            d_model=cfg["hidden_size"],
            layers=tuple(layers),
            final_norm=final_norm,
            max_length=cfg["max_position_embeddings"],
            tied=cfg.get("tie_word_embeddings", tied),
            embed_scale=embed_scale,
            logit_softcap=logit_softcap,
        )

    def build(self, ctx: BuildContext) -> Decoder:
        """The NNX module, with parameters that have shapes but no data."""
        return Decoder(self, ctx)


class LayerModule(nnx.Module):
    def __init__(self, spec: Layer, ctx: BuildContext, embed: Axis):
        def norm(name: str, norm: RMSNorm | None):
            return norm.build(ctx.at(name), embed) if norm else None

        self.pre_mixer_norm = norm("pre_mixer_norm", spec.norms.pre_mixer)
        self.post_mixer_norm = norm("post_mixer_norm", spec.norms.post_mixer)
        self.pre_ffn_norm = norm("pre_ffn_norm", spec.norms.pre_ffn)
        self.post_ffn_norm = norm("post_ffn_norm", spec.norms.post_ffn)
        self.mixer = spec.mixer.build(ctx.at("mixer"), embed)
        self.ffn = spec.ffn.build(ctx.at("ffn"), embed)

    def __call__(
        self, x: Float[Array, "T D"], batch: ForwardBatch, cache: Cache
    ) -> tuple[Float[Array, "T D"], Cache]:
        y, cache = self.mixer(_apply(self.pre_mixer_norm, x), batch, cache)
        x = x + _apply(self.post_mixer_norm, y)
        y = self.ffn(_apply(self.pre_ffn_norm, x))
        return x + _apply(self.post_ffn_norm, y), cache


def _apply(norm, x):
    return x if norm is None else norm(x)


class Decoder(nnx.Module):
    """Token ids in, hidden states out. Knows layers; knows no family."""

    def __init__(self, spec: DecoderSpec, ctx: BuildContext):
        vocab, embed = Axis("vocab", spec.vocab), Axis("embed", spec.d_model)
        inside = ctx.at("decoder")
        self.spec, self.rules = spec, ctx.rules
        self.embed = Embedding(inside.at("embed"), vocab, embed)
        self.layers = nnx.List(
            [layer.build(inside.at("layers", i), embed) for i, layer in enumerate(spec.layers)]
        )
        self.norm = spec.final_norm.build(inside.at("norm"), embed)
        self.head = None if spec.tied else Head(ctx, vocab, embed)

    def embed_tokens(self, batch: ForwardBatch) -> Float[Array, "T D"]:
        x = self.embed(batch.tokens)
        if self.spec.embed_scale is not None:
            x = x * jnp.asarray(self.spec.embed_scale, x.dtype)
        return self.rules.constrain(x, "tokens", None)

    def __call__(self, batch: ForwardBatch, caches: Caches) -> tuple[Float[Array, "T D"], Caches]:
        """Hidden states after the final norm, and the caches with the step's tokens written."""
        outputs = list(self.layer_outputs(batch, caches))
        return self.norm(outputs[-1][0]), tuple(cache for _, cache in outputs)

    def layer_outputs(
        self, batch: ForwardBatch, caches: Caches
    ) -> Iterator[tuple[Float[Array, "T D"], Cache]]:
        """The residual stream after each layer, and that layer's cache."""
        x = self.embed_tokens(batch)
        for layer, cache in zip(self.layers, caches, strict=True):
            x, cache = layer(x, batch, cache)
            x = self.rules.constrain(x, "tokens", None)
            yield x, cache

    def logits(self, hidden: Float[Array, "R D"]) -> Float[Array, "R V"]:
        """Scores of the vocabulary; places added by sharding are -inf."""
        x = hidden
        logits = self.embed.attend(x) if self.head is None else self.head(x)
        if self.spec.logit_softcap is not None:
            logits = jnp.tanh(logits / self.spec.logit_softcap) * self.spec.logit_softcap
        if logits.shape[-1] != self.spec.vocab:
            real = jnp.arange(logits.shape[-1]) < self.spec.vocab
            logits = jnp.where(real, logits, -jnp.inf)
        return logits

    def pick(self, hidden: Float[Array, "T D"], batch: ForwardBatch) -> Float[Array, "R D"]:
        """The hidden states of the tokens to sample from, rank by rank."""
        if self.rules.mesh.size == 1:
            return hidden[batch.sample_at]
        return jax.shard_map(
            lambda h, at: h[at],
            mesh=self.rules.mesh,
            in_specs=(self.rules.spec("tokens", None), PartitionSpec(DATA)),
            out_specs=self.rules.spec("rows", None),
            check_vma=False,
        )(hidden, batch.sample_at)

    @property
    def num_parameters(self) -> int:
        """Parameters of the checkpoint: padding and copies made by sharding are not counted."""
        return sum(math.prod(shape) for shape in canonical_shapes(self).values())

    @property
    def cache_specs(self) -> tuple[CacheSpec, ...]:
        return tuple(layer.mixer.cache_spec for layer in self.layers)


def placements(model: nnx.Module) -> dict[tuple, Placed]:
    """Every parameter's path in the module tree and how its array is made."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {path: param.get_metadata()["placed"] for path, param in flat}


def canonical_shapes(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Canonical name and shape of every checkpoint tensor the model is made from."""
    return {w.name: w.shape for placed in placements(model).values() for w in placed.weights}
