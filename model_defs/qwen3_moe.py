"""Qwen 3 with experts: norms on each query and key head, nothing shared (arXiv:2505.09388)."""

from model_defs.decoder import DecoderSpec
from model_defs.hf_config import HFConfig
from model_defs.layers.mlp import MLP
from model_defs.layers.moe import MoE
from model_defs.qwen2_moe import (
    TINY_MOE,
    moe_weights,
    softmax_router,
    sparse_decoder,
)
from model_defs.qwen3 import qwen3_attention
from model_defs.registry import register


@register(
    "Qwen3MoeForCausalLM",
    weights=moe_weights,
    examples=("Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-235B-A22B-Instruct-2507"),
    tiny=(
        {**TINY_MOE, "head_dim": 24, "norm_topk_prob": True},
        {**TINY_MOE, "num_experts": 6, "mlp_only_layers": [0], "attention_bias": True},
    ),
)
def qwen3_moe(cfg: HFConfig) -> DecoderSpec:
    expert = MLP(cfg["moe_intermediate_size"], cfg.get("hidden_act", "silu"))
    return sparse_decoder(cfg, qwen3_attention(cfg), MoE(softmax_router(cfg), expert))
