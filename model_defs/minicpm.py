"""MiniCPM 1, 2 and 4: Llama with scaled embeddings, branches and logits.

Hu et al. 2024 (arXiv:2404.06395, section 3.2 and appendix A.1).
"""

from dataclasses import replace

from model_defs.decoder import DecoderSpec, pre_norm_decoder
from model_defs.hf_config import HFConfig
from model_defs.layers.attention import GQA, head_dim_from_hf
from model_defs.layers.mlp import MLP
from model_defs.layers.rope import LongRope, Rope, rope_from_hf
from model_defs.llama import llama_weights
from model_defs.registry import register


@register(
    "MiniCPMForCausalLM",
    weights=llama_weights,
    ignored=("mup_denominator",),  # of heads for speculative decoding
    examples=("openbmb/MiniCPM-2B-sft-bf16", "openbmb/MiniCPM4-8B"),
    reference="original",
)
def minicpm(cfg: HFConfig) -> DecoderSpec:
    cfg.expect("pretraining_tp", 1)
    cfg.expect("num_experts", 0)
    depth = cfg["num_hidden_layers"]
    bias = cfg.get("attention_bias", False)
    return pre_norm_decoder(
        cfg,
        GQA.from_hf(cfg, position=_rope(cfg), qkv_bias=bias, out_bias=bias),
        MLP.from_hf(cfg),
        branch_scale=cfg.get("scale_depth", 1) / depth**0.5,
        # A config that does not say ties the head; the rules then refuse a checkpoint with one.
        tied=True,
        embed_scale=cfg.get("scale_emb", 1),
        logit_scale=cfg.get("dim_model_base", 1) / cfg["hidden_size"],
    )


def _rope(cfg: HFConfig) -> Rope:
    """The rope; longrope goes by the longest length the model may see, not by the request's."""
    rope = rope_from_hf(cfg, head_dim_from_hf(cfg))
    scaling = rope.scaling
    if isinstance(scaling, LongRope) and cfg["max_position_embeddings"] > scaling.original_length:
        return replace(rope, scaling=replace(scaling, short=scaling.long))
    return rope
