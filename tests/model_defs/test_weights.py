"""Weight rules and the plan made from them: reversible, complete, reading no more than asked."""

from __future__ import annotations

import numpy as np
import pytest

from model_defs.weights import (
    Ignore,
    Join,
    Rename,
    Rule,
    Source,
    Split,
    Stack,
    Subtree,
    Tie,
    Transpose,
    Unstack,
    WeightPlanError,
    export,
    plan,
)

RULES: tuple[Rule, ...] = (
    Ignore(r".*\.inv_freq"),
    Subtree("model", "decoder"),
    Rename("self_attn", "mixer"),
    Rename("norm1", "pre_mixer_norm"),
    Split("qkv_proj", ("q_proj", "k_proj", "v_proj"), (4, 2, 2)),
    Tie("lm_head.weight", "decoder.embed.weight"),
)
STORED = {
    "model.embed.weight": (5, 3),
    "model.layers.0.norm1.weight": (3,),
    "model.layers.0.self_attn.qkv_proj.weight": (8, 3),
    "model.layers.0.self_attn.qkv_proj.bias": (8,),
    "model.layers.0.self_attn.rope.inv_freq": (2,),
    "lm_head.weight": (5, 3),
}
CANONICAL = {
    "decoder.embed.weight": (5, 3),
    "decoder.layers.0.pre_mixer_norm.weight": (3,),
    "decoder.layers.0.mixer.q_proj.weight": (4, 3),
    "decoder.layers.0.mixer.k_proj.weight": (2, 3),
    "decoder.layers.0.mixer.v_proj.weight": (2, 3),
    "decoder.layers.0.mixer.q_proj.bias": (4,),
    "decoder.layers.0.mixer.k_proj.bias": (2,),
    "decoder.layers.0.mixer.v_proj.bias": (2,),
}


def headers(shapes: dict) -> dict:
    return {name: (shape, "float32") for name, shape in shapes.items()}


class Tensors:
    """Arrays by name; remembers which boxes were read."""

    def __init__(self, shapes: dict):
        rng = np.random.default_rng(0)
        self.arrays = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
        self.reads: list[tuple[str, tuple[slice, ...]]] = []

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        self.reads.append((name, index))
        return self.arrays[name][index]


def test_plan_finds_every_tensor_and_says_what_it_drops() -> None:
    made = plan(RULES, headers(STORED), CANONICAL)
    assert set(made.entries) == set(CANONICAL)
    assert {name: entry.shape for name, entry in made.entries.items()} == CANONICAL
    assert made.dropped == ("lm_head.weight", "model.layers.0.self_attn.rope.inv_freq")


def test_a_part_is_read_without_its_neighbours() -> None:
    tensors = Tensors(STORED)
    made = plan(RULES, headers(STORED), CANONICAL)
    box = (slice(1, 2), slice(0, 2))
    k = made.read("decoder.layers.0.mixer.k_proj.weight", box, tensors.read)
    fused = "model.layers.0.self_attn.qkv_proj.weight"
    np.testing.assert_array_equal(k, tensors.arrays[fused][5:6, 0:2])
    assert tensors.reads == [(fused, (slice(5, 6), slice(0, 2)))]


def test_export_puts_every_stored_weight_back() -> None:
    tensors = Tensors(STORED)
    made = plan(RULES, headers(STORED), CANONICAL)
    canonical = {
        name: made.read(name, tuple(slice(0, n) for n in shape), tensors.read)
        for name, shape in CANONICAL.items()
    }
    tensors.arrays["lm_head.weight"] = tensors.arrays["model.embed.weight"]
    names = [name for name in STORED if not name.endswith("inv_freq")]
    back = export(RULES, headers(CANONICAL), names)
    assert set(back) == set(names)
    for name in names:
        whole = tuple(slice(0, n) for n in STORED[name])
        again = back[name].read(whole, lambda n, i: canonical[n][i])
        np.testing.assert_array_equal(again, tensors.arrays[name])


def test_export_without_names_leaves_tied_copies_out() -> None:
    back = export(RULES, headers(CANONICAL))
    assert set(back) == {
        "model.embed.weight",
        "model.layers.0.norm1.weight",
        "model.layers.0.self_attn.qkv_proj.weight",
        "model.layers.0.self_attn.qkv_proj.bias",
    }


@pytest.mark.parametrize(("start", "stop"), [(0, 8), (0, 4), (3, 5), (4, 8), (7, 8)])
def test_a_join_reads_only_the_parts_in_the_box(start: int, stop: int) -> None:
    shapes = {"a": (4, 3), "b": (2, 3), "c": (2, 3)}
    tensors = Tensors(shapes)
    join = Join(tuple(Source(name, shape, "float32") for name, shape in shapes.items()))
    whole = np.concatenate(list(tensors.arrays.values()))
    box = join.read((slice(start, stop), slice(1, 3)), tensors.read)
    np.testing.assert_array_equal(box, whole[start:stop, 1:3])
    assert sum(i[0].stop - i[0].start for _, i in tensors.reads) == stop - start


def test_rename_takes_whole_segments_only() -> None:
    rule = Rename("mlp", "ffn")
    names = {"decoder.layers.0.mlp.up.weight", "decoder.mlp_norm.weight", "vision.mlp.weight"}
    out = rule.forward({name: Source(name, (1,), "float32") for name in names})
    assert set(out) == {
        "decoder.layers.0.ffn.up.weight",
        "decoder.mlp_norm.weight",
        "vision.mlp.weight",
    }
    assert set(rule.inverse(out)) == names


def test_all_problems_are_named_at_once() -> None:
    stored = dict(STORED)
    del stored["model.layers.0.norm1.weight"]
    stored["model.layers.0.norm2.weight"] = (3,)
    stored["model.embed.weight"] = (6, 3)
    with pytest.raises(WeightPlanError) as error:
        plan(RULES, headers(stored), CANONICAL)
    text = str(error.value)
    assert "3 tensors" in text
    assert "missing: decoder.layers.0.pre_mixer_norm.weight" in text
    assert "unread: decoder.layers.0.norm2.weight" in text
    assert "mis-shaped: decoder.embed.weight is [6, 3]" in text
    assert "[5, 3]" in text


def test_a_near_miss_is_suggested() -> None:
    stored = dict(STORED)
    stored["model.layers.0.norm1.weights"] = stored.pop("model.layers.0.norm1.weight")
    with pytest.raises(WeightPlanError, match=r"nearest: decoder\.layers\.0\.pre_mixer_norm"):
        plan(RULES, headers(stored), CANONICAL)


@pytest.mark.parametrize("rows", [2, 7, 9])
def test_fused_tensor_of_the_wrong_size_is_mis_shaped(rows: int) -> None:
    stored = {**STORED, "model.layers.0.self_attn.qkv_proj.weight": (rows, 3)}
    with pytest.raises(WeightPlanError, match=r"mis-shaped: .*qkv_proj\.weight\["):
        plan(RULES, headers(stored), CANONICAL)


def test_two_stored_tensors_for_one_place_are_refused() -> None:
    stored = {**STORED, "decoder.embed.weight": (5, 3)}
    with pytest.raises(WeightPlanError, match=r"model\.embed\.weight.*decoder\.embed\.weight"):
        plan(RULES, headers(stored), CANONICAL)


def test_a_checkpoint_of_another_model_is_refused_quickly() -> None:
    stored = {f"transformer.h.{i}.weight": (3,) for i in range(3000)}
    expected = {f"decoder.layers.{i}.ffn.weight": (3,) for i in range(3000)}
    with pytest.raises(WeightPlanError, match="6000 tensors"):
        plan(RULES, headers(stored), expected)


# Rules that cut or order tensors in other ways: what is stored, what it becomes, and the same
# array spelled in numpy.
RESHAPING = {
    "one tensor for each head": (
        Stack("q_layernorm.norms.{}", "q_norm"),
        {f"decoder.layers.0.q_layernorm.norms.{i}.weight": (4,) for i in range(11)},
        {
            "decoder.layers.0.q_norm.weight": lambda t: np.stack(
                [t[f"decoder.layers.0.q_layernorm.norms.{i}.weight"] for i in range(11)]
            )
        },
    ),
    "one tensor for all experts": (
        Unstack("experts", "expert.{}.up_proj"),
        {"ffn.experts.weight": (3, 5, 4)},
        {
            f"ffn.expert.{i}.up_proj.weight": lambda t, i=i: t["ffn.experts.weight"][i]
            for i in range(3)
        },
    ),
    "shares of three parts in each group": (
        Split("qkv", ("q", "k", "v"), (4, 2, 2), groups=3),
        {"mixer.qkv.weight": (24, 5), "mixer.qkv.bias": (24,)},
        {
            f"mixer.{part}.{leaf}": lambda t, leaf=leaf, cut=cut: np.concatenate(
                [group[cut] for group in np.split(t[f"mixer.qkv.{leaf}"], 3)]
            )
            for part, cut in (("q", slice(4)), ("k", slice(4, 6)), ("v", slice(6, 8)))
            for leaf in ("weight", "bias")
        },
    ),
    "matrices stored the other way round": (
        Transpose(r"c_fc\.weight"),
        {"ffn.c_fc.weight": (5, 4), "ffn.c_fc.bias": (4,)},
        {
            "ffn.c_fc.weight": lambda t: t["ffn.c_fc.weight"].T,
            "ffn.c_fc.bias": lambda t: t["ffn.c_fc.bias"],
        },
    ),
    "a decoder without a prefix": (
        Subtree("", "decoder"),
        {"layers.0.weight": (5, 4), "norm.weight": (4,)},
        {
            "decoder.layers.0.weight": lambda t: t["layers.0.weight"],
            "decoder.norm.weight": lambda t: t["norm.weight"],
        },
    ),
}


@pytest.mark.parametrize("name", RESHAPING)
def test_reshaping_rule_gives_the_parts_box_by_box_and_back(name: str) -> None:
    rule, shapes, expected = RESHAPING[name]
    stored = Tensors(shapes)
    parts = {name: part(stored.arrays) for name, part in expected.items()}
    made = plan((rule,), headers(shapes), {n: part.shape for n, part in parts.items()})
    assert made.dropped == ()
    for part_name, part in parts.items():
        for box in boxes(part.shape):
            np.testing.assert_array_equal(made.read(part_name, box, stored.read), part[box])
    back = export((rule,), headers({n: part.shape for n, part in parts.items()}))
    assert {n: expr.shape for n, expr in back.items()} == shapes
    for stored_name, shape in shapes.items():
        for box in boxes(shape):
            again = back[stored_name].read(box, lambda n, i: parts[n][i])
            np.testing.assert_array_equal(again, stored.arrays[stored_name][box])


def boxes(shape: tuple[int, ...]):
    """The whole, and every run of places of each dimension in turn."""
    whole = tuple(slice(0, n) for n in shape)
    yield whole
    for dim, size in enumerate(shape):
        for start in range(size):
            for stop in range(start + 1, size + 1):
                yield (*whole[:dim], slice(start, stop), *whole[dim + 1 :])


def test_a_missing_part_of_a_stack_is_an_error() -> None:
    stored = {f"q_layernorm.norms.{i}.weight": (4,) for i in (0, 2)}
    with pytest.raises(WeightPlanError, match=r"q_norm\.weight is stored as parts \[0, 2\]"):
        plan((Stack("q_layernorm.norms.{}", "q_norm"),), headers(stored), {})
