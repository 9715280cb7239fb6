"""Phi-3-small: block-sparse attention in most layers, clamped GELU gates, muP multipliers.

Abdin et al. 2024 (arXiv:2404.14219, section 2). The ids of its vocabulary that no text has keep
their logits: config.json does not name them.
"""

import math
from dataclasses import replace

from model_defs.decoder import DecoderSpec, Layer, PreNorm
from model_defs.hf_config import HFConfig
from model_defs.layers.attention import GQA, Blocks, BlockSparse
from model_defs.layers.mlp import MLP
from model_defs.layers.norm import LayerNorm
from model_defs.layers.rope import Linear, LongRope, Rope
from model_defs.llama import HF_LLAMA, tied_head
from model_defs.registry import register
from model_defs.weights import Rename, Rule, Split


def phi3small_weights(cfg: HFConfig) -> tuple[Rule, ...]:
    gqa, width = GQA.from_hf(cfg), cfg["ff_intermediate_size"]
    share = (gqa.heads // gqa.kv_heads * gqa.head_dim, gqa.head_dim, gqa.head_dim)
    return (
        *HF_LLAMA,
        Rename("final_layernorm", "norm"),
        Rename("dense", "o_proj"),
        Split("query_key_value", ("q_proj", "k_proj", "v_proj"), share, gqa.kv_heads),
        Split("up_proj", ("gate_proj", "up_proj"), (1, 1), width),  # gate, up, gate, up, ...
        *tied_head(cfg, default=True),
    )


@register(
    "Phi3SmallForCausalLM",
    weights=phi3small_weights,
    ignored=(
        *("attention_dropout_prob", "embedding_dropout_prob", "ffn_dropout_prob"),
        *("blocksparse_triton_kernel_block_size", "pad_sequence_to_multiple_of_64"),
        *("attention_bias", "gegelu_pad_to_256", "reorder_and_upcast_attn"),  # unused
    ),
    examples=("microsoft/Phi-3-small-8k-instruct", "microsoft/Phi-3-small-128k-instruct"),
    reference="original",
)
def phi3small(cfg: HFConfig) -> DecoderSpec:
    cfg.expect("hidden_act", "gegelu")
    cfg.expect("ff_dim_multiplier", None)  # the width is given as a number
    norm = LayerNorm(cfg["layer_norm_epsilon"])
    dense = GQA.from_hf(cfg, qkv_bias=True, out_bias=True)
    dense = replace(dense, position=_rope(cfg, dense.head_dim))
    multiplier = cfg.get("mup_attn_multiplier", 1.0)
    if cfg.get("mup_use_scaling", True):
        dense = replace(dense, scale=multiplier / dense.head_dim)
    sparse = replace(dense, sparse=_blocks(cfg, dense.heads))
    ffn = MLP(
        cfg["ff_intermediate_size"],
        "quick_gelu",
        bias=True,
        limit=cfg.get("gegelu_limit"),
        shift=1.0,
    )
    count, every = cfg["num_hidden_layers"], cfg.get("dense_attention_every_n_layers")
    mixers = [dense if every and (i + 1) % every == 0 else sparse for i in range(count)]
    embed_scale = cfg.get("mup_embedding_multiplier", 0.0)
    return DecoderSpec.from_hf(
        cfg,
        layers=[Layer(mixer, ffn, PreNorm(norm)) for mixer in mixers],
        final_norm=norm,
        tied=True,
        embed_scale=embed_scale if embed_scale > 0 else None,
        logit_scale=1 / (cfg.get("mup_width_multiplier") or 1.0),
    )


def _blocks(cfg: HFConfig, heads: int) -> Blocks:
    stride = cfg["blocksparse_vert_stride"]
    mask = BlockSparse(cfg["blocksparse_block_size"], cfg["blocksparse_num_local_blocks"], stride)
    same = cfg.get("blocksparse_homo_head_pattern", False)
    return Blocks(mask, 0 if same else max(1, stride // heads))


def _rope(cfg: HFConfig, dim: int) -> Rope:
    theta, slower = cfg["rope_embedding_base"], cfg.get("rope_position_scale", 1.0)
    if cfg.get("rope_scaling") is None:
        return Rope(theta, dim, Linear(1 / slower) if slower != 1 else None)
    read, longest = cfg.sub("rope_scaling"), cfg["max_position_embeddings"]
    read.expect("type", "longrope", "su")
    original = read["original_max_position_embeddings"]
    growth = max(longest / original, 1.0)
    magnitude = math.sqrt(1 + math.log(growth) / math.log(original))
    short, long = (read.get(f"{part}_mscale", -1.0) for part in ("short", "long"))
    scaling = LongRope(
        tuple(read["short_factor"]),
        tuple(read["long_factor"]),
        original,
        magnitude=short if short > 0 else 1.0,
        long_magnitude=long if long > 0 else magnitude,
    )
    return Rope(theta, dim, scaling)
