"""MiniCPM 3: latent attention, with scaled embeddings, branches and logits.

Hu et al. 2024 (arXiv:2404.06395, section 3.2 and appendix A.1) for the scales.
"""

from model_defs.decoder import DecoderSpec, pre_norm_decoder
from model_defs.deepseek_v2 import HF_MLA, latent_attention
from model_defs.hf_config import HFConfig
from model_defs.layers.mlp import MLP
from model_defs.llama import TINY, tied_head
from model_defs.registry import register
from model_defs.weights import Rule


def minicpm3_weights(cfg: HFConfig) -> tuple[Rule, ...]:
    return (*HF_MLA, *tied_head(cfg, default=True))


@register(
    "MiniCPM3ForCausalLM",
    weights=minicpm3_weights,
    examples=("openbmb/MiniCPM3-4B",),
    tiny=(
        {
            **TINY,
            "num_key_value_heads": 4,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "scale_emb": 3,
            "dim_model_base": 32,
            "tie_word_embeddings": True,
        },
        {
            **TINY,
            "num_key_value_heads": 4,
            "q_lora_rank": None,
            "kv_lora_rank": 24,
            "qk_nope_head_dim": 12,
            "qk_rope_head_dim": 4,
            "v_head_dim": 10,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "scale_depth": 2.5,
            "dim_model_base": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "factor": 1.0,
                "original_max_position_embeddings": 512,
                "short_factor": [1.0, 2.5],
                "long_factor": [1.5, 4.0],
            },
        },
    ),
)
def minicpm3(cfg: HFConfig) -> DecoderSpec:
    cfg.expect("pretraining_tp", 1)
    cfg.expect("mlp_bias", False)
    depth = cfg["num_hidden_layers"]
    return pre_norm_decoder(
        cfg,
        latent_attention(cfg, interleaved=False),
        MLP.from_hf(cfg),
        branch_scale=cfg.get("scale_depth", depth**0.5) / depth**0.5,
        tied=True,
        embed_scale=cfg.get("scale_emb", 12),
        logit_scale=cfg.get("dim_model_base", cfg["hidden_size"]) / cfg["hidden_size"],
    )
