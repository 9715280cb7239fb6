"""Granite 3 with experts: Granite whose feed-forward networks are stored stacked.

IBM 2024 (https://huggingface.co/ibm-granite/granite-3.1-3b-a800m-instruct).
"""

from model_defs.decoder import DecoderSpec
from model_defs.granite import TINY_GRANITE, granite_decoder
from model_defs.hf_config import HFConfig
from model_defs.layers.mlp import MLP
from model_defs.layers.moe import MoE, SoftmaxTopK
from model_defs.llama import HF_LLAMA, tied_head
from model_defs.registry import register
from model_defs.weights import Rename, Rule, Split, Unstack


def granite_moe_weights(cfg: HFConfig) -> tuple[Rule, ...]:
    width = cfg["intermediate_size"]
    return (
        *HF_LLAMA,
        Rename("block_sparse_moe", "ffn"),
        Rename("router.layer", "router"),
        Unstack("input_linear", "experts.{}.gate_up_proj"),
        Split("gate_up_proj", ("gate_proj", "up_proj"), (width, width)),
        Unstack("output_linear", "experts.{}.down_proj"),
        *tied_head(cfg),
    )


@register(
    "GraniteMoeForCausalLM",
    weights=granite_moe_weights,
    examples=(
        "ibm-granite/granite-3.1-3b-a800m-instruct",
        "ibm-granite/granite-3.1-1b-a400m-instruct",
    ),
    tiny=(
        {**TINY_GRANITE, "intermediate_size": 24},
        {
            **TINY_GRANITE,
            "intermediate_size": 24,
            "num_key_value_heads": 4,
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
)
def granite_moe(cfg: HFConfig) -> DecoderSpec:
    router = SoftmaxTopK(
        cfg.get("num_local_experts", 8), cfg.get("num_experts_per_tok", 2), renormalize=True
    )
    return granite_decoder(cfg, MoE(router, MLP.from_hf(cfg)))
