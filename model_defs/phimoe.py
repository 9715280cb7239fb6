"""Phi-3.5-MoE: sixteen experts behind a SparseMixer router, layer norms with biases.

Abdin et al. 2024 (arXiv:2404.14219), Liu et al. 2024 (arXiv:2409.12136).
"""

from model_defs.decoder import DecoderSpec, Layer, PreNorm
from model_defs.hf_config import HFConfig
from model_defs.layers.attention import GQA, head_dim_from_hf
from model_defs.layers.embedding import LMHead
from model_defs.layers.mlp import MLP
from model_defs.layers.moe import MoE, SparseMixer
from model_defs.layers.norm import LayerNorm
from model_defs.layers.rope import rope_from_hf
from model_defs.llama import TINY
from model_defs.mixtral import mixtral_weights
from model_defs.registry import register

TINY_PHIMOE = {**TINY, "intermediate_size": 48, "num_local_experts": 8}


@register(
    "PhimoeForCausalLM",  # in transformers
    "PhiMoEForCausalLM",  # on the hub
    weights=mixtral_weights,
    ignored=("input_jitter_noise",),
    examples=("microsoft/Phi-3.5-MoE-instruct",),
    bfloat16_tolerance=0.04,
    tiny=(
        TINY_PHIMOE,
        {
            **TINY_PHIMOE,
            "num_local_experts": 5,
            "router_jitter_noise": 0.3,
            "attention_bias": True,
            "lm_head_bias": True,
            "sliding_window": 16,
            "max_position_embeddings": 128,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                # transformers keeps the short factors at every length; the model's own code does
                # not, so only the magnitudes differ here
                "short_factor": [1.0, 1.05, 1.1, 1.2, 1.5, 2.0, 3.0, 4.0],
                "long_factor": [1.0, 1.05, 1.1, 1.2, 1.5, 2.0, 3.0, 4.0],
                "short_mscale": 1.1,
                "long_mscale": 1.3,
                "original_max_position_embeddings": 32,
            },
        },
    ),
)
def phimoe(cfg: HFConfig) -> DecoderSpec:
    cfg.expect("num_experts_per_tok", 2)
    cfg.get("original_max_position_embeddings")  # read with the rope where it matters
    norm = LayerNorm(cfg["rms_norm_eps"])
    bias = cfg.get("attention_bias", False)
    mixer = GQA.from_hf(
        cfg,
        position=rope_from_hf(cfg, head_dim_from_hf(cfg), theta=1e6),
        window=cfg.get("sliding_window"),
        qkv_bias=bias,
        out_bias=bias,
    )
    router = SparseMixer(cfg.get("num_local_experts", 16), cfg.get("router_jitter_noise", 0.01))
    layer = Layer(mixer, MoE(router, MLP.from_hf(cfg)), PreNorm(norm))
    head = LMHead(bias=cfg.get("lm_head_bias", False))
    if head.bias:
        cfg.expect("tie_word_embeddings", False)
    return DecoderSpec.from_hf(
        cfg, layers=[layer] * cfg["num_hidden_layers"], final_norm=norm, head=head
    )
