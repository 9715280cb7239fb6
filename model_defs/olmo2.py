"""OLMo 2: norms after the branches only, and a norm over all query and all key heads together.

OLMo Team 2025 (arXiv:2501.00656).
"""

from model_defs.decoder import DecoderSpec, Layer, Norms
from model_defs.hf_config import HFConfig
from model_defs.layers.attention import GQA
from model_defs.layers.mlp import MLP
from model_defs.layers.norm import RMSNorm
from model_defs.llama import TINY, tied_head
from model_defs.registry import register
from model_defs.weights import HF_BLOCK_NAMES, Rename, Rule, Subtree


def olmo2_weights(cfg: HFConfig) -> tuple[Rule, ...]:
    return (
        Subtree("model", "decoder"),
        Rename("post_attention_layernorm", "post_mixer_norm"),
        Rename("post_feedforward_layernorm", "post_ffn_norm"),
        *HF_BLOCK_NAMES,
        *tied_head(cfg),
    )


@register(
    "Olmo2ForCausalLM",
    weights=olmo2_weights,
    examples=("allenai/OLMo-2-0425-1B-Instruct", "allenai/OLMo-2-1124-7B"),
    tiny=(
        TINY,
        {
            **TINY,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "hidden_size": 96,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500000.0},
        },
    ),
)
def olmo2(cfg: HFConfig) -> DecoderSpec:
    norm = RMSNorm(cfg["rms_norm_eps"])
    bias = cfg.get("attention_bias", False)
    layer = Layer(
        mixer=GQA.with_rope(
            cfg, qk_norm=norm, qk_norm_over="all_heads", qkv_bias=bias, out_bias=bias
        ),
        ffn=MLP.from_hf(cfg),
        norms=Norms(post_mixer=norm, post_ffn=norm),
    )
    return DecoderSpec.from_hf(cfg, layers=[layer] * cfg["num_hidden_layers"], final_norm=norm)
