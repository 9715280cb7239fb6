"""Qwen 3: Qwen 2 with a norm on each query and key head instead of biases (arXiv:2505.09388)."""

from model_defs.decoder import DecoderSpec
from model_defs.hf_config import HFConfig
from model_defs.layers.attention import GQA
from model_defs.layers.norm import RMSNorm
from model_defs.llama import TINY, llama_weights
from model_defs.qwen2 import windowed_decoder
from model_defs.registry import register


def qwen3_attention(cfg: HFConfig) -> GQA:
    bias = cfg.get("attention_bias", False)
    norm = RMSNorm(cfg["rms_norm_eps"])
    return GQA.with_rope(cfg, qk_norm=norm, qkv_bias=bias, out_bias=bias)


@register(
    "Qwen3ForCausalLM",
    weights=llama_weights,
    examples=("Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B", "Qwen/Qwen3-32B"),
    tiny=(
        {**TINY, "head_dim": 24},
        {
            **TINY,
            "head_dim": 16,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 1,
        },
    ),
)
def qwen3(cfg: HFConfig) -> DecoderSpec:
    cfg["head_dim"]  # where it is absent, the reference does not divide the hidden size
    return windowed_decoder(cfg, qwen3_attention(cfg))
