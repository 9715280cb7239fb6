"""Mixture of experts: routers, and feed-forward networks of which each token visits a few.

A router is a frozen type with one method: scores of the experts in, the chosen experts and their
weights out, in float32. Every token visits all the experts it chose, however many others chose the
same ones: rows are sorted by expert and multiplied group by group, so there is no capacity and
nothing to drop.

Experts are split over the mesh in two ways at once: groups of devices keep different experts, and
the devices of a group keep a slice of each. A device works on the rows of its own experts only; the
parts of a token's result are summed over the devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from model_defs.hf_config import UnsupportedConfig
from model_defs.layers.linear import (
    BuildContext,
    Linear,
    Weight,
    place_matrix,
    place_stack,
    vector,
)
from model_defs.layers.mlp import MLP
from model_defs.sharding import EXPERT, MODEL, Axis
from pallas_kernels.grouped_matmul import group_rows, grouped_matmul

Choice = tuple[Float[Array, "T k"], Int[Array, "T k"]]

# ---- routers ---------------------------------------------------------------------------------


class Router(Protocol):
    """Which experts a token visits, and what each of them counts.

    `corrected`: the router has a learned number per expert that moves the choice.
    """

    corrected: ClassVar[bool]

    @property
    def experts(self) -> int: ...

    def choose(
        self, logits: Float[Array, "T E"], correction: Float[Array, " E"] | None
    ) -> Choice: ...


@dataclass(frozen=True)
class SoftmaxTopK:
    """The `top_k` largest of a softmax over all experts, times `scale`.

    With `renormalize` the weights are divided by their sum plus `eps` (Jiang et al. 2024,
    arXiv:2401.04088: the same as a softmax over the chosen logits); without it they stay as they
    are (Dai et al. 2024, arXiv:2401.06066).
    """

    corrected: ClassVar[bool] = False
    experts: int
    top_k: int
    renormalize: bool
    eps: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_counts(self.experts, self.top_k)

    def choose(
        self, logits: Float[Array, "T E"], correction: Float[Array, " E"] | None = None
    ) -> Choice:
        weights, ids = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32)), self.top_k)
        if self.renormalize:
            weights = weights / (weights.sum(-1, keepdims=True) + self.eps)
        return weights * self.scale, ids


@dataclass(frozen=True)
class GroupLimitedTopK:
    """The same, among the experts of the `top_groups` groups with the largest best expert.

    DeepSeek-AI 2024 (arXiv:2405.04434), section 2.2. The weights are divided by their sum where
    `renormalize` is set, and else multiplied by `scale`: never both.
    """

    corrected: ClassVar[bool] = False
    experts: int
    top_k: int
    groups: int
    top_groups: int
    renormalize: bool
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_counts(self.experts, self.top_k, self.groups, self.top_groups)

    def choose(
        self, logits: Float[Array, "T E"], correction: Float[Array, " E"] | None = None
    ) -> Choice:
        scores = jax.nn.softmax(logits.astype(jnp.float32))
        best = _grouped(scores, self.groups).max(-1)
        allowed = _in_top_groups(best, self.top_groups, self.experts)
        weights, ids = jax.lax.top_k(jnp.where(allowed, scores, 0.0), self.top_k)
        if self.renormalize and self.top_k > 1:
            return weights / (weights.sum(-1, keepdims=True) + 1e-20), ids
        return weights * self.scale, ids


@dataclass(frozen=True)
class SigmoidGrouped:
    """Sigmoid scores, chosen with a learned correction that does not enter the weights.

    DeepSeek-AI 2024 (arXiv:2412.19437), section 2.1.2: a group's score is the sum of its two best
    corrected scores; experts outside the `top_groups` groups are out. The weights are the scores
    without correction, divided by their sum where `renormalize` is set, then times `scale`.
    """

    corrected: ClassVar[bool] = True
    experts: int
    top_k: int
    groups: int = 1
    top_groups: int = 1
    renormalize: bool = True
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_counts(self.experts, self.top_k, self.groups, self.top_groups)

    def choose(self, logits: Float[Array, "T E"], correction: Float[Array, " E"] | None) -> Choice:
        scores = jax.nn.sigmoid(logits.astype(jnp.float32))
        corrected = scores if correction is None else scores + correction.astype(jnp.float32)
        groups = _grouped(corrected, self.groups)
        best_two = jax.lax.top_k(groups, min(2, groups.shape[-1]))[0].sum(-1)
        allowed = _in_top_groups(best_two, self.top_groups, self.experts)
        _, ids = jax.lax.top_k(jnp.where(allowed, corrected, -jnp.inf), self.top_k)
        weights = jnp.take_along_axis(scores, ids, axis=-1)
        if self.renormalize:
            weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
        return weights * self.scale, ids


@dataclass(frozen=True)
class SparseMixer:
    """The two largest, each weighted by a softmax over the experts that come near it.

    Liu et al. 2024 (arXiv:2409.12136), as used at inference. An expert with score s comes near the
    largest score m if `(m - s) / max(|s|, m) <= 2 * jitter`; the second is chosen and weighted in
    the same way among the others. The two weights do not add up to one.
    """

    corrected: ClassVar[bool] = False
    top_k: ClassVar[int] = 2
    experts: int
    jitter: float

    def __post_init__(self) -> None:
        _check_counts(self.experts, self.top_k)

    def choose(
        self, logits: Float[Array, "T E"], correction: Float[Array, " E"] | None = None
    ) -> Choice:
        logits = logits.astype(jnp.float32)
        left, weights, ids = logits, [], []
        for _ in range(self.top_k):
            largest = left.max(-1, keepdims=True)
            best = left.argmax(-1)[:, None].astype(jnp.int32)
            far = (largest - logits) / jnp.maximum(jnp.abs(logits), largest) > 2 * self.jitter
            near = jax.nn.softmax(jnp.where(far, -jnp.inf, left))
            weights.append(jnp.take_along_axis(near, best, axis=-1))
            ids.append(best)
            left = jnp.where(jnp.arange(self.experts) == best, -jnp.inf, left)
        return jnp.concatenate(weights, axis=-1), jnp.concatenate(ids, axis=-1)


def _grouped(scores: Float[Array, "T E"], groups: int) -> Float[Array, "T G g"]:
    return scores.reshape(scores.shape[0], groups, -1)


def _in_top_groups(scores: Float[Array, "T G"], top_groups: int, experts: int) -> Array:
    """`bool[T, E]`: experts of the `top_groups` groups with the largest scores `[T, G]`."""
    groups = scores.shape[1]
    _, best = jax.lax.top_k(scores, top_groups)
    chosen = (jnp.arange(groups) == best[:, :, None]).any(1)
    return jnp.repeat(chosen, experts // groups, axis=1)


def _check_counts(experts: int, top_k: int, groups: int = 1, top_groups: int = 1) -> None:
    if groups < 1 or experts % groups or not 1 <= top_groups <= groups:
        raise UnsupportedConfig(
            f"{experts} experts in {groups} groups, {top_groups} of them chosen: the groups must "
            f"be of equal size, and no more chosen than there are. Correct the config."
        )
    if not 1 <= top_k <= top_groups * (experts // groups):
        raise UnsupportedConfig(
            f"{top_k} experts per token of {top_groups * (experts // groups)} to choose from: "
            f"name at least 1 and no more than there are. Correct the config."
        )


# ---- the layer -------------------------------------------------------------------------------


@dataclass(frozen=True)
class MoE:
    """`sum over chosen experts e of weight_e * expert_e(x)`, plus what all tokens share.

    Attributes:
        router: how a token chooses; its scores are `router.weight @ x`.
        expert: the shape of each expert, without biases.
        shared: a network that every token visits, or None.
        shared_gate: the shared network's output is times `sigmoid(shared_gate.weight @ x)`.

    Canonical tensors: `router.weight` [E, D], for a corrected router
    `router.e_score_correction_bias` [E], `experts.N.{gate,up}_proj.weight` [F, D],
    `experts.N.down_proj.weight` [D, F], `shared.*` as any MLP, `shared_gate.weight` [1, D].
    """

    router: Router
    expert: MLP
    shared: MLP | None = None
    shared_gate: bool = False

    def __post_init__(self) -> None:
        if self.expert.bias:
            raise UnsupportedConfig("experts with biases are not implemented.")

    def build(self, ctx: BuildContext, embed: Axis) -> MoEModule:
        return MoEModule(self, ctx, embed)


class MoEModule(nnx.Module):
    def __init__(self, spec: MoE, ctx: BuildContext, embed: Axis):
        self.spec, self.rules = spec, ctx.rules
        count, ffn = spec.router.experts, Axis("expert_ffn", spec.expert.width)
        score = Axis("router_scores", count)  # not split: every device routes every token
        self.router = Linear(ctx, {"router": (score,)}, (embed,))
        bias = vector(ctx, ctx.weight("router.e_score_correction_bias", (score,)))
        wide = replace(ctx, dtype=np.dtype(np.float32))  # the bias decides between near equals
        self.correction = wide.param(bias) if spec.router.corrected else None

        def tensors(name: str, out: Axis, into: Axis) -> list[Weight]:
            places = [ctx.at("experts", e) for e in range(count)]
            return [place.weight(f"{name}.weight", (out,), (into,)) for place in places]

        def stacked(*names: Sequence[Weight]) -> nnx.Param:
            each = [place_matrix(ctx, weights) for weights in zip(*names, strict=True)]
            return ctx.param(place_stack(ctx, Axis("experts", count), each))

        self.gate_up = stacked(tensors("gate_proj", ffn, embed), tensors("up_proj", ffn, embed))
        self.down = stacked(tensors("down_proj", embed, ffn))
        self.shared = spec.shared.build(ctx.at("shared"), embed) if spec.shared else None
        self.shared_gate = (
            Linear(ctx, {"shared_gate": (Axis("gate", 1),)}, (embed,)) if spec.shared_gate else None
        )

    def __call__(
        self, x: Float[Array, "T D"], live: Bool[Array, " T"] | None = None
    ) -> Float[Array, "T D"]:
        live = jnp.ones(x.shape[0], bool) if live is None else live
        (logits,) = self.router(x, jnp.float32)
        correction = None if self.correction is None else self.correction[...]
        y = self._routed(x, logits, live, correction)
        if self.shared is None:
            return y
        shared = self.shared(x)
        if self.shared_gate is not None:
            shared = shared * jax.nn.sigmoid(self.shared_gate(x)[0])
        return y + shared

    def _routed(
        self,
        x: Float[Array, "T D"],
        logits: Float[Array, "T E"],
        live: Bool[Array, " T"],
        correction: Array | None,
    ) -> Float[Array, "T D"]:
        rules, spec = self.rules, self.rules.spec
        weights = self.gate_up[...], self.down[...]
        if rules.mesh.size == 1:
            return _experts(
                self.spec, x, logits, live, correction, *weights, device_kind=rules.device_kind
            )
        tokens = spec("tokens", None)
        placed = (param.get_metadata()["placed"].axes for param in (self.gate_up, self.down))

        def shard(*arrays):
            return _experts(
                self.spec,
                *arrays,
                jax.lax.axis_index(EXPERT),
                over=MODEL,
                device_kind=rules.device_kind,
            )

        return jax.shard_map(
            shard,
            mesh=rules.mesh,
            in_specs=(tokens, tokens, spec("tokens"), spec(), *(spec(*axes) for axes in placed)),
            out_specs=tokens,
            check_vma=False,
        )(x, logits, live, correction, *weights)


def _routed_experts(
    spec: MoE,
    x: Float[Array, "T D"],
    logits: Float[Array, "T E"],
    live: Bool[Array, " T"],
    correction: Float[Array, " E"] | None,
    gate_up: Float[Array, "e D 1 2f"],
    down: Float[Array, "e f 1 D"],
    group: Int[Array, ""] | int = 0,
    over: tuple[str, ...] = (),
    device_kind: str | None = None,
) -> Float[Array, "T D"]:
    """The routed part of the layer on one device; tokens that are not `live` become anything.

    Args:
        gate_up, down: the device's experts, which follow those of the groups before `group`.
        over: mesh axes to sum over.
        device_kind: as JAX names the device, for kernels.
    """
    product = partial(grouped_matmul, device_kind=device_kind)
    weights, ids = spec.router.choose(logits, correction)
    count, top_k = gate_up.shape[0], ids.shape[1]
    mine = ids.reshape(-1) - group * count
    # Rows of others' experts go to the end, and those of padding, which visits none.
    mine = jnp.where((mine >= 0) & (mine < count) & jnp.repeat(live, top_k), mine, count)
    order, places, sizes = group_rows(mine.astype(jnp.int32), count)

    tokens = order // top_k
    hidden = product(x, gate_up[:, :, 0], sizes, tokens, combine=spec.expert.combine)
    rows = product(hidden, down[:, :, 0], sizes)
    parts = rows[places].reshape(*ids.shape, -1).astype(jnp.float32)
    y = (parts * weights[:, :, None]).sum(1).astype(x.dtype)
    return jax.lax.psum(y, over) if over else y


# Traced once per shape and spec, not once per layer: tracing is most of a warm start.
_experts = jax.jit(_routed_experts, static_argnums=0, static_argnames=("over", "device_kind"))
