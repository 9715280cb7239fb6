"""Command R7B and Command A: Command-R with windowed layers; those without a window have no rope.

Cohere 2025 (arXiv:2504.00698).
"""

from dataclasses import replace

from model_defs.cohere import cohere_decoder, cohere_weights
from model_defs.decoder import DecoderSpec
from model_defs.hf_config import HFConfig
from model_defs.layers.attention import GQA, head_dim_from_hf
from model_defs.layers.rope import rope_from_hf
from model_defs.llama import TINY
from model_defs.registry import register


@register(
    "Cohere2ForCausalLM",
    weights=cohere_weights,
    ignored=("layer_switch", "use_embedding_sharing", "use_parallel_embedding"),
    examples=("CohereForAI/c4ai-command-r7b-12-2024", "CohereForAI/c4ai-command-a-03-2025"),
    tiny=(
        {**TINY, "num_hidden_layers": 4, "sliding_window": 8, "logit_scale": 0.25},
        {
            **TINY,
            "num_hidden_layers": 3,
            "num_key_value_heads": 1,
            "sliding_window": 16,
            "logit_scale": 0.5,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "sliding_window_pattern": 2,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
)
def cohere2(cfg: HFConfig) -> DecoderSpec:
    cfg.expect("order_of_interleaved_layers", "local_attn_first")
    cfg.expect("position_embedding_type", "rope_gptj")
    cfg.expect("rotary_pct", 1.0)
    cfg.expect("use_qk_norm", False)
    for key in ("use_gated_activation", "use_parallel_block"):
        cfg.expect(key, True)
    bias = cfg.get("attention_bias", False)
    full = GQA.from_hf(cfg, qkv_bias=bias, out_bias=bias)
    rope = rope_from_hf(cfg, head_dim_from_hf(cfg), interleaved=True)
    local = replace(full, position=rope, window=cfg["sliding_window"])
    every = cfg.get("sliding_window_pattern", 4)
    kinds = cfg.layer_types(
        default=lambda i: "full_attention" if (i + 1) % every == 0 else "sliding_attention"
    )
    return cohere_decoder(cfg, [local if kind == "sliding_attention" else full for kind in kinds])
