"""Gemma 1: Llama with scaled embeddings, GELU and a norm whose scale is stored minus one.

Gemma Team 2024 (arXiv:2403.08295).
"""

from model_defs.decoder import DecoderSpec, Layer, PreNorm
from model_defs.hf_config import HFConfig
from model_defs.layers.attention import GQA
from model_defs.layers.mlp import MLP
from model_defs.layers.norm import RMSNorm
from model_defs.layers.rope import rope_from_hf
from model_defs.llama import HF_LLAMA, TINY, tied_head
from model_defs.registry import register
from model_defs.weights import Rule


def gemma_weights(cfg: HFConfig) -> tuple[Rule, ...]:
    return (*HF_LLAMA, *tied_head(cfg, default=True))


@register(
    "GemmaForCausalLM",
    weights=gemma_weights,
    examples=("google/gemma-2b-it", "google/gemma-7b", "google/codegemma-7b-it"),
    tiny=(
        {**TINY, "head_dim": 24, "num_key_value_heads": 1},
        {
            **TINY,
            "head_dim": 16,
            "num_key_value_heads": 4,
            "hidden_act": "gelu",
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
    ),
)
def gemma(cfg: HFConfig) -> DecoderSpec:
    cfg.expect("use_bidirectional_attention", False)
    cfg.expect("hidden_activation", "gelu_pytorch_tanh")  # the first checkpoints carry it, null
    act = cfg.get("hidden_act", "gelu_pytorch_tanh")
    norm = RMSNorm(cfg["rms_norm_eps"], offset=1.0)
    bias = cfg.get("attention_bias", False)
    layer = Layer(
        mixer=GQA.from_hf(
            cfg, position=rope_from_hf(cfg, cfg["head_dim"]), qkv_bias=bias, out_bias=bias
        ),
        # The first configs say "gelu" and mean its tanh approximation, as the reference knows.
        ffn=MLP(cfg["intermediate_size"], "gelu_pytorch_tanh" if act == "gelu" else act),
        norms=PreNorm(norm),
    )
    return DecoderSpec.from_hf(
        cfg,
        layers=[layer] * cfg["num_hidden_layers"],
        final_norm=norm,
        tied=True,
        embed_scale=cfg["hidden_size"] ** 0.5,
    )
