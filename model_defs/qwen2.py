"""Qwen 2 and 2.5: Llama with biases on queries, keys and values (arXiv:2407.10671)."""

from dataclasses import replace

from model_defs.decoder import DecoderSpec, Layer, PreNorm
from model_defs.hf_config import HFConfig
from model_defs.layers.attention import GQA, head_dim_from_hf
from model_defs.layers.mlp import MLP
from model_defs.layers.norm import RMSNorm
from model_defs.layers.rope import rope_from_hf
from model_defs.llama import TINY, llama_weights
from model_defs.registry import register


@register(
    "Qwen2ForCausalLM",
    weights=llama_weights,
    ignored=("use_mrope",),
    examples=("Qwen/Qwen2-1.5B", "Qwen/Qwen2.5-7B-Instruct"),
    tiny=(
        TINY,
        {
            **TINY,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 1,
        },
    ),
)
def qwen2(cfg: HFConfig) -> DecoderSpec:
    norm = RMSNorm(cfg["rms_norm_eps"])
    window, first = cfg.get("sliding_window"), cfg.get("max_window_layers", 28)
    if not cfg.get("use_sliding_window", False):
        window = None
    full = GQA.from_hf(cfg, position=rope_from_hf(cfg, head_dim_from_hf(cfg)), qkv_bias=True)
    local = replace(full, window=window)
    ffn = MLP(cfg["intermediate_size"], cfg.get("hidden_act", "silu"))
    kinds = cfg.layer_types(
        default=lambda i: "sliding_attention" if window and i >= first else "full_attention"
    )
    layers = [Layer(local if k == "sliding_attention" else full, ffn, PreNorm(norm)) for k in kinds]
    return DecoderSpec.from_hf(cfg, layers=layers, final_norm=norm)
