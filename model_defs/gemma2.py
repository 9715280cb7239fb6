"""Gemma 2: every other layer sees a window only, soft-capped scores and logits, sandwich norms.

Gemma Team 2024 (arXiv:2408.00118).
"""

from dataclasses import replace

from model_defs.decoder import DecoderSpec, Layer, SandwichNorm
from model_defs.gemma3 import gemma3_weights
from model_defs.heads import embeds, scores
from model_defs.hf_config import HFConfig
from model_defs.layers.attention import GQA
from model_defs.layers.mlp import MLP
from model_defs.layers.norm import RMSNorm
from model_defs.layers.rope import rope_from_hf
from model_defs.llama import TINY
from model_defs.registry import register

GEMMA2_TINY = {**TINY, "num_hidden_layers": 3, "head_dim": 24, "sliding_window": 8}


@register(
    "Gemma2ForCausalLM",
    weights=gemma3_weights,
    # The reference reads hidden_activation and sliding_window.
    ignored=("hidden_act", "sliding_window_size"),
    examples=("google/gemma-2-2b-it", "google/gemma-2-9b", "google/gemma-2-27b-it"),
    tiny=(
        {
            **GEMMA2_TINY,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
        {
            **GEMMA2_TINY,
            "num_key_value_heads": 4,
            "attention_bias": True,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "tie_word_embeddings": False,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
)
def gemma2(cfg: HFConfig) -> DecoderSpec:
    cfg.expect("use_bidirectional_attention", False)
    norm = RMSNorm(cfg["rms_norm_eps"], offset=1.0)  # the checkpoint stores the scale minus one
    bias = cfg.get("attention_bias", False)
    full = GQA.from_hf(
        cfg,
        position=rope_from_hf(cfg, cfg["head_dim"]),
        scale=cfg.get("query_pre_attn_scalar", 256) ** -0.5,
        softcap=cfg.nullable("attn_logit_softcapping", 50.0),
        qkv_bias=bias,
        out_bias=bias,
    )
    local = replace(full, window=cfg["sliding_window"])
    ffn = MLP(cfg["intermediate_size"], cfg.get("hidden_activation", "gelu_pytorch_tanh"))
    every = cfg.get("sliding_window_pattern", 2)
    kinds = cfg.layer_types(
        default=lambda i: "full_attention" if (i + 1) % every == 0 else "sliding_attention"
    )
    layers = [
        Layer(local if k == "sliding_attention" else full, ffn, SandwichNorm(norm)) for k in kinds
    ]
    return DecoderSpec.from_hf(
        cfg,
        layers=layers,
        final_norm=norm,
        tied=True,
        embed_scale=cfg["hidden_size"] ** 0.5,
        logit_softcap=cfg.nullable("final_logit_softcapping", 30.0),
    )


scores(
    gemma2,
    "Gemma2ForSequenceClassification",
    examples=("Skywork/Skywork-Reward-Gemma-2-27B-v0.2",),
    tiny=(
        {**GEMMA2_TINY, "query_pre_attn_scalar": 20, "num_labels": 1},
        {**GEMMA2_TINY, "attn_logit_softcapping": 5.0, "num_labels": 3},
    ),
)
embeds(gemma2, "Gemma2Model", examples=("BAAI/bge-multilingual-gemma2",), tiny=(GEMMA2_TINY,))
