"""Every registered family, on each of its tiny configs, against transformers' own model.

The parameters come from the registry: a family without a tiny config fails the suite.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from model_defs import weights
from model_defs.decoder import DecoderSpec
from model_defs.hf_config import UnsupportedConfig
from model_defs.layers.rope import LongRope
from model_defs.registry import Family, list_families

from . import harness, hf_reference

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = (1, 9, 23, 45)  # shorter and longer than the tiny windows (8, 16) and lengths (32)
NEW_TOKENS = 12
MESHES = ((1, 2), (1, 4), (1, 8), (2, 1))
TOLERANCE = 1e-4  # of the logits' standard deviation


@dataclass
class Case:
    """One tiny checkpoint, its reference and its model."""

    family: Family
    hf_model: Any
    config: dict[str, Any]
    tensors: dict[str, np.ndarray]

    @cached_property
    def model(self) -> harness.Model:
        return harness.load(self.config, self.tensors)

    @cached_property
    def spec(self) -> DecoderSpec:
        return self.family.spec(self.config)

    @cached_property
    def prompts(self) -> list[list[int]]:
        rng = np.random.default_rng(1)
        return [rng.integers(3, self.config["vocab_size"], n).tolist() for n in LENGTHS]

    @cached_property
    def hf_logits(self) -> list[np.ndarray]:
        return hf_reference.hf_logits(self.hf_model, self.prompts)

    @cached_property
    def logits(self) -> list[np.ndarray]:
        return harness.full_logits(self.model, self.prompts)

    @cached_property
    def greedy(self) -> list[list[int]]:
        return harness.greedy(self.model, self.prompts, NEW_TOKENS)

    @property
    def length_dependent(self) -> set[int]:
        """Prompts whose rope changes while they grow, so that a recomputation differs."""
        lengths = {
            scaling.original_length
            for layer in self.spec.layers
            if layer.mixer.position is not None
            and isinstance(scaling := layer.mixer.position.scaling, LongRope)
        }
        return {
            row
            for row, n in enumerate(LENGTHS)
            for length in lengths
            if n <= length < n + NEW_TOKENS
        }


CASES = [
    pytest.param((family, index), id=f"{family.name}-{index}")
    for family in list_families()
    for index in range(len(family.tiny))
]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, index = request.param
    hf_model = hf_reference.make_tiny(family.architectures[0], family.tiny[index])
    config, tensors = hf_reference.save(hf_model, tmp_path_factory.mktemp(family.name))
    return Case(family, hf_model, config, tensors)


def worst(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    """The largest difference, in standard deviations of the reference's logits."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
    largest = max(np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True))
    return float(largest / np.concatenate(list(theirs)).std())


# ---- numbers ---------------------------------------------------------------------------------


def test_logits_equal_the_reference(case: Case, record_property) -> None:
    error = worst(case.logits, case.hf_logits)
    record_property("worst_error", error)
    assert error <= TOLERANCE


def test_tiny_weights_make_logits_that_show_mistakes(case: Case) -> None:
    logits = np.concatenate(case.hf_logits)
    assert 0.1 < logits.std() < 20
    # Not a model that repeats its input.
    same = np.mean(
        [
            np.mean(rows.argmax(-1) == np.array(prompt))
            for rows, prompt in zip(case.hf_logits, case.prompts, strict=True)
        ]
    )
    assert same < 0.5


def test_chunked_prefill_equals_unchunked(case: Case) -> None:
    chunked = harness.ragged_logits(case.model, case.prompts)
    assert worst(chunked, case.logits) <= TOLERANCE / 10


def test_tokens_one_at_a_time_equal_the_whole_prompt(case: Case) -> None:
    single = harness.ragged_logits(case.model, case.prompts, chunks=(1,), seed=1)
    assert worst(single, case.logits) <= TOLERANCE / 10


def test_greedy_through_pages_equals_the_reference_with_cache(case: Case) -> None:
    for prompt, tokens in zip(case.prompts, case.greedy, strict=True):
        expected, _ = hf_reference.hf_greedy(case.hf_model, prompt, NEW_TOKENS)
        assert tokens == expected


def test_greedy_through_pages_equals_full_recompute(case: Case) -> None:
    recomputed = harness.greedy_recomputed(case.model, case.prompts, NEW_TOKENS)
    rows = [row for row in range(len(LENGTHS)) if row not in case.length_dependent]
    assert len(rows) >= 3
    assert [case.greedy[row] for row in rows] == [recomputed[row] for row in rows]


@pytest.mark.parametrize(("dp_size", "tp_size"), MESHES)
def test_sharded_equals_unsharded(case: Case, dp_size: int, tp_size: int) -> None:
    model = harness.load(case.config, case.tensors, dp_size=dp_size, tp_size=tp_size)
    # Eight partial sums added in another order than one: up to 1.01e-5 was seen, in float32.
    assert worst(harness.ragged_logits(model, case.prompts), case.logits) <= TOLERANCE / 5
    assert harness.greedy(model, case.prompts, NEW_TOKENS) == case.greedy


def test_sharding_splits_the_large_parameters(case: Case) -> None:
    model = harness.load(case.config, case.tensors, tp_size=8)
    split, total = 0, 0
    for leaf in jax.tree.leaves(model.params):
        local = leaf.addressable_shards[0].data.size
        total += leaf.size
        split += leaf.size if local * 8 == leaf.size else 0
    assert split > 0.98 * total


# ---- weights ---------------------------------------------------------------------------------


def test_weights_there_and_back_are_bit_exact(case: Case) -> None:
    plan = case.model.plan
    canonical = {
        name: plan.read(
            name,
            tuple(slice(0, n) for n in entry.shape),
            lambda stored, box: case.tensors[stored][box],
        )
        for name, entry in plan.entries.items()
    }
    rules = case.family.rules(case.config)
    back = weights.export(rules, harness.headers(canonical), case.tensors)
    assert set(back) == set(case.tensors)
    for name, original in case.tensors.items():
        whole = tuple(slice(0, n) for n in original.shape)
        again = back[name].read(whole, lambda stored, box: canonical[stored][box])
        assert again.dtype == original.dtype
        np.testing.assert_array_equal(again, original)


def test_every_stored_tensor_is_used(case: Case) -> None:
    assert case.model.plan.dropped == ()


def test_canonical_names_are_the_agreed_ones(case: Case) -> None:
    known = {
        *("pre_mixer_norm", "post_mixer_norm", "pre_ffn_norm", "post_ffn_norm", "mixer", "ffn"),
        *("embed", "norm"),
    }
    for name in case.model.plan.entries:
        parts = name.split(".")
        place = parts[3] if parts[:2] == ["decoder", "layers"] else parts[1]
        assert parts[0] == "lm_head" or (parts[0] == "decoder" and place in known), name


# ---- config ----------------------------------------------------------------------------------


def test_unknown_config_key_is_refused_by_name(case: Case) -> None:
    with pytest.raises(UnsupportedConfig, match="attn_scale_type") as error:
        case.family.spec({**case.config, "attn_scale_type": "x"})
    assert case.family.architectures[0] in str(error.value)
    assert case.family.home in str(error.value)


def test_unknown_activation_is_refused_by_name(case: Case) -> None:
    key = next(k for k in ("hidden_act", "hidden_activation") if k in case.config)
    with pytest.raises(UnsupportedConfig, match="mish"):
        case.family.spec({**case.config, key: "mish"})


def test_unknown_rope_scaling_is_refused_by_name(case: Case) -> None:
    config = {**legacy(case.config), "rope_scaling": {"rope_type": "spiral", "factor": 2.0}}
    with pytest.raises(UnsupportedConfig, match="spiral"):
        case.family.spec(config)


def test_missing_config_key_is_refused_by_name(case: Case) -> None:
    config = {key: value for key, value in case.config.items() if key != "num_hidden_layers"}
    with pytest.raises(UnsupportedConfig, match="num_hidden_layers"):
        case.family.spec(config)


def test_spec_is_hashable_and_equal_when_rebuilt(case: Case) -> None:
    again = case.family.spec(dict(reversed(case.config.items())))
    assert again == case.spec
    assert hash(again) == hash(case.spec)


def test_spec_differs_when_a_size_differs(case: Case) -> None:
    width = case.config["intermediate_size"] + 1
    assert case.family.spec({**case.config, "intermediate_size": width}) != case.spec


def test_legacy_config_spelling_gives_the_same_spec(case: Case) -> None:
    config = legacy(case.config)
    assert "rope_parameters" not in config
    assert case.family.spec(config) == case.spec


def legacy(config: Mapping[str, Any]) -> dict[str, Any]:
    """Spell a config.json as transformers 4 did."""
    out = {k: v for k, v in config.items() if k not in ("rope_parameters", "layer_types", "dtype")}
    out["torch_dtype"] = config["dtype"]
    rope = dict(config["rope_parameters"])
    if "full_attention" in rope:
        out["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = dict(rope["full_attention"])
    out["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        out["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    kind = rope.pop("rope_type")
    out["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    if "layer_types" in config and "use_sliding_window" not in config:
        del out["_sliding_window_pattern"]
        kinds = config["layer_types"]
        full = kinds.index("full_attention") if "full_attention" in kinds else len(kinds)
        out["sliding_window_pattern"] = full + 1
    return out


# ---- the registry's own promises -------------------------------------------------------------


@pytest.mark.parametrize("family", [pytest.param(f, id=f.name) for f in list_families()])
def test_every_family_has_tiny_configs_and_examples(family: Family) -> None:
    assert family.tiny, f"{family.home}: give register(..., tiny=[...]) at least one small config"
    assert family.examples


def test_family_files_stay_small() -> None:
    files = {family.home for family in list_families()}
    lines = [len((ROOT / home).read_text().splitlines()) for home in files]
    assert statistics.median(lines) <= 80, sorted(lines)
