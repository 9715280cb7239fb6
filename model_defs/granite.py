"""Granite 3, dense: Llama with multipliers of scores, embeddings, branches and logits.

IBM 2024 (https://huggingface.co/ibm-granite/granite-3.3-8b-instruct).
"""

from model_defs.decoder import DecoderSpec, Layer, PreNorm
from model_defs.hf_config import HFConfig
from model_defs.layers.attention import GQA, head_dim_from_hf
from model_defs.layers.mlp import MLP
from model_defs.layers.norm import RMSNorm
from model_defs.layers.rope import rope_from_hf
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
    norm = RMSNorm(cfg["rms_norm_eps"])
    layer = Layer(
        mixer=granite_attention(cfg),
        ffn=MLP.from_hf(cfg, bias=cfg.get("mlp_bias", False)),
        norms=PreNorm(norm),
        branch_scale=cfg.get("residual_multiplier", 1.0),
    )
    return granite_decoder(cfg, layer)


def granite_attention(cfg: HFConfig) -> GQA:
    """Attention whose scores are multiplied by `attention_multiplier` alone."""
    bias = cfg.get("attention_bias", False)
    return GQA.from_hf(
        cfg,
        position=rope_from_hf(cfg, head_dim_from_hf(cfg)),
        scale=cfg.get("attention_multiplier", 1.0),
        qkv_bias=bias,
        out_bias=bias,
    )


def granite_decoder(cfg: HFConfig, layer: Layer) -> DecoderSpec:
    """A decoder of equal layers with scaled embeddings and logits."""
    return DecoderSpec.from_hf(
        cfg,
        layers=[layer] * cfg["num_hidden_layers"],
        final_norm=RMSNorm(cfg["rms_norm_eps"]),
        embed_scale=cfg.get("embedding_multiplier", 1.0),
        logit_scale=1 / cfg.get("logits_scaling", 1.0),
    )
