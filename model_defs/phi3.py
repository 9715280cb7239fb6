"""Phi-3, Phi-3.5 and Phi-4 (and Phi-4-mini): Llama with fused projections and longrope.

Abdin et al. 2024 (arXiv:2404.14219).
"""

from model_defs.decoder import DecoderSpec, pre_norm_decoder
from model_defs.hf_config import HFConfig
from model_defs.layers.attention import GQA, head_dim_from_hf
from model_defs.layers.mlp import MLP
from model_defs.llama import HF_LLAMA, TINY, tied_head
from model_defs.registry import register
from model_defs.weights import Rule, Split


def phi3_weights(cfg: HFConfig) -> tuple[Rule, ...]:
    heads, dim = cfg["num_attention_heads"], head_dim_from_hf(cfg)
    kv_heads, width = cfg.get("num_key_value_heads", heads), cfg["intermediate_size"]
    return (
        *HF_LLAMA,
        Split(
            "qkv_proj",
            ("q_proj", "k_proj", "v_proj"),
            (heads * dim, kv_heads * dim, kv_heads * dim),
        ),
        Split("gate_up_proj", ("gate_proj", "up_proj"), (width, width)),
        *tied_head(cfg),
    )


@register(
    "Phi3ForCausalLM",
    weights=phi3_weights,
    examples=(
        "microsoft/Phi-3.5-mini-instruct",
        "microsoft/phi-4",
        "microsoft/Phi-4-mini-instruct",
    ),
    tiny=(
        TINY,
        {
            **TINY,
            "tie_word_embeddings": True,
            "sliding_window": 16,
            "max_position_embeddings": 128,
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.05, 1.1, 1.2, 1.5, 2.0],
                "long_factor": [1.1, 1.5, 2.0, 4.0, 6.0, 8.0],
            },
        },
    ),
)
def phi3(cfg: HFConfig) -> DecoderSpec:
    for key in ("attention_bias", "mlp_bias", "lm_head_bias"):
        cfg.expect(key, False)
    for key in ("full_attn_mod", "interpolate_factor"):
        cfg.expect(key, 1)
    cfg.get("original_max_position_embeddings")  # read with the rope where it matters
    mixer = GQA.with_rope(cfg, window=cfg.get("sliding_window"))
    return pre_norm_decoder(cfg, mixer, MLP.from_hf(cfg))
