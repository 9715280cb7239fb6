"""Logical axes on a mesh: padding, replicated KV heads, and what each shard reads."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from model_defs.decoder import canonical_shapes, placements
from model_defs.llama import TINY
from model_defs.registry import get_family
from model_defs.sharding import (
    Axis,
    MeshError,
    ShardingRules,
    head_layout,
    make_abstract_mesh,
    make_mesh,
)

from . import harness, hf_reference

CONFIG = {**TINY, "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-6}


@settings(max_examples=200, deadline=None)
@given(
    kv_heads=st.integers(1, 12), group=st.integers(1, 12), shards=st.sampled_from([1, 2, 4, 8, 16])
)
def test_head_layout_serves_every_query_head_from_its_own_kv_head(
    kv_heads: int, group: int, shards: int
) -> None:
    layout = head_layout(kv_heads * group, kv_heads, shards)
    q_map, kv_map = layout.q_map(), layout.kv_map()
    assert len(q_map) == layout.placed_heads
    assert len(kv_map) == layout.placed_kv_heads
    assert len(kv_map) % shards == 0
    assert sorted(q_map[q_map >= 0]) == list(range(kv_heads * group))
    for place, head in enumerate(q_map):
        if head >= 0:
            assert kv_map[place // layout.group] == head // group


@pytest.mark.parametrize(
    ("heads", "kv_heads", "shards", "placed_heads", "placed_kv_heads"),
    [
        (32, 8, 8, 32, 8),  # divides
        (32, 8, 16, 32, 16),  # each KV head twice
        (28, 4, 8, 32, 8),  # groups of 7 as 4 and 3
        (9, 3, 1, 9, 3),  # one device pads nothing
        (9, 3, 2, 12, 4),
        (4, 1, 8, 8, 8),
        (40, 10, 8, 64, 16),
    ],
)
def test_head_layout_of_real_models(
    heads: int, kv_heads: int, shards: int, placed_heads: int, placed_kv_heads: int
) -> None:
    layout = head_layout(heads, kv_heads, shards)
    assert (layout.placed_heads, layout.placed_kv_heads) == (placed_heads, placed_kv_heads)


def test_query_heads_must_be_a_multiple_of_kv_heads() -> None:
    with pytest.raises(ValueError, match=r"6 query heads.*4 KV heads"):
        head_layout(6, 4, 1)


def test_axes_are_padded_to_their_shards() -> None:
    rules = ShardingRules(make_abstract_mesh(2, 4))
    assert rules.padded(Axis("vocab", 259)) == 260
    assert rules.padded(Axis("embed", 63)) == 63
    model = ("expert", "tensor")
    assert rules.spec("embed", "ffn", None) == PartitionSpec(None, model, None)
    assert rules.spec("tokens", "q_heads") == PartitionSpec("data", model)
    assert rules.shards("rows") == 2


@pytest.mark.parametrize("ep_size", [1, 2, 4])
def test_only_experts_notice_the_expert_groups(ep_size: int) -> None:
    rules = ShardingRules(make_abstract_mesh(2, 4, ep_size=ep_size))
    assert [rules.shards(axis) for axis in ("q_heads", "kv_heads", "ffn", "vocab")] == [4] * 4
    assert rules.shards("experts") == ep_size
    assert rules.shards("expert_ffn") == 4 // ep_size
    assert rules.padded(Axis("experts", 6)) == -(-6 // ep_size) * ep_size


def test_expert_groups_must_divide_the_devices() -> None:
    with pytest.raises(MeshError, match=r"--ep-size 3 does not divide --tp-size 4"):
        make_mesh(1, 4, jax.devices("cpu"), ep_size=3)


def test_too_few_devices_are_reported_with_the_flags() -> None:
    with pytest.raises(MeshError, match=r"--dp-size 4 x --tp-size 8 needs 32 devices, 8 found"):
        make_mesh(4, 8, jax.devices("cpu"))


def test_abstract_mesh_plans_what_the_real_one_places() -> None:
    family = get_family("LlamaForCausalLM")
    ctx = harness.context(1, 4)
    abstract = harness.BuildContext(
        ShardingRules(make_abstract_mesh(1, 4)), ctx.dtype, ctx.cache_dtype
    )
    real, planned = (
        {
            path: (placed.shape, placed.axes)
            for path, placed in placements(family.spec(CONFIG).build(c)).items()
        }
        for c in (ctx, abstract)
    )
    assert planned == real


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_canonical_shapes_do_not_depend_on_the_mesh(tp_size: int) -> None:
    spec = get_family("LlamaForCausalLM").spec(CONFIG)
    shapes = canonical_shapes(spec.build(harness.context(1, tp_size)))
    assert shapes == canonical_shapes(spec.build(harness.context()))
    assert shapes["decoder.layers.0.mixer.k_proj.weight"] == (32, 64)


@pytest.mark.parametrize("tp_size", [2, 4, 8])
def test_a_shard_reads_its_part_only(tp_size: int) -> None:
    module = get_family("LlamaForCausalLM").spec(CONFIG).build(harness.context(1, tp_size))
    shapes = canonical_shapes(module)
    elements = dict.fromkeys(shapes, 0)

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        box = tuple(len(range(*i.indices(n))) for i, n in zip(index, shapes[name], strict=True))
        elements[name] += int(np.prod(box))
        return np.zeros(box, np.float32)

    for placed in placements(module).values():
        sharding = harness.context(1, tp_size).sharding(placed)
        index = sharding.addressable_devices_indices_map(placed.shape)[jax.devices("cpu")[0]]
        local = placed.make(index, read)
        assert local.shape == sharding.shard_shape(placed.shape)
    for name, count in elements.items():
        total = int(np.prod(shapes[name]))
        if len(shapes[name]) == 1:
            continue
        heads = {"q_proj": 4, "k_proj": 2, "v_proj": 2, "o_proj": 4}  # a head is not cut
        parts = min(tp_size, heads.get(name.split(".")[-2], tp_size))
        assert count <= total / parts + max(shapes[name]), name


def test_data_and_tensor_parallel_together_equal_one_device(tmp_path) -> None:
    model = hf_reference.make_tiny("LlamaForCausalLM", TINY)
    config, tensors = hf_reference.save(model, tmp_path)
    prompts = [[7, 9, 30, 200, 4] * n for n in (1, 3, 2, 5)]
    expected = harness.full_logits(harness.load(config, tensors), prompts)
    sharded = harness.load(config, tensors, dp_size=2, tp_size=2)
    for a, b in zip(harness.ragged_logits(sharded, prompts), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * b.std(), rtol=0)
