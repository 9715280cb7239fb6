"""Granite 3, dense: Llama with multipliers of scores, embeddings, branches and logits.

IBM 2024 (https://huggingface.co/ibm-granite/granite-3.3-8b-instruct).
"""

from model_defs.decoder import DecoderSpec, pre_norm_decoder
from model_defs.hf_config import HFConfig
from model_defs.layers.attention import GQA
from model_defs.layers.mlp import MLP
from model_defs.layers.moe import MoE
from model_defs.llama import TINY, llama_weights
from model_defs.registry import register

TINY_GRANITE = {
    **TINY,
    "attention_multiplier": 0.1,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "logits_scaling": 2.0,
}


@register(
    "GraniteForCausalLM",
    weights=llama_weights,
    examples=("ibm-granite/granite-3.3-8b-instruct", "ibm-granite/granite-3.1-2b-instruct"),
    tiny=(
        TINY_GRANITE,
        {
            **TINY_GRANITE,
            "num_key_value_heads": 4,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "logits_scaling": 0.5,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
        },
    ),
)
def granite(cfg: HFConfig) -> DecoderSpec:
    return granite_decoder(cfg, MLP.from_hf(cfg, bias=cfg.get("mlp_bias", False)))


def granite_decoder(cfg: HFConfig, ffn: MLP | MoE) -> DecoderSpec:
    """Equal layers around `ffn`; the scores are multiplied by `attention_multiplier` alone."""
    bias = cfg.get("attention_bias", False)
    scale = cfg.get("attention_multiplier", 1.0)
    return pre_norm_decoder(
        cfg,
        GQA.with_rope(cfg, scale=scale, qkv_bias=bias, out_bias=bias),
        ffn,
        branch_scale=cfg.get("residual_multiplier", 1.0),
        embed_scale=cfg.get("embedding_multiplier", 1.0),
        logit_scale=1 / cfg.get("logits_scaling", 1.0),
    )
