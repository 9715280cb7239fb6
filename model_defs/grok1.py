"""Grok-1: two of eight experts, soft-capped scores, scaled embeddings and logits.

xAI 2024 (https://github.com/xai-org/grok-1); names of the PyTorch port hpcai-tech/grok-1, whose
experts have the exact GELU unless the config's `hidden_act` says otherwise.
"""

from model_defs.decoder import DecoderSpec, Layer, SandwichNorm
from model_defs.hf_config import HFConfig
from model_defs.layers.attention import GQA
from model_defs.layers.mlp import MLP
from model_defs.layers.moe import MoE, SoftmaxTopK
from model_defs.layers.norm import RMSNorm
from model_defs.llama import tied_head
from model_defs.registry import register
from model_defs.weights import Ignore, Rename, Rule, Subtree


def grok1_weights(cfg: HFConfig) -> tuple[Rule, ...]:
    return (
        Ignore(r".*\.rotary_emb\.inv_freq"),
        Subtree("model", "decoder"),
        Rename("embed_tokens", "embed"),
        Rename("norm.scale", "norm.weight"),
        Rename("pre_attn_norm.scale", "pre_mixer_norm.weight"),
        Rename("post_attn_norm.scale", "post_mixer_norm.weight"),
        Rename("pre_moe_norm.scale", "pre_ffn_norm.weight"),
        Rename("post_moe_norm.scale", "post_ffn_norm.weight"),
        Rename("attn", "mixer"),
        Rename("moe_block", "ffn"),
        Rename("gate", "router"),
        Rename("linear", "gate_proj"),
        Rename("linear_v", "up_proj"),
        Rename("linear_1", "down_proj"),
        *tied_head(cfg, default=True),
    )


@register(
    "Grok1ModelForCausalLM",
    "Grok1ForCausalLM",
    weights=grok1_weights,
    examples=("hpcai-tech/grok-1",),
    reference="original",
)
def grok1(cfg: HFConfig) -> DecoderSpec:
    norm = RMSNorm(cfg["rms_norm_eps"])
    scale, softcap = cfg["attn_output_multiplier"], cfg["max_attn_value"]
    mixer = GQA.with_rope(cfg, scale=scale, softcap=softcap)
    router = SoftmaxTopK(cfg["num_experts"], cfg["num_experts_per_tok"], renormalize=False)
    expert = MLP(cfg["intermediate_size"], cfg.get("hidden_act", "gelu"))
    layer = Layer(mixer, MoE(router, expert), SandwichNorm(norm))
    return DecoderSpec.from_hf(
        cfg,
        layers=[layer] * cfg["num_hidden_layers"],
        final_norm=norm,
        tied=True,
        embed_scale=cfg["embedding_multiplier_scale"],
        logit_scale=cfg["output_multiplier_scale"],
    )
