"""StableLM 3B, 2 1.6B and 2 12B: LayerNorm, partial rotation, and the variants of the three.

Bellagente et al. 2024 (arXiv:2402.17834); model cards of stabilityai/stablelm-3b-4e1t (sequential),
stablelm-2-1_6b (biases) and stablelm-2-12b (parallel branches, a norm for each head).
"""

from model_defs.decoder import DecoderSpec, Layer, Norms, PreNorm
from model_defs.hf_config import HFConfig
from model_defs.layers.attention import GQA, head_dim_from_hf
from model_defs.layers.mlp import MLP
from model_defs.layers.norm import LayerNorm
from model_defs.layers.rope import rope_from_hf
from model_defs.llama import TINY, llama_weights
from model_defs.registry import register
from model_defs.weights import Rule, Stack


def stablelm_weights(cfg: HFConfig) -> tuple[Rule, ...]:
    per_head = (Stack("q_layernorm.norms.{}", "q_norm"), Stack("k_layernorm.norms.{}", "k_norm"))
    return (*llama_weights(cfg), *per_head)


@register(
    "StableLmForCausalLM",
    "StableLMEpochForCausalLM",
    weights=stablelm_weights,
    ignored=("num_heads",),  # the first checkpoints' second name for num_attention_heads
    examples=("stabilityai/stablelm-2-12b", "stabilityai/stablelm-2-zephyr-1_6b"),
    tiny=(
        {**TINY, "use_parallel_residual": True, "qk_layernorm": True},
        {
            **TINY,
            "num_key_value_heads": 4,
            "use_qkv_bias": True,
            "tie_word_embeddings": True,
            "partial_rotary_factor": 0.5,
        },
        {**TINY, "num_key_value_heads": 1, "qk_layernorm": True, "use_qkv_bias": True},
        {**TINY, "use_parallel_residual": True, "partial_rotary_factor": 1.0},
    ),
)
def stablelm(cfg: HFConfig) -> DecoderSpec:
    cfg.expect("rotary_scaling_factor", 1.0)
    # The first checkpoints, saved by their own code, spell two keys in another way.
    eps = cfg.get("layer_norm_eps", cfg.get("norm_eps", 1e-5))
    fraction = cfg.get("rope_pct", 0.25)
    norm, parallel = LayerNorm(eps), cfg.get("use_parallel_residual", False)
    layer = Layer(
        mixer=GQA.from_hf(
            cfg,
            position=rope_from_hf(cfg, head_dim_from_hf(cfg), fraction=fraction),
            qk_norm=LayerNorm(eps, bias=False) if cfg.get("qk_layernorm", False) else None,
            qk_norm_over="each_head",
            qkv_bias=cfg.get("use_qkv_bias", False),
        ),
        ffn=MLP.from_hf(cfg),
        norms=Norms(pre_mixer=norm) if parallel else PreNorm(norm),
        parallel=parallel,
    )
    return DecoderSpec.from_hf(cfg, layers=[layer] * cfg["num_hidden_layers"], final_norm=norm)
