"""Qwen 2 and 2.5: Llama with biases on queries, keys and values (arXiv:2407.10671)."""

from dataclasses import replace

from model_defs.decoder import DecoderSpec, Layer, PreNorm
from model_defs.heads import embeds, num_labels, scores
from model_defs.hf_config import HFConfig
from model_defs.layers.attention import GQA
from model_defs.layers.embedding import ScoreHead
from model_defs.layers.mlp import MLP
from model_defs.layers.norm import RMSNorm
from model_defs.llama import TINY, llama_weights
from model_defs.registry import register


def windowed_decoder(cfg: HFConfig, full: GQA) -> DecoderSpec:
    """Equal layers with the attention `full`, but for those the config gives a window."""
    norm, ffn = RMSNorm(cfg["rms_norm_eps"]), MLP.from_hf(cfg)
    window, first = cfg.get("sliding_window"), cfg.get("max_window_layers", 28)
    if not cfg.get("use_sliding_window", False):
        window = None
    local = replace(full, window=window)
    kinds = cfg.layer_types(
        default=lambda i: "sliding_attention" if window and i >= first else "full_attention"
    )
    layers = [Layer(local if k == "sliding_attention" else full, ffn, PreNorm(norm)) for k in kinds]
    return DecoderSpec.from_hf(cfg, layers=layers, final_norm=norm)


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
    return windowed_decoder(cfg, GQA.with_rope(cfg, qkv_bias=True))


scores(
    qwen2,
    "Qwen2ForSequenceClassification",
    examples=("jason9693/Qwen2.5-1.5B-apeach",),
    tiny=({**TINY, "num_labels": 3}, {**TINY, "num_labels": 2, "tie_word_embeddings": True}),
)
scores(
    qwen2,
    "Qwen2ForRewardModel",
    name="reward",
    head=lambda cfg: ScoreHead(num_labels(cfg, default=1), hidden=True),
    examples=("Qwen/Qwen2.5-Math-RM-72B",),
)
embeds(qwen2, "Qwen2Model", examples=("Alibaba-NLP/gte-Qwen2-7B-instruct",), tiny=(TINY,))
