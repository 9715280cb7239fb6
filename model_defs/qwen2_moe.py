"""Qwen 1.5 and 2 with experts: Qwen 2, and beside the experts a network all tokens visit, gated.

https://qwenlm.github.io/blog/qwen-moe, arXiv:2407.10671.
"""

from model_defs.decoder import DecoderSpec, Layer, PreNorm
from model_defs.hf_config import HFConfig
from model_defs.layers.attention import GQA
from model_defs.layers.mlp import MLP
from model_defs.layers.moe import MoE, SoftmaxTopK
from model_defs.layers.norm import RMSNorm
from model_defs.llama import TINY, llama_weights
from model_defs.registry import register
from model_defs.weights import Rename, Rule


def moe_weights(cfg: HFConfig) -> tuple[Rule, ...]:
    return (
        *llama_weights(cfg),
        Rename("gate", "router"),
        Rename("shared_expert", "shared"),
        Rename("shared_expert_gate", "shared_gate"),
    )


def softmax_router(cfg: HFConfig) -> SoftmaxTopK:
    """Read the router under its usual names."""
    experts = cfg.get("num_local_experts") or cfg["num_experts"]
    return SoftmaxTopK(experts, cfg["num_experts_per_tok"], cfg.get("norm_topk_prob", False))


def sparse_decoder(cfg: HFConfig, attention: GQA, moe: MoE) -> DecoderSpec:
    """Equal layers but for those the config keeps dense."""
    cfg.expect("use_sliding_window", False)
    for key in ("sliding_window", "max_window_layers"):
        cfg.get(key)  # they mean nothing without use_sliding_window
    norm, dense = RMSNorm(cfg["rms_norm_eps"]), MLP.from_hf(cfg)
    every, not_sparse = cfg.get("decoder_sparse_step", 1), cfg.get("mlp_only_layers", [])
    kinds = cfg.layer_types(default=lambda i: "full_attention", allowed=("full_attention",))
    sparse = [i not in not_sparse and (i + 1) % every == 0 for i in range(len(kinds))]
    layers = [Layer(attention, moe if s else dense, PreNorm(norm)) for s in sparse]
    return DecoderSpec.from_hf(cfg, layers=layers, final_norm=norm)


TINY_MOE = {**TINY, "moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3}


@register(
    "Qwen2MoeForCausalLM",
    weights=moe_weights,
    examples=("Qwen/Qwen1.5-MoE-A2.7B-Chat", "Qwen/Qwen2-57B-A14B-Instruct"),
    bfloat16_tolerance=0.03,
    tiny=(
        {**TINY_MOE, "shared_expert_intermediate_size": 48},
        {
            **TINY_MOE,
            "num_hidden_layers": 4,
            "num_experts": 6,
            "norm_topk_prob": True,
            "shared_expert_intermediate_size": 40,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "qkv_bias": False,
            "tie_word_embeddings": True,
        },
    ),
)
def qwen2_moe(cfg: HFConfig) -> DecoderSpec:
    act = cfg.get("hidden_act", "silu")
    moe = MoE(
        softmax_router(cfg),
        MLP(cfg["moe_intermediate_size"], act),
        shared=MLP(cfg["shared_expert_intermediate_size"], act),
        shared_gate=True,
    )
    return sparse_decoder(cfg, GQA.with_rope(cfg, qkv_bias=cfg.get("qkv_bias", True)), moe)
