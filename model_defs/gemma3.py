"""Gemma 3, text: local and global attention with their own ropes, qk-norm, sandwich norms.

Gemma Team 2025 (arXiv:2503.19786).
"""

from dataclasses import replace

from model_defs.decoder import DecoderSpec, Layer, SandwichNorm
from model_defs.hf_config import HFConfig
from model_defs.layers.attention import GQA
from model_defs.layers.mlp import MLP
from model_defs.layers.norm import RMSNorm
from model_defs.layers.rope import Rope, rope_from_hf
from model_defs.llama import TINY, tied_head
from model_defs.registry import register
from model_defs.weights import HF_BLOCK_NAMES, Rename, Rule, Subtree


def gemma3_weights(cfg: HFConfig) -> tuple[Rule, ...]:
    return (
        Subtree("model", "decoder"),
        Rename("input_layernorm", "pre_mixer_norm"),
        Rename("post_attention_layernorm", "post_mixer_norm"),
        Rename("pre_feedforward_layernorm", "pre_ffn_norm"),
        Rename("post_feedforward_layernorm", "post_ffn_norm"),
        *HF_BLOCK_NAMES,
        *tied_head(cfg, default=True),
    )


@register(
    "Gemma3ForCausalLM",
    weights=gemma3_weights,
    examples=("google/gemma-3-270m-it", "google/gemma-3-1b-it"),
    tiny=(
        {
            **TINY,
            "num_hidden_layers": 3,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            },
        },
        {
            **TINY,
            "head_dim": 16,
            "sliding_window": 8,
            "attention_bias": True,
            "final_logit_softcapping": 5.0,
        },
    ),
)
def gemma3(cfg: HFConfig) -> DecoderSpec:
    cfg.expect("use_bidirectional_attention", False)
    norm = RMSNorm(cfg["rms_norm_eps"], offset=1.0)  # the checkpoint stores the scale minus one
    head_dim, bias = cfg.get("head_dim", 256), cfg.get("attention_bias", False)
    local_rope, rope = _ropes(cfg, head_dim)
    full = GQA(
        heads=cfg["num_attention_heads"],
        kv_heads=cfg["num_key_value_heads"],
        head_dim=head_dim,
        position=rope,
        scale=cfg.get("query_pre_attn_scalar", 256) ** -0.5,
        softcap=cfg.get("attn_logit_softcapping"),
        qk_norm=norm,
        qkv_bias=bias,
        out_bias=bias,
    )
    local = replace(full, position=local_rope, window=cfg["sliding_window"])
    ffn = MLP(cfg["intermediate_size"], cfg.get("hidden_activation", "gelu_pytorch_tanh"))
    every = cfg.get("sliding_window_pattern", cfg.get("_sliding_window_pattern", 6))
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
        logit_softcap=cfg.get("final_logit_softcapping"),
    )


def _ropes(cfg: HFConfig, head_dim: int) -> tuple[Rope, Rope]:
    """The ropes of the local and the global layers."""
    local_theta = cfg.get("rope_local_base_freq", 10000.0)
    if cfg.raw.get("rope_parameters") is None:
        return Rope(local_theta, head_dim), rope_from_hf(cfg, head_dim, theta=1e6)
    theta = cfg.get("rope_theta", 1e6)
    return (
        rope_from_hf(cfg, head_dim, theta=local_theta, section="sliding_attention"),
        rope_from_hf(cfg, head_dim, theta=theta, section="full_attention"),
    )
