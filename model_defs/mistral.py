"""Mistral 7B, NeMo and Small 3: Llama with an optional sliding window (arXiv:2310.06825)."""

from model_defs.decoder import DecoderSpec, pre_norm_decoder
from model_defs.heads import embeds
from model_defs.hf_config import HFConfig
from model_defs.layers.attention import GQA
from model_defs.layers.mlp import MLP
from model_defs.llama import TINY, llama_weights
from model_defs.registry import register


@register(
    "MistralForCausalLM",
    weights=llama_weights,
    examples=("mistralai/Mistral-7B-Instruct-v0.3", "mistralai/Mistral-Small-24B-Instruct-2501"),
    tiny=(
        {**TINY, "sliding_window": None},
        {
            **TINY,
            "intermediate_size": 100,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 24,
            "sliding_window": 8,
        },
    ),
)
def mistral(cfg: HFConfig) -> DecoderSpec:
    window = cfg["sliding_window"]  # absent is not null: the reference then takes 4096
    return pre_norm_decoder(cfg, GQA.with_rope(cfg, window=window), MLP.from_hf(cfg))


embeds(
    mistral,
    "MistralModel",
    examples=("intfloat/e5-mistral-7b-instruct",),
    tiny=({**TINY, "sliding_window": 8},),
)
