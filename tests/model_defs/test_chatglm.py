"""The flags of ChatGLM's config.json: each is read whatever the others say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from model_defs.hf_config import UnsupportedConfig
from model_defs.layers.norm import LayerNorm
from model_defs.registry import family_of

GOLDEN = Path(__file__).resolve().parents[1] / "goldens" / "chatglm2-a" / "config.json"
CONFIG = json.loads(GOLDEN.read_text())  # 10 heads, 5 groups, biases on q, k and v only


def spec_of(**changes):
    config = {**CONFIG, **changes}
    return family_of(config).spec(config)


@pytest.mark.parametrize("qkv", [True, False])
@pytest.mark.parametrize("everywhere", [True, False])
def test_biases(everywhere: bool, qkv: bool) -> None:
    layer = spec_of(add_bias_linear=everywhere, add_qkv_bias=qkv).layers[0]
    assert layer.mixer.qkv_bias == (everywhere or qkv)
    assert layer.mixer.out_bias == layer.ffn.bias == everywhere


def test_without_multi_query_attention_every_head_has_its_own_keys() -> None:
    assert spec_of().layers[0].mixer.kv_heads == 5
    assert spec_of(multi_query_attention=False).layers[0].mixer.kv_heads == 10


def test_norms_and_residuals() -> None:
    plain = spec_of()
    assert spec_of(rmsnorm=False).final_norm == LayerNorm(plain.final_norm.eps)
    after = spec_of(apply_residual_connection_post_layernorm=True)
    assert after.layers[0] == replace(plain.layers[0], residual_after_norm=True)


def test_rope_ratio_multiplies_the_base() -> None:
    rope = spec_of(rope_ratio=50).layers[0].mixer.position
    assert (rope.theta, rope.dim, rope.interleaved) == (500000.0, 4, True)


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("original_rope", {"original_rope": False}),
        ("post_layer_norm", {"post_layer_norm": False}),
        ("pre_seq_len", {"pre_seq_len": 128}),
        ("quantization_bit", {"quantization_bit": 4}),
        ("tie_word_embeddings", {"tie_word_embeddings": True}),
        ("rope_ratio", {"_name_or_path": "THUDM/chatglm2-6b-32k", "rope_ratio": 16}),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(key: str, changes: dict) -> None:
    with pytest.raises(UnsupportedConfig, match=key):
        spec_of(**changes)
