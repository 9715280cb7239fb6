"""Command-R, Command-R+ and Aya: parallel branches from one norm, interleaved rope, scaled logits.

Model cards of CohereForAI/c4ai-command-r-v01 and c4ai-command-r-plus.
"""

from collections.abc import Sequence

from model_defs.decoder import DecoderSpec, Layer, Norms
from model_defs.hf_config import HFConfig
from model_defs.layers.attention import GQA, head_dim_from_hf
from model_defs.layers.mlp import MLP
from model_defs.layers.norm import LayerNorm
from model_defs.layers.rope import rope_from_hf
from model_defs.llama import HF_LLAMA, TINY, tied_head
from model_defs.registry import register
from model_defs.weights import Rule


def cohere_weights(cfg: HFConfig) -> tuple[Rule, ...]:
    return (*HF_LLAMA, *tied_head(cfg, default=True))


def cohere_norm(cfg: HFConfig) -> LayerNorm:
    return LayerNorm(cfg.get("layer_norm_eps", 1e-5), bias=False)


def cohere_decoder(cfg: HFConfig, mixers: Sequence[GQA]) -> DecoderSpec:
    """Layers around `mixers`, one for each, and what follows them."""
    norm, ffn = cohere_norm(cfg), MLP.from_hf(cfg)
    return DecoderSpec.from_hf(
        cfg,
        layers=[Layer(mixer, ffn, Norms(pre_mixer=norm), parallel=True) for mixer in mixers],
        final_norm=norm,
        tied=True,
        logit_scale=cfg.get("logit_scale", 0.0625),
    )


@register(
    "CohereForCausalLM",
    weights=cohere_weights,
    ignored=("model_max_length", "pretraining_tp"),
    examples=("CohereForAI/c4ai-command-r-v01", "CohereForAI/c4ai-command-r-plus"),
    tiny=(
        {**TINY, "logit_scale": 0.3},
        {
            **TINY,
            "num_key_value_heads": 4,
            "use_qk_norm": True,
            "logit_scale": 0.5,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
        {**TINY, "use_qk_norm": True, "logit_scale": 1.0},
    ),
)
def cohere(cfg: HFConfig) -> DecoderSpec:
    bias = cfg.get("attention_bias", False)
    mixer = GQA.from_hf(
        cfg,
        position=rope_from_hf(cfg, head_dim_from_hf(cfg), theta=500000.0, interleaved=True),
        qk_norm=cohere_norm(cfg) if cfg.get("use_qk_norm", False) else None,
        qk_norm_over="each_head",
        qkv_bias=bias,
        out_bias=bias,
    )
    return cohere_decoder(cfg, [mixer] * cfg["num_hidden_layers"])
