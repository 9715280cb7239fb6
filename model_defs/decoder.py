"""The decoder: what a text model is (`DecoderSpec`), and the only layer loop of the project.

The residual stream is in the model's dtype; logits are float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from model_defs.hf_config import HFConfig
from model_defs.interface import Cache, Caches, CacheSpec, ForwardBatch
from model_defs.layers.attention import GQA
from model_defs.layers.embedding import Embedding, LMHead, Pooling, ScoreHead
from model_defs.layers.linear import BuildContext, Placed
from model_defs.layers.mla import MLA
from model_defs.layers.mlp import MLP
from model_defs.layers.moe import MoE
from model_defs.layers.norm import Norm, RMSNorm
from model_defs.layers.rope import Rope
from model_defs.sharding import DATA, Axis


@dataclass(frozen=True)
class Norms:
    """Norms around the two branches of a layer; None where there is none."""

    pre_mixer: Norm | None = None
    post_mixer: Norm | None = None
    pre_ffn: Norm | None = None
    post_ffn: Norm | None = None


def PreNorm(norm: Norm) -> Norms:
    """A norm before each branch."""
    return Norms(pre_mixer=norm, pre_ffn=norm)


def SandwichNorm(norm: Norm) -> Norms:
    """A norm before and after each branch."""
    return Norms(norm, norm, norm, norm)


Task = Literal["generate", "score", "embed"]
MixerSpec = GQA | MLA
FeedForwardSpec = MLP | MoE
PLAIN_HEAD = LMHead()


@dataclass(frozen=True)
class Layer:
    """One layer: a token mixer and a feed-forward network, each added to the residual.

    Attributes:
        parallel: both branches read the layer's input; without a `pre_ffn` norm of its own the
            network reads what the mixer reads.
        branch_scale: factor of both branches before they are added.
        residual_after_norm: the branches are added to the normalised input instead.
    """

    mixer: MixerSpec
    ffn: FeedForwardSpec
    norms: Norms
    parallel: bool = False
    branch_scale: float | None = None
    residual_after_norm: bool = False

    def build(self, ctx: BuildContext, embed: Axis) -> LayerModule:
        return LayerModule(self, ctx, embed)


@dataclass(frozen=True)
class DecoderSpec:
    """A text model, whole. There is no other model config between Hugging Face's and this.

    Attributes:
        embed_scale: factor of the embeddings, rounded to the model's dtype first.
        tied: the output head is the embedding table.
        logit_scale: factor of the logits, before the soft cap.
        logit_softcap: logits become `softcap * tanh(logits / softcap)`.
        head: what the final hidden states become: logits (with `tied`, of the embedding table),
            scores of a whole text, or its embedding.
        max_length: positions the checkpoint was made for.
    """

    vocab: int
    d_model: int
    layers: tuple[Layer, ...]
    final_norm: Norm
    max_length: int
    tied: bool = False
    embed_scale: float | None = None
    logit_scale: float | None = None
    logit_softcap: float | None = None
    head: LMHead | ScoreHead | Pooling = PLAIN_HEAD

    @property
    def task(self) -> Task:
        """What the model is for."""
        if isinstance(self.head, ScoreHead):
            return "score"
        return "embed" if isinstance(self.head, Pooling) else "generate"

    @property
    def grows(self) -> bool:
        """Whether requests may be longer than `max_length`: every rope stretches with them."""
        ropes = [layer.mixer.position for layer in self.layers]
        return all(isinstance(rope, Rope) and rope.grows for rope in ropes)

    @classmethod
    def from_hf(
        cls,
        cfg: HFConfig,
        *,
        layers: Sequence[Layer],
        final_norm: Norm,
        tied: bool = False,
        max_length: int | None = None,
        **rest: Any,
    ) -> DecoderSpec:
        """Read the sizes under their usual names; `tied` is the family's default.

        `max_length` is given where its name is another; `rest` are the other attributes.
        """
        return cls(
            vocab=cfg["vocab_size"],
            d_model=cfg["hidden_size"],
            layers=tuple(layers),
            final_norm=final_norm,
            max_length=cfg["max_position_embeddings"] if max_length is None else max_length,
            tied=cfg.get("tie_word_embeddings", tied),
            **rest,
        )

    def build(self, ctx: BuildContext) -> Decoder:
        """The NNX module, with parameters that have shapes but no data."""
        return Decoder(self, ctx)


def pre_norm_decoder(
    cfg: HFConfig,
    mixer: MixerSpec,
    ffn: FeedForwardSpec,
    *,
    branch_scale: float | None = None,
    **rest: Any,
) -> DecoderSpec:
    """Equal layers with an `RMSNorm` before each branch and after the last layer.

    Reads `num_hidden_layers` and `rms_norm_eps`; `rest` are attributes of the spec.
    """
    norm = RMSNorm(cfg["rms_norm_eps"])
    layer = Layer(mixer, ffn, PreNorm(norm), branch_scale=branch_scale)
    layers = [layer] * cfg["num_hidden_layers"]
    return DecoderSpec.from_hf(cfg, layers=layers, final_norm=norm, **rest)


class LayerModule(nnx.Module):
    def __init__(self, spec: Layer, ctx: BuildContext, embed: Axis):
        self.spec = spec

        def norm(name: str, norm: Norm | None):
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
        spec = self.spec
        mixed = _apply(self.pre_mixer_norm, x)
        y, cache = self.mixer(mixed, batch, cache)
        after_mixer = self._add(mixed if spec.residual_after_norm else x, y, self.post_mixer_norm)
        if spec.parallel:
            fed = mixed if self.pre_ffn_norm is None else self.pre_ffn_norm(x)
        else:
            fed = _apply(self.pre_ffn_norm, after_mixer)
        residual = fed if spec.residual_after_norm else after_mixer
        return self._add(residual, self.ffn(fed, batch.live), self.post_ffn_norm), cache

    def _add(self, residual: Array, branch: Array, norm) -> Array:
        branch = _apply(norm, branch)
        scale = self.spec.branch_scale
        return residual + (branch if scale is None else branch * scale)


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
        self.head = self._head(ctx, vocab, embed)

    def _head(self, ctx: BuildContext, vocab: Axis, embed: Axis):
        head = self.spec.head
        if isinstance(head, ScoreHead):
            return head.build(ctx, embed)
        if isinstance(head, Pooling) or self.spec.tied:
            return None
        return head.build(ctx, vocab, embed)

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
        logits = self.embed.attend(hidden) if self.head is None else self.head(hidden)
        if self.spec.logit_scale is not None:
            logits = logits * self.spec.logit_scale
        if self.spec.logit_softcap is not None:
            logits = jnp.tanh(logits / self.spec.logit_softcap) * self.spec.logit_softcap
        if logits.shape[-1] != self.spec.vocab:
            real = jnp.arange(logits.shape[-1]) < self.spec.vocab
            logits = jnp.where(real, logits, -jnp.inf)
        return logits

    def score(self, hidden: Float[Array, "R D"]) -> Float[Array, "R L"]:
        """Scores of texts by a `ScoreHead`, from the hidden states of their last tokens."""
        assert isinstance(self.spec.head, ScoreHead) and self.head is not None
        return self.head(hidden)

    def outputs(self, hidden: Float[Array, "T D"]) -> Float[Array, "T O"]:
        """What the model is for, at every token: logits, scores, or the hidden states themselves.

        In float32.
        """
        if self.spec.task == "embed":
            return hidden.astype(jnp.float32)
        return self.logits(hidden) if self.spec.task == "generate" else self.score(hidden)

    def pick(self, hidden: Float[Array, "T D"], batch: ForwardBatch) -> Float[Array, "R D"]:
        """The hidden states of the tokens to sample from, rank by rank."""
        return self._by_rank(lambda h, at: h[at], hidden, batch.sample_at)

    def read(self, hidden: Float[Array, "T D"], batch: ForwardBatch) -> Float[Array, "R O"]:
        """What a step adds to the result of each row's text, for models that do not generate.

        Scores, or the hidden state of the row's last or first token in the step, or the sum of all
        of them, as the head says. In float32.
        """
        head, starts = self.spec.head, batch.attention.query_starts
        if isinstance(head, ScoreHead):
            return self.score(self.pick(hidden, batch))
        assert isinstance(head, Pooling)
        if head.kind == "last":
            return self.pick(hidden, batch).astype(jnp.float32)
        read = _first_of_rows if head.kind == "cls" else _sum_of_rows
        return self._by_rank(read, hidden, starts)

    def _by_rank(self, read, hidden: Array, index: Array) -> Array:
        """`read(hidden, index)` on each rank's part of both."""
        call = self.rules.per_device(
            read,
            in_specs=(self.rules.spec("tokens", None), PartitionSpec(DATA)),
            out_specs=self.rules.spec("rows", None),
        )
        return call(hidden, index)

    @property
    def num_parameters(self) -> int:
        """Parameters of the checkpoint: padding and copies made by sharding are not counted."""
        return sum(math.prod(shape) for shape in canonical_shapes(self).values())

    @property
    def cache_specs(self) -> tuple[CacheSpec, ...]:
        return tuple(layer.mixer.cache_spec for layer in self.layers)


def _first_of_rows(hidden: Float[Array, "T D"], starts: Int[Array, " R+1"]):
    return hidden[jnp.minimum(starts[:-1], hidden.shape[0] - 1)].astype(jnp.float32)


def _sum_of_rows(hidden: Float[Array, "T D"], starts: Int[Array, " R+1"]):
    num_rows = starts.shape[0] - 1
    index = jnp.arange(hidden.shape[0], dtype=starts.dtype)
    row = jnp.searchsorted(starts[1:], index, side="right", method="compare_all")
    # Padding belongs to row R, which is dropped.
    return jax.ops.segment_sum(hidden.astype(jnp.float32), row, num_rows, indices_are_sorted=True)


def placements(model: nnx.Module) -> dict[tuple, Placed]:
    """Every parameter's path in the module tree and how its array is made."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {path: param.get_metadata()["placed"] for path, param in flat}


def canonical_shapes(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Canonical name and shape of every checkpoint tensor the model is made from."""
    return {w.name: w.shape for placed in placements(model).values() for w in placed.weights}
