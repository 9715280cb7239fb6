"""Every registered architecture against its reference, on tiny checkpoints.

Cases come from the registry and need no entry here. A family's `tiny` configs are run live against
transformers' own class; the folders of `tests/goldens` hold checkpoints in their original layout
with stored outputs of the original code, for architectures that transformers lacks. An architecture
without a case fails the suite.

"Logits" are what the model's head gives at every position: scores of the vocabulary, scores of a
text that ends there, or the hidden states an embedding is pooled from.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from flax import nnx
from safetensors.numpy import load_file

from model_defs import weights
from model_defs.decoder import DecoderSpec, placements
from model_defs.hf_config import UnsupportedConfig
from model_defs.layers.moe import MoE
from model_defs.layers.rope import DynamicNTK, LongRope, PromptNTK
from model_defs.registry import Family, ModelRegistry, family_of, list_families

from . import harness, hf_reference

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = ROOT / "tests" / "goldens"
LENGTHS = (1, 9, 23, 45)  # shorter and longer than the tiny windows (8, 16) and lengths (32)
NEW_TOKENS = 12
MESHES = ((1, 2), (1, 4), (1, 8), (2, 1))
TOLERANCE = 1e-4  # of the logits' standard deviation
BUFFER = ".inv_freq"  # old checkpoints carry the rope's frequencies; they are no weights


@dataclass
class Case:
    """One tiny checkpoint, its reference's outputs and its model.

    Attributes:
        hf_logits: of every position of each prompt, run alone.
        hf_greedy: the reference's greedy tokens with its KV cache; empty without an LM head.
        live: transformers' own configuration class wrote the config.
    """

    family: Family
    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    prompts: list[list[int]]
    hf_logits: list[np.ndarray]
    hf_greedy: list[list[int]]
    live: bool

    @cached_property
    def model(self) -> harness.Model:
        return harness.load(self.config, self.tensors)

    @cached_property
    def spec(self) -> DecoderSpec:
        return self.family.spec(self.config)

    @cached_property
    def logits(self) -> list[np.ndarray]:
        return harness.full_logits(self.model, self.prompts)

    @cached_property
    def greedy(self) -> list[list[int]]:
        return greedy(self.model, self.prompts)

    def needs_lm_head(self) -> None:
        if self.spec.task != "generate":
            pytest.skip(f"a model for '{self.spec.task}' writes no text")

    @property
    def length_dependent(self) -> set[int]:
        """Prompts whose rope changes while they grow, so that a recomputation differs."""
        scalings = {
            scaling
            for layer in self.spec.layers
            if (scaling := getattr(layer.mixer.position, "scaling", None)) is not None
        }
        return {
            row
            for row, prompt in enumerate(self.prompts)
            for scaling in scalings
            if _changes(scaling, len(prompt), len(prompt) + NEW_TOKENS)
        }


def _changes(scaling: Any, start: int, stop: int) -> bool:
    if isinstance(scaling, LongRope):
        return start <= scaling.original_length < stop
    return isinstance(scaling, DynamicNTK | PromptNTK) and stop > scaling.original_length


def live_case(family: Family, index: int, folder: Path) -> Case:
    """A random model of transformers' class, saved and read back."""
    fields = dict(family.tiny[index])
    (architecture,) = fields.pop("architectures", family.architectures[:1])
    hf_model = hf_reference.make_tiny(architecture, fields)
    config, tensors = hf_reference.save(hf_model, folder)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, config["vocab_size"], n).tolist() for n in LENGTHS]
    greedy = []
    if hf_reference.has_lm_head(hf_model):
        greedy = [hf_reference.hf_greedy(hf_model, p, NEW_TOKENS)[0] for p in prompts]
    logits = hf_reference.hf_logits(hf_model, prompts)
    return Case(family, config, tensors, prompts, logits, greedy, live=True)


def golden_case(folder: Path) -> Case:
    """A stored checkpoint with the outputs of the original code."""
    config = json.loads((folder / "config.json").read_text())
    with np.load(folder / "golden.npz") as arrays:
        lengths = arrays["lengths"]
        names = ("logits", "scores_every_position", "last_hidden")
        outputs = next(arrays[name] for name in names if name in arrays)
        logits = [rows[:n].reshape(n, -1) for rows, n in zip(outputs, lengths, strict=True)]
        ids = arrays["input_ids"]
        prompts = [row[:n].tolist() for row, n in zip(ids, lengths, strict=True)]
        greedy = arrays["greedy_cached"] if "greedy_cached" in arrays else arrays.get("greedy", [])
    greedy = [row[:NEW_TOKENS].tolist() for row in greedy]
    tensors = load_file(folder / "model.safetensors")
    return Case(family_of(config), config, tensors, prompts, logits, greedy, live=False)


def _architecture_of(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["architectures"][0]


FOLDERS = sorted(GOLDENS.iterdir())
CASES = [
    pytest.param((family, index), id=f"{family.name}-{index}")
    for family in list_families()
    for index in range(len(family.tiny))
] + [pytest.param((None, folder), id=folder.name.replace("-a", "-golden")) for folder in FOLDERS]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, which = request.param
    if family is None:
        return golden_case(which)
    return live_case(family, which, tmp_path_factory.mktemp(family.name))


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


def greedy(model: harness.Model, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    return [
        tokens
        for group in harness.batches(prompts)
        for tokens in harness.greedy(model, group, NEW_TOKENS)
    ]


def ragged(case: Case, model: harness.Model, **options: Any) -> list[np.ndarray]:
    return [
        logits
        for prompts in harness.batches(case.prompts)
        for logits in harness.ragged_logits(model, prompts, **options)
    ]


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


@pytest.mark.parametrize(("dp_size", "tp_size"), MESHES)
def test_sharded_equals_unsharded(case: Case, dp_size: int, tp_size: int) -> None:
    check_mesh(case, harness.load(case.config, case.tensors, dp_size=dp_size, tp_size=tp_size))


def test_experts_over_their_own_mesh_axis_equal_unsharded(case: Case) -> None:
    if not any(isinstance(layer.ffn, MoE) for layer in case.spec.layers):
        pytest.skip("a model without experts")
    check_mesh(case, harness.load(case.config, case.tensors, tp_size=4, ep_size=2))


def check_mesh(case: Case, model: harness.Model) -> None:
    # Eight partial sums added in another order than one: up to 1.01e-5 was seen, in float32.
    assert worst(ragged(case, model), case.logits) <= TOLERANCE / 5
    if case.spec.task == "generate":
        tokens = [
            tokens
            for prompts in harness.batches(case.prompts)
            for tokens in harness.greedy(model, prompts, NEW_TOKENS)
        ]
        assert tokens == case.greedy


# Axes of matrices that every device keeps whole, because all of its heads or tokens need them: the
# shared latents of MLA, a router's scores, a text's scores. Small beside the model at real sizes.
WHOLE = {"q_rank", "kv_rank", "router_scores", "gate", "labels", "score_hidden"}


def test_sharding_splits_the_large_parameters(case: Case) -> None:
    model = harness.load(case.config, case.tensors, tp_size=8)
    split, total = 0, 0
    placed = placements(model.module)
    for path, param in nnx.to_flat_state(model.params):
        local = param[...].addressable_shards[0].data.size
        axes = {axis.name for w in placed[path].weights for dim in w.dims for axis in dim}
        if local * 8 != param.size and axes & WHOLE:
            continue
        total += param.size
        split += param.size if local * 8 == param.size else 0
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
    golden = {_architecture_of(folder) for folder in FOLDERS}
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
    assert statistics.median(lines) <= 80, sorted(lines)
