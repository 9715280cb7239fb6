"""Mixtral: Mistral whose feed-forward networks are experts, two of which each token visits.

Jiang et al. 2024 (arXiv:2401.04088).
"""

from model_defs.decoder import DecoderSpec, pre_norm_decoder
from model_defs.hf_config import HFConfig
from model_defs.layers.attention import GQA
from model_defs.layers.mlp import MLP
from model_defs.layers.moe import MoE, SoftmaxTopK
from model_defs.llama import HF_LLAMA, TINY, tied_head
from model_defs.registry import register
from model_defs.weights import Rename, Rule


def mixtral_weights(cfg: HFConfig) -> tuple[Rule, ...]:
    return (
        *HF_LLAMA,
        Rename("block_sparse_moe", "ffn"),
        Rename("gate", "router"),
        Rename("w1", "gate_proj"),
        Rename("w3", "up_proj"),
        Rename("w2", "down_proj"),
        *tied_head(cfg),
    )


@register(
    "MixtralForCausalLM",
    weights=mixtral_weights,
    ignored=("router_jitter_noise",),
    examples=("mistralai/Mixtral-8x7B-Instruct-v0.1", "mistralai/Mixtral-8x22B-Instruct-v0.1"),
    tiny=(
        {**TINY, "intermediate_size": 48},
        {
            **TINY,
            "intermediate_size": 48,
            "head_dim": 24,
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "sliding_window": 8,
            "tie_word_embeddings": True,
        },
    ),
)
def mixtral(cfg: HFConfig) -> DecoderSpec:
    router = SoftmaxTopK(
        cfg.get("num_local_experts", 8), cfg.get("num_experts_per_tok", 2), renormalize=True
    )
    mixer = GQA.with_rope(cfg, window=cfg.get("sliding_window"))
    return pre_norm_decoder(cfg, mixer, MoE(router, MLP.from_hf(cfg)))
