"""Routers against their formulas in numpy, and the layer against a loop over the experts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model_defs.decoder import canonical_shapes, placements
from model_defs.hf_config import UnsupportedConfig
from model_defs.layers import moe as moe_module
from model_defs.layers.mlp import ACTIVATIONS, MLP
from model_defs.layers.moe import (
    GroupLimitedTopK,
    MoE,
    Router,
    SigmoidGrouped,
    SoftmaxTopK,
    SparseMixer,
)
from model_defs.sharding import Axis
from pallas_kernels.grouped_matmul import gpu, group_rows, grouped_matmul
from pallas_kernels.grouped_matmul.arg_specs import ArgSpec

from ...pallas_kernels.cuda_lowering import lowered_for_cuda
from ..harness import context
from .fill import built

EMBED = Axis("embed", 6)
MESHES = [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (8, 2)]  # tp, ep


# ---- routers: one token at a time, in float64 ------------------------------------------------


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def largest(x: np.ndarray, count: int) -> list[int]:
    return sorted(range(len(x)), key=lambda i: (-x[i], i))[:count]


def softmax_top_k(r: SoftmaxTopK, logits: np.ndarray, bias: np.ndarray) -> dict[int, float]:
    p = softmax(logits)
    ids = largest(p, r.top_k)
    total = sum(p[i] for i in ids) + r.eps if r.renormalize else 1.0
    return {i: p[i] / total * r.scale for i in ids}


def allowed_experts(scores: list[float], r) -> set[int]:
    size = r.experts // r.groups
    return {g * size + i for g in largest(np.array(scores), r.top_groups) for i in range(size)}


def group_limited(r: GroupLimitedTopK, logits: np.ndarray, bias: np.ndarray) -> dict[int, float]:
    p = softmax(logits)
    allowed = allowed_experts([g.max() for g in p.reshape(r.groups, -1)], r)
    ids = largest(np.array([p[i] if i in allowed else 0.0 for i in range(r.experts)]), r.top_k)
    if r.renormalize:
        return {i: p[i] / sum(p[j] for j in ids) for i in ids}
    return {i: p[i] * r.scale for i in ids}


def sigmoid_grouped(r: SigmoidGrouped, logits: np.ndarray, bias: np.ndarray) -> dict[int, float]:
    s = 1 / (1 + np.exp(-logits))
    corrected = s + bias
    groups = corrected.reshape(r.groups, -1)
    allowed = allowed_experts([np.sort(g)[-2:].sum() for g in groups], r)
    masked = [corrected[i] if i in allowed else -np.inf for i in range(r.experts)]
    ids = largest(np.array(masked), r.top_k)
    total = sum(s[i] for i in ids) if r.renormalize else 1.0
    return {i: s[i] / total * r.scale for i in ids}


def sparse_mixer(r: SparseMixer, logits: np.ndarray, bias: np.ndarray) -> dict[int, float]:
    chosen: dict[int, float] = {}
    for _ in range(2):
        left = [i for i in range(r.experts) if i not in chosen]
        best = max(left, key=lambda i: logits[i])
        m = logits[best]
        near = [i for i in left if (m - logits[i]) / max(abs(logits[i]), m) <= 2 * r.jitter]
        chosen[best] = 1 / sum(np.exp(logits[i] - m) for i in near)
    return chosen


ROUTERS = {
    "softmax": (SoftmaxTopK(7, 3, renormalize=False), softmax_top_k),
    "softmax renormalized": (SoftmaxTopK(8, 2, renormalize=True), softmax_top_k),
    "softmax eps": (SoftmaxTopK(8, 3, renormalize=True, eps=0.05, scale=2.5), softmax_top_k),
    "softmax all": (SoftmaxTopK(4, 4, renormalize=False, scale=0.5), softmax_top_k),
    "group limited": (GroupLimitedTopK(12, 4, 4, 2, False, 16.0), group_limited),
    "group limited renormalized": (GroupLimitedTopK(12, 3, 4, 2, True, 16.0), group_limited),
    "group limited greedy": (GroupLimitedTopK(8, 3, 1, 1, False, 1.5), group_limited),
    "sigmoid": (SigmoidGrouped(12, 3, 3, 2, True, 2.5), sigmoid_grouped),
    "sigmoid raw": (SigmoidGrouped(8, 2, renormalize=False), sigmoid_grouped),
    "sigmoid lone experts": (SigmoidGrouped(6, 2, 6, 3), sigmoid_grouped),
    "sparse mixer": (SparseMixer(8, 0.01), sparse_mixer),
    "sparse mixer wide": (SparseMixer(16, 0.4), sparse_mixer),
}


@pytest.mark.parametrize(("router", "formula"), ROUTERS.values(), ids=ROUTERS)
def test_router_is_its_formula(router: Router, formula) -> None:
    rng = np.random.default_rng(3)
    logits = 2 * rng.normal(size=(64, router.experts))
    logits[:5] -= 8  # all negative
    bias = 0.5 * rng.normal(size=router.experts)
    weights, ids = jax.jit(router.choose)(
        logits.astype(np.float32), bias.astype(np.float32) if router.corrected else None
    )
    assert weights.dtype == jnp.float32
    assert ids.dtype == jnp.int32
    for token in range(len(logits)):
        expected = formula(router, logits[token], bias)
        found = dict(zip(np.asarray(ids[token]).tolist(), np.asarray(weights[token]), strict=True))
        assert found.keys() == expected.keys()
        np.testing.assert_allclose([found[i] for i in expected], [*expected.values()], rtol=2e-5)


def test_corrected_choice_never_takes_an_expert_outside_its_groups() -> None:
    """Also where every corrected score is negative: the others are out, not zero."""
    router = SigmoidGrouped(8, 2, groups=4, top_groups=1)
    correction = jnp.full(8, -3.0).at[2].set(-2.0)
    _, ids = router.choose(jnp.zeros((1, 8)), correction)
    assert sorted(np.asarray(ids[0]).tolist()) == [2, 3]


def test_routers_compute_in_float32() -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(9, 8)), jnp.bfloat16)
    for router in (SoftmaxTopK(8, 2, True), SigmoidGrouped(8, 2), SparseMixer(8, 0.01)):
        exact, _ = router.choose(logits.astype(jnp.float32), None)
        weights, _ = router.choose(logits, None)
        np.testing.assert_array_equal(weights, exact)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SoftmaxTopK(4, 5, True),
        lambda: SoftmaxTopK(4, 0, True),
        lambda: GroupLimitedTopK(8, 2, 3, 1, True),
        lambda: SigmoidGrouped(8, 2, 4, 5),
        lambda: SigmoidGrouped(8, 3, 4, 1),
    ],
)
def test_counts_that_do_not_fit_are_refused(make) -> None:
    with pytest.raises(UnsupportedConfig, match=r"experts .*Correct the config"):
        make()


# ---- the layer -------------------------------------------------------------------------------


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def network(w: dict[str, np.ndarray], path: str, x: np.ndarray) -> np.ndarray:
    gate, up, down = (w[f"{path}.{n}_proj.weight"] for n in ("gate", "up", "down"))
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T


def dense(moe: MoE, w: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Every token through its experts, one by one."""
    correction = w.get("router.e_score_correction_bias")
    logits = jnp.asarray(x @ w["router.weight"].T)
    weights, ids = map(np.asarray, moe.router.choose(logits, correction))
    y = np.zeros_like(x)
    for token in range(len(x)):
        for weight, expert in zip(weights[token], ids[token], strict=True):
            y[token] += weight * network(w, f"experts.{expert}", x[token])
    if moe.shared is not None:
        gate = 1 / (1 + np.exp(-x @ w["shared_gate.weight"].T)) if moe.shared_gate else 1.0
        y += gate * network(w, "shared", x)
    return y


def tokens(count: int = 16) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, EMBED.size)).astype(np.float32)


LAYERS = {
    "plain": MoE(SoftmaxTopK(8, 2, renormalize=True), MLP(8)),
    # Neither 5 experts nor a width of 10 divide over the shards.
    "odd": MoE(SoftmaxTopK(5, 3, renormalize=False), MLP(10)),
    "shared": MoE(SoftmaxTopK(8, 3, renormalize=False), MLP(8), MLP(10), shared_gate=True),
    "corrected": MoE(SigmoidGrouped(8, 3, 4, 2, scale=2.5), MLP(6), MLP(6)),
}


@pytest.mark.parametrize(("tp_size", "ep_size"), MESHES)
@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_a_loop_over_the_experts(name: str, tp_size: int, ep_size: int) -> None:
    moe = LAYERS[name]
    layer, w = built(lambda ctx: moe.build(ctx, EMBED), tp_size=tp_size, ep_size=ep_size)
    x = tokens()
    np.testing.assert_allclose(jax.jit(layer)(x), dense(moe, w, x), atol=2e-5, rtol=2e-5)


def test_each_data_rank_routes_its_own_tokens() -> None:
    moe = LAYERS["shared"]
    layer, w = built(lambda ctx: moe.build(ctx, EMBED), dp_size=2, tp_size=4, ep_size=2)
    x = tokens()
    sharded = jax.device_put(x, layer.rules.sharding("tokens", None))
    np.testing.assert_allclose(jax.jit(layer)(sharded), dense(moe, w, x), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("tp_size", "ep_size"), [(1, 1), (4, 2), (4, 4)])
def test_nothing_is_dropped_when_all_tokens_choose_the_same_experts(
    tp_size: int, ep_size: int
) -> None:
    """There is no capacity: 256 equal tokens on two of eight experts equal one token alone."""
    moe = LAYERS["plain"]
    layer, w = built(lambda ctx: moe.build(ctx, EMBED), tp_size=tp_size, ep_size=ep_size)
    x = np.repeat(tokens(1), 256, axis=0)
    y = np.asarray(jax.jit(layer)(x))
    np.testing.assert_allclose(y, np.repeat(dense(moe, w, x[:1]), 256, axis=0), atol=2e-5)
    assert np.abs(y).min(axis=0).max() > 0.01


@pytest.mark.parametrize(("tp_size", "ep_size"), [(1, 1), (4, 2)])
def test_padding_visits_no_expert(tp_size: int, ep_size: int) -> None:
    """Its rows would bring experts from memory that no other token wants."""
    moe = LAYERS["plain"]
    layer, w = built(lambda ctx: moe.build(ctx, EMBED), tp_size=tp_size, ep_size=ep_size)
    x = tokens()
    live = np.arange(len(x)) % 3 != 0
    poisoned = np.where(live[:, None], x, np.nan)
    y = np.asarray(jax.jit(layer)(poisoned, live))
    np.testing.assert_allclose(y[live], dense(moe, w, x)[live], atol=2e-5, rtol=2e-5)


def test_experts_that_only_padding_would_visit_are_not_read() -> None:
    sizes = []

    def watched(groups, num_groups):
        order, places, of_groups = group_rows(groups, num_groups)
        sizes.append(of_groups)
        return order, places, of_groups

    layer, _ = built(lambda ctx: LAYERS["plain"].build(ctx, EMBED))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe_module, "group_rows", watched)
        moe_module._routed_experts(
            layer.spec,
            *(tokens(5), jnp.eye(5, layer.spec.router.experts), jnp.arange(5) < 2, None),
            *(layer.gate_up[...], layer.down[...]),
        )
    assert sizes[0].sum() == 2 * layer.spec.router.top_k


def test_every_number_of_tokens_on_one_expert_is_computed() -> None:
    moe = MoE(SoftmaxTopK(16, 1, renormalize=True), MLP(8))
    layer, w = built(lambda ctx: moe.build(ctx, EMBED))
    for count in (1, 2, 31, 32, 33, 100):
        x = np.repeat(tokens(1), count, axis=0)
        np.testing.assert_allclose(layer(x), dense(moe, w, x), atol=2e-5)


def test_activation_of_the_experts_is_the_one_asked_for() -> None:
    silu, gelu = (MoE(SoftmaxTopK(4, 2, True), MLP(8, act)) for act in ("silu", "gelu"))
    (a, _), (b, _) = (built(lambda ctx, m=m: m.build(ctx, EMBED)) for m in (silu, gelu))
    assert np.abs(a(tokens()) - b(tokens())).max() > 1e-3


def test_correction_is_float32_in_a_bfloat16_model() -> None:
    layer = LAYERS["corrected"].build(context(dtype=jnp.bfloat16), EMBED)
    assert layer.correction.get_value().dtype == jnp.float32
    assert layer.gate_up.get_value().dtype == jnp.bfloat16


def test_canonical_tensors_are_those_of_the_checkpoint() -> None:
    shapes = canonical_shapes(LAYERS["shared"].build(context(1, 4, ep_size=2), EMBED))
    experts = {f"experts.{e}.{p}_proj.weight" for e in range(8) for p in ("gate", "up", "down")}
    shared = {f"shared.{p}_proj.weight" for p in ("gate", "up", "down")}
    assert shapes.keys() == experts | shared | {"router.weight", "shared_gate.weight"}
    assert shapes["experts.7.up_proj.weight"] == (8, 6)
    assert shapes["experts.0.down_proj.weight"] == (6, 8)
    assert shapes["router.weight"] == (8, 6)


@pytest.mark.parametrize(("tp_size", "ep_size"), [(4, 4), (4, 2), (8, 2)])
def test_a_device_reads_its_own_experts_only(tp_size: int, ep_size: int) -> None:
    ctx = context(1, tp_size, ep_size=ep_size)
    layer = replace(LAYERS["plain"], expert=MLP(32)).build(ctx, EMBED)
    shapes = canonical_shapes(layer)
    device = ctx.rules.mesh.devices[0, -1, 0]  # the last group
    elements = dict.fromkeys(shapes, 0)

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        box = tuple(len(range(*i.indices(n))) for i, n in zip(index, shapes[name], strict=True))
        elements[name] += int(np.prod(box))
        return np.zeros(box, np.float32)

    for placed in placements(layer).values():
        sharding = ctx.sharding(placed)
        index = sharding.addressable_devices_indices_map(placed.shape)[device]
        assert placed.make(index, read).shape == sharding.shard_shape(placed.shape)
    own = range(8 - 8 // ep_size, 8)
    for expert in range(8):
        for name in ("gate_proj", "up_proj", "down_proj"):
            # A single element tells the stored dtype.
            share = 32 * 6 // (tp_size // ep_size) if expert in own else 0
            assert elements[f"experts.{expert}.{name}.weight"] in (share, share + 1)


def test_expert_biases_are_refused() -> None:
    with pytest.raises(UnsupportedConfig, match="biases"):
        MoE(SoftmaxTopK(4, 2, True), MLP(8, bias=True))


@pytest.mark.parametrize("act", sorted(ACTIVATIONS))
def test_every_activation_is_part_of_the_product_on_a_gpu(act: str) -> None:
    combine = MLP(8, act, limit=7.0, shift=1.0).combine
    spec = ArgSpec("", 40, 3, 32, 64, (9, 0, 20), "bfloat16", halves=True)
    out, wanted = (
        jax.jit(partial(call, combine=combine))(*spec.arguments())
        for call in (partial(gpu.grouped_matmul, interpret=True), grouped_matmul)
    )
    np.testing.assert_allclose(
        np.asarray(out, np.float32), np.asarray(wanted, np.float32), rtol=2e-2, atol=1e-2
    )
    text = lowered_for_cuda(partial(grouped_matmul, combine=combine), *spec.shapes())
    assert "__gpu$xla.gpu.triton" in text
    assert "ragged_dot" not in text
