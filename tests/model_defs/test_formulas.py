"""What a config.json may say that no stored checkpoint does, against the families' formulas."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from model_defs.registry import family_of

from . import formulas, harness
from .cases import GOLDENS, TOLERANCE, golden_case, ragged, worst
from .cases import Case as GoldenCase

FORMULAS: dict[str, Callable[..., np.ndarray]] = {
    "baichuan2_13b-a": formulas.baichuan,
    "baichuan2_7b-a": formulas.baichuan,
    "chatglm2-a": formulas.chatglm,
    "chatglm3-a": formulas.chatglm,
    "deepseek_moe-a": formulas.deepseek_moe,
    "exaone-a": formulas.exaone,
    "glm4_chatglm-a": formulas.chatglm,
    "grok1-a": formulas.grok1,
    "internlm2-a": formulas.internlm2,
    "internlm2_reward-a": formulas.internlm2,
    "minicpm-a": formulas.llama,
    "phi3small-a": formulas.phi3small,
    "qwen-a": formulas.qwen,
    "xverse-a": formulas.llama,
    "xverse_moe-a": formulas.llama,
}
LENGTHS = (1, 7, 18, 45)

LINEAR = {"type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SU = {
    "type": "su",
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0, 2.5],
    "long_factor": [1.1, 1.5, 2.0, 3.0, 4.5, 6.0, 8.0, 11.0],
    "original_max_position_embeddings": 20,
}
# By the stored checkpoint whose config they change.
VARIANTS = {
    "10 heads": ("baichuan2_13b-a", {"hidden_size": 80, "num_attention_heads": 10}),
    "plain head": ("baichuan2_7b-a", {"vocab_size": 64000}),
    "plain head, slopes": ("baichuan2_13b-a", {"vocab_size": 64000}),
    "one key per head": ("chatglm2-a", {"multi_query_attention": False}),
    "layer norms": ("chatglm2-a", {"rmsnorm": False, "add_qkv_bias": False}),
    "biases, residual after the norm": (
        "chatglm3-a",
        {
            **{"kv_channels": 12, "num_attention_heads": 6, "multi_query_group_num": 3},
            **{"add_bias_linear": True, "apply_residual_connection_post_layernorm": True},
        },
    ),
    "four groups, larger base": (
        "glm4_chatglm-a",
        {"multi_query_group_num": 4, "num_attention_heads": 8, "rope_ratio": 10000},
    ),
    "every other layer sparse": (
        "deepseek_moe-a",
        {
            **{"num_hidden_layers": 3, "moe_layer_freq": 2, "first_k_dense_replace": 0},
            **{"attention_bias": True, "norm_topk_prob": True, "rope_scaling": LINEAR},
        },
    ),
    "nothing shared": ("deepseek_moe-a", {"n_shared_experts": None, "num_key_value_heads": 2}),
    "scaled by wavelength, tied": (
        "exaone-a",
        {"rope_scaling": LLAMA3, "rope_theta": 1e6, "tie_word_embeddings": True},
    ),
    "a head of its own, low cap": ("grok1-a", {"tie_word_embeddings": False, "max_attn_value": 5}),
    "the other GELU": ("grok1-a", {"hidden_act": "gelu_pytorch_tanh", "num_experts": 5}),
    "growing base": (
        "internlm2-a",
        {
            **{"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16},
            **{"bias": True, "num_key_value_heads": 1},
        },
    ),
    "slower rope": ("internlm2-a", {"rope_scaling": LINEAR}),
    "rewards, growing base": (
        "internlm2_reward-a",
        {"rope_scaling": {"type": "dynamic", "factor": 3.0}, "max_position_embeddings": 20},
    ),
    "a head of its own, grouped": (
        "minicpm-a",
        {
            **{"tie_word_embeddings": False, "num_key_value_heads": 2, "dim_model_base": 16},
            **{"scale_emb": 3, "scale_depth": 2.5, "num_hidden_layers": 3},
        },
    ),
    "long, with magnitudes": (
        "phi3small-a",
        {"rope_scaling": {**SU, "short_mscale": 1.1, "long_mscale": 1.3}},
    ),
    "long, usual magnitudes": ("phi3small-a", {"rope_scaling": SU}),
    "all layers sparse, all heads alike": (
        "phi3small-a",
        {
            **{"dense_attention_every_n_layers": None, "blocksparse_homo_head_pattern": True},
            **{"blocksparse_block_size": 4, "gegelu_limit": None, "mup_use_scaling": False},
        },
    ),
    "small blocks, heads apart": (
        "phi3small-a",
        {
            **{"blocksparse_block_size": 4, "blocksparse_vert_stride": 8, "gegelu_limit": 0.5},
            **{"rope_position_scale": 0.25},
        },
    ),
    "long prompts": (
        "qwen-a",
        {"seq_length": 16, "no_bias": False, "rotary_pct": 0.5, "kv_channels": 16},
    ),
    "long prompts, base kept": ("qwen-a", {"seq_length": 16, "use_dynamic_ntk": False}),
    "long prompts, queries kept": ("qwen-a", {"seq_length": 16, "use_logn_attn": False}),
    "experts, nothing shared": ("xverse_moe-a", {"num_shared_experts": 0, "moe_top_k": 3}),
}


def golden_config(name: str) -> dict[str, Any]:
    return json.loads((GOLDENS / name / "config.json").read_text())


@pytest.mark.parametrize("golden", FORMULAS)
def test_formulas_equal_the_stored_outputs_of_the_original_code(golden: str) -> None:
    case = golden_case(GOLDENS / golden)
    given = formulas.Checkpoint(case.tensors)
    ours = [FORMULAS[golden](case.config, given, prompt) for prompt in case.prompts]
    assert worst(ours, case.hf_logits) < TOLERANCE / 10


def test_the_other_gelu_equals_the_stored_outputs_of_the_other_code() -> None:
    """One checkpoint, two implementations with different activations: the config says which."""
    case = golden_case(GOLDENS / "grok1-a")
    with np.load(GOLDENS / "grok1-a" / "golden.npz") as arrays:
        both = {"gelu": arrays["logits"], "gelu_pytorch_tanh": arrays["logits_gelu_tanh"]}
    assert np.abs(both["gelu"] - both["gelu_pytorch_tanh"]).max() > 1e-3
    for act, logits in both.items():
        model = harness.load({**case.config, "hidden_act": act}, case.tensors)
        expected = [rows[: len(prompt)] for rows, prompt in zip(logits, case.prompts, strict=True)]
        assert worst(harness.full_logits(model, case.prompts), expected) <= TOLERANCE


@pytest.mark.parametrize(("golden", "changes"), VARIANTS.values(), ids=VARIANTS)
def test_a_variant_equals_its_formulas(golden: str, changes: dict[str, Any]) -> None:
    config, formula = {**golden_config(golden), **changes}, FORMULAS[golden]
    checkpoint = formulas.Checkpoint()
    rng = np.random.default_rng(1)
    top = min(config.get("padded_vocab_size", 259), 259)
    prompts = [rng.integers(3, top, length).tolist() for length in LENGTHS]
    expected = [formula(config, checkpoint, prompt) for prompt in prompts]
    plain = [formula(golden_config(golden), formulas.Checkpoint(), p) for p in prompts]
    if plain[0].shape == expected[0].shape:
        assert worst(expected, plain) > 100 * TOLERANCE  # the change is one that matters

    model = harness.load(config, checkpoint.tensors)
    case = GoldenCase(family_of(config), config, checkpoint.tensors, prompts, expected, [])
    assert worst(harness.full_logits(model, prompts), expected) <= TOLERANCE
    assert worst(ragged(case, model), expected) <= TOLERANCE
