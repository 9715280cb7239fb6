"""Every registered architecture against its reference, on tiny checkpoints.

An architecture without a case (see `cases.py`) fails the suite. What a mesh changes is tested in
`test_sharded_families.py`.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import transformers

from model_defs import weights
from model_defs.hf_config import UnsupportedConfig
from model_defs.registry import Family, ModelRegistry, list_families

from . import harness, hf_reference
from .cases import (
    BUFFER,
    FOLDERS,
    NEW_TOKENS,
    ROOT,
    TOLERANCE,
    Case,
    architecture_of,
    ragged,
    token_errors,
    worst,
)

MOST_REROUTED = 0.2  # of a text's tokens, for another expert; at most 12 of 78 in transformers

# ---- numbers ---------------------------------------------------------------------------------


def test_logits_equal_the_reference(case: Case, record_property) -> None:
    error = worst(case.logits, case.hf_logits)
    record_property("worst float32 error of the logits' std", error)
    assert error <= TOLERANCE


def test_bfloat16_logits_are_within_the_familys_tolerance(case: Case, record_property) -> None:
    """Of the same model in float32 with the same rounded weights: what computing so costs."""
    rounded = {name: array.astype(ml_dtypes.bfloat16) for name, array in case.tensors.items()}
    wide = {name: array.astype(np.float32) for name, array in rounded.items()}
    exact = harness.full_logits(harness.refilled(case.model, case.config, wide), case.prompts)
    model = harness.load(case.config, rounded, dtype=ml_dtypes.bfloat16)
    ours = token_errors(harness.full_logits(model, case.prompts), exact)
    theirs = None
    if case.saved is not None:
        hf_model = hf_reference.load_bfloat16(case.config["architectures"][0], case.saved)
        theirs = token_errors(hf_reference.hf_logits(hf_model, case.prompts), exact)
    error = rms(ours)
    if case.has_experts:
        # Between experts that score nearly the same rounding decides, and a token comes out
        # otherwise, in transformers as here: such tokens are few, and only counted.
        error = float(np.quantile(ours, 0.75))
        assert np.mean(ours > 4 * np.median(ours)) <= MOST_REROUTED
        assert theirs is None or np.median(ours) <= 1.25 * np.median(theirs)
    else:
        assert theirs is None or error <= 1.25 * rms(theirs)
    record_property("worst bfloat16 error of the logits' std, as RMS", error)
    assert error <= case.family.bfloat16_tolerance


def rms(errors: np.ndarray) -> float:
    return float(np.sqrt(np.square(errors).mean()))


def test_tiny_weights_make_logits_that_show_mistakes(case: Case) -> None:
    logits = np.concatenate(case.hf_logits)
    assert 0.1 < logits.std() < 20
    if case.spec.task != "generate":
        return
    # Not a model that repeats its input.
    same = np.mean(
        [
            np.mean(rows.argmax(-1) == np.array(prompt))
            for rows, prompt in zip(case.hf_logits, case.prompts, strict=True)
        ]
    )
    assert same < 0.5


def test_chunked_prefill_equals_unchunked(case: Case) -> None:
    assert worst(ragged(case, case.model), case.logits) <= TOLERANCE / 10


def test_tokens_one_at_a_time_equal_the_whole_prompt(case: Case) -> None:
    assert worst(ragged(case, case.model, chunks=(1,), seed=1), case.logits) <= TOLERANCE / 10


def test_greedy_through_pages_equals_the_reference_with_cache(case: Case) -> None:
    case.needs_lm_head()
    assert case.greedy == case.hf_greedy


def test_greedy_through_pages_equals_full_recompute(case: Case) -> None:
    case.needs_lm_head()
    recomputed = harness.greedy_recomputed(case.model, case.prompts, NEW_TOKENS)
    rows = [row for row in range(len(case.prompts)) if row not in case.length_dependent]
    assert len(rows) >= 3
    assert [case.greedy[row] for row in rows] == [recomputed[row] for row in rows]


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
    stored = {n: tensor for n, tensor in case.tensors.items() if not n.endswith(BUFFER)}
    back = weights.export(rules, harness.headers(canonical), stored)
    assert set(back) == set(stored)
    for name, original in stored.items():
        whole = tuple(slice(0, n) for n in original.shape)
        again = back[name].read(whole, lambda stored, box: canonical[stored][box])
        assert again.dtype == original.dtype
        np.testing.assert_array_equal(again, original)


def test_every_stored_tensor_is_used(case: Case) -> None:
    assert [name for name in case.model.plan.dropped if not name.endswith(BUFFER)] == []


def test_canonical_names_are_the_agreed_ones(case: Case) -> None:
    known = {
        *("pre_mixer_norm", "post_mixer_norm", "pre_ffn_norm", "post_ffn_norm", "mixer", "ffn"),
        *("embed", "norm"),
    }
    for name in case.model.plan.entries:
        parts = name.split(".")
        place = parts[3] if parts[:2] == ["decoder", "layers"] else parts[1]
        assert parts[0] in ("lm_head", "score") or (parts[0] == "decoder" and place in known), name


# ---- config ----------------------------------------------------------------------------------


def test_unknown_config_key_is_refused_by_name(case: Case) -> None:
    with pytest.raises(UnsupportedConfig, match="attn_scale_type") as error:
        case.family.spec({**case.config, "attn_scale_type": "x"})
    assert case.config["architectures"][0] in str(error.value)
    assert case.family.home in str(error.value)


def first_key(config: Mapping[str, Any], *names: str) -> str:
    """The name this config uses for something, out of those in use."""
    found = next((name for name in names if name in config), None)
    return found or pytest.skip(f"the config has none of {', '.join(names)}")


def test_unknown_activation_is_refused_by_name(case: Case) -> None:
    key = first_key(case.config, "hidden_act", "hidden_activation", "activation_function")
    with pytest.raises(UnsupportedConfig, match="mish"):
        case.family.spec({**case.config, key: "mish"})


def test_unknown_rope_scaling_is_refused_by_name(case: Case) -> None:
    config = {**legacy(case.config), "rope_scaling": {"rope_type": "spiral", "factor": 2.0}}
    with pytest.raises(UnsupportedConfig, match=r"spiral|rope_scaling"):
        case.family.spec(config)


def test_missing_config_key_is_refused_by_name(case: Case) -> None:
    key = first_key(case.config, "num_hidden_layers", "num_layers", "n_layers")
    config = {name: value for name, value in case.config.items() if name != key}
    with pytest.raises(UnsupportedConfig, match=key):
        case.family.spec(config)


def test_spec_is_hashable_and_equal_when_rebuilt(case: Case) -> None:
    again = case.family.spec(dict(reversed(case.config.items())))
    assert again == case.spec
    assert hash(again) == hash(case.spec)


def test_spec_differs_when_a_size_differs(case: Case) -> None:
    key = first_key(case.config, "vocab_size", "padded_vocab_size")
    assert case.family.spec({**case.config, key: case.config[key] + 1}) != case.spec


def test_legacy_config_spelling_gives_the_same_spec(case: Case) -> None:
    if "rope_parameters" not in case.config:
        pytest.skip("the config is spelled so already")
    config = legacy(case.config)
    assert "rope_parameters" not in config
    assert case.family.spec(config) == case.spec


def legacy(config: Mapping[str, Any]) -> dict[str, Any]:
    """Spell a config.json as transformers 4 did."""
    out = {k: v for k, v in config.items() if k not in ("rope_parameters", "layer_types", "dtype")}
    if "rope_parameters" not in config:
        return out
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
    if "_sliding_window_pattern" in config:
        del out["_sliding_window_pattern"]
        kinds = config["layer_types"]
        full = kinds.index("full_attention") if "full_attention" in kinds else len(kinds)
        out["sliding_window_pattern"] = full + 1
    return out


# ---- the registry's own promises -------------------------------------------------------------


@pytest.mark.parametrize("architecture", sorted(ModelRegistry.models))
def test_every_architecture_has_a_case(architecture: str) -> None:
    family = ModelRegistry.models[architecture]
    live = {
        fields.get("architectures", family.architectures)[0]
        for fields in family.tiny
        if hasattr(transformers, fields.get("architectures", family.architectures)[0])
    }
    golden = {architecture_of(folder) for folder in FOLDERS}
    # Names of one family that lead to the same spec and rules need one case together.
    names = {architecture} if _names_matter(family) else set(family.architectures)
    assert names & (live | golden), (
        f"{architecture}: give register(..., tiny=[...]) in {family.home} a small config, or "
        f"tests/goldens a checkpoint with outputs of the original code"
    )
    assert family.examples


def _names_matter(family: Family) -> bool:
    """Whether the family reads the architecture's name: its cases then name theirs."""
    return any("architectures" in fields for fields in family.tiny)


def test_family_files_stay_small() -> None:
    files = {family.home for family in list_families()}
    lines = [len((ROOT / home).read_text().splitlines()) for home in files]
    assert statistics.median(lines) < 60, sorted(lines)
