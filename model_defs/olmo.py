"""OLMo 1: Llama with norms that have no parameters, and clamped queries, keys and values.

Groeneveld et al. 2024 (arXiv:2402.00838).
"""

from model_defs.decoder import DecoderSpec, Layer, PreNorm
from model_defs.hf_config import HFConfig
from model_defs.layers.attention import GQA
from model_defs.layers.mlp import MLP
from model_defs.layers.norm import LayerNorm
from model_defs.llama import TINY, llama_weights
from model_defs.registry import register


@register(
    "OlmoForCausalLM",
    weights=llama_weights,
    examples=("allenai/OLMo-1B-hf", "allenai/OLMo-7B-0724-hf"),
    tiny=(
        {**TINY, "clip_qkv": 0.7},
        {**TINY, "num_key_value_heads": 1, "attention_bias": True},
    ),
)
def olmo(cfg: HFConfig) -> DecoderSpec:
    norm = LayerNorm(1e-5, bias=False, weight=False)
    bias = cfg.get("attention_bias", False)
    layer = Layer(
        mixer=GQA.with_rope(cfg, clip=cfg.get("clip_qkv"), qkv_bias=bias, out_bias=bias),
        ffn=MLP.from_hf(cfg),
        norms=PreNorm(norm),
    )
    return DecoderSpec.from_hf(cfg, layers=[layer] * cfg["num_hidden_layers"], final_norm=norm)
