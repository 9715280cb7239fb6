"""DeepSeek V3, V3.1 and R1: latent attention; experts scored by sigmoids, chosen within groups.

DeepSeek-AI 2024 (arXiv:2412.19437). Checkpoints in 8-bit floats are read in full precision; their
layers for predicting several tokens at once are not used.
"""

from model_defs.decoder import DecoderSpec
from model_defs.deepseek_v2 import TINY_DEEPSEEK, TINY_YARN, deepseek, deepseek_weights
from model_defs.hf_config import HFConfig
from model_defs.layers.moe import SigmoidGrouped
from model_defs.registry import register
from model_defs.weights import Ignore, Rule, Scaled


def deepseek_v3_weights(cfg: HFConfig) -> tuple[Rule, ...]:
    depth = cfg["num_hidden_layers"]
    extra = cfg.get("num_nextn_predict_layers", 1)
    return (
        *(Ignore(rf"model\.layers\.{depth + i}\..*") for i in range(extra)),
        *block_scales(cfg),
        *deepseek_weights(cfg),
    )


def block_scales(cfg: HFConfig) -> tuple[Rule, ...]:
    """The rule for weights in 8-bit floats with a scale per block, where the config has them."""
    if cfg.raw.get("quantization_config") is None:
        return ()
    how = cfg.sub("quantization_config")
    how.expect("quant_method", "fp8")
    how.expect("fmt", "e4m3")
    # How the reference rounds activations. Here they are not rounded; nor is any layer left out,
    # for a layer that is not quantised has no scales.
    for key in ("activation_scheme", "scale_fmt", "modules_to_not_convert", "dequantize"):
        how.get(key)
    rows, columns = how.get("weight_block_size", (128, 128))
    return (Scaled("weight_scale_inv", (rows, columns)),)


@register(
    "DeepseekV3ForCausalLM",
    weights=deepseek_v3_weights,
    ignored=("ep_size", "num_mtp_layers", "num_nextn_predict_layers"),
    examples=("deepseek-ai/DeepSeek-V3", "deepseek-ai/DeepSeek-R1"),
    bfloat16_tolerance=0.05,
    tiny=(
        {
            **TINY_DEEPSEEK,
            "q_lora_rank": 24,
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
            "max_position_embeddings": 640,
            "rope_parameters": {**TINY_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
        {
            **TINY_DEEPSEEK,
            "q_lora_rank": None,
            "attention_bias": True,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "rope_interleave": False,
        },
    ),
)
def deepseek_v3(cfg: HFConfig) -> DecoderSpec:
    cfg.expect("topk_method", "noaux_tc")
    cfg.expect("scoring_func", "sigmoid")
    block_scales(cfg)
    router = SigmoidGrouped(
        experts=cfg["n_routed_experts"],
        top_k=cfg["num_experts_per_tok"],
        groups=cfg.get("n_group", 8),
        top_groups=cfg.get("topk_group", 4),
        renormalize=cfg.get("norm_topk_prob", True),
        scale=cfg.get("routed_scaling_factor", 2.5),
    )
    return deepseek(cfg, router, interleaved=cfg.get("rope_interleave", True))
