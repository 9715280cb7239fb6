"""OLMoE: many small experts; norms over all query heads together and over all key heads.

Muennighoff et al. 2024 (arXiv:2409.02060).
"""

from model_defs.decoder import DecoderSpec, pre_norm_decoder
from model_defs.hf_config import HFConfig
from model_defs.layers.attention import GQA
from model_defs.layers.mlp import MLP
from model_defs.layers.moe import MoE
from model_defs.layers.norm import RMSNorm
from model_defs.llama import TINY
from model_defs.qwen2_moe import moe_weights, softmax_router
from model_defs.registry import register

TINY_EXPERTS = {**TINY, "intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3}


@register(
    "OlmoeForCausalLM",
    weights=moe_weights,
    examples=("allenai/OLMoE-1B-7B-0125-Instruct", "allenai/OLMoE-1B-7B-0924"),
    tiny=(
        TINY_EXPERTS,
        {
            **TINY_EXPERTS,
            "num_key_value_heads": 4,
            "attention_bias": True,
            "clip_qkv": 0.8,
            "norm_topk_prob": True,
        },
    ),
)
def olmoe(cfg: HFConfig) -> DecoderSpec:
    bias = cfg.get("attention_bias", False)
    mixer = GQA.with_rope(
        cfg,
        qk_norm=RMSNorm(cfg["rms_norm_eps"]),
        qk_norm_over="all_heads",
        clip=cfg.get("clip_qkv"),
        qkv_bias=bias,
        out_bias=bias,
    )
    return pre_norm_decoder(cfg, mixer, MoE(softmax_router(cfg), MLP.from_hf(cfg)))
