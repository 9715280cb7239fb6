"""DeepSeek V2 and V2-Lite: latent attention; experts chosen within groups, some shared by all.

DeepSeek-AI 2024 (arXiv:2405.04434).
"""

from model_defs.decoder import DecoderSpec, Layer, PreNorm
from model_defs.hf_config import HFConfig
from model_defs.layers.mla import MLA
from model_defs.layers.mlp import MLP
from model_defs.layers.moe import GroupLimitedTopK, MoE, Router
from model_defs.layers.norm import RMSNorm
from model_defs.layers.rope import rope_from_hf, yarn_magnitude
from model_defs.llama import HF_LLAMA, TINY, tied_head
from model_defs.registry import register
from model_defs.weights import Rename, Rule

LATENT_NORM = RMSNorm(1e-6)  # whatever the config's `rms_norm_eps`

HF_MLA: tuple[Rule, ...] = (
    *HF_LLAMA,
    Rename("q_a_layernorm", "q_a_norm"),
    Rename("kv_a_layernorm", "kv_a_norm"),
    Rename("kv_a_proj_with_mqa", "kv_a_proj"),
)
HF_DEEPSEEK: tuple[Rule, ...] = (
    *HF_MLA,
    Rename("gate", "router"),
    Rename("shared_experts", "shared"),
)


def deepseek_weights(cfg: HFConfig) -> tuple[Rule, ...]:
    return (*HF_DEEPSEEK, *tied_head(cfg))


def latent_attention(cfg: HFConfig, *, interleaved: bool) -> MLA:
    """Read MLA; Yarn's `mscale_all_dim` scales the scores (arXiv:2309.00071, section 3.4)."""
    rope_dim = cfg["qk_rope_head_dim"]
    cfg.get("num_key_value_heads")  # keys and values are made for every query head
    for derived in ("head_dim", "qk_head_dim"):
        cfg.get(derived)
    position = rope_from_hf(cfg, rope_dim, interleaved=interleaved)
    scale = (cfg["qk_nope_head_dim"] + rope_dim) ** -0.5
    rope = cfg.raw.get("rope_parameters") or cfg.raw.get("rope_scaling") or {}
    if rope.get("mscale_all_dim"):
        scale *= yarn_magnitude(rope["factor"], rope["mscale_all_dim"]) ** 2
    return MLA.from_hf(
        cfg,
        position=position,
        norm=LATENT_NORM,
        scale=scale,
        bias=cfg.get("attention_bias", False),
    )


def deepseek(cfg: HFConfig, router: Router, *, interleaved: bool = True) -> DecoderSpec:
    """The common part of the family: dense layers first, then experts in every so many."""
    cfg.expect("pretraining_tp", 1)  # other values only re-order the reference's arithmetic
    cfg.expect("mlp_bias", False)
    norm = RMSNorm(cfg["rms_norm_eps"])
    attention = latent_attention(cfg, interleaved=interleaved)
    dense = MLP.from_hf(cfg)
    width, shared = cfg["moe_intermediate_size"], cfg.get("n_shared_experts", 0)
    moe = MoE(
        router,
        MLP(width, dense.act),
        shared=MLP(width * shared, dense.act) if shared else None,
    )
    first, every = cfg["first_k_dense_replace"], cfg.get("moe_layer_freq", 1)
    layers = [
        Layer(attention, moe if i >= first and i % every == 0 else dense, PreNorm(norm))
        for i in range(cfg["num_hidden_layers"])
    ]
    return DecoderSpec.from_hf(cfg, layers=layers, final_norm=norm)


TINY_DEEPSEEK = {
    **TINY,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "rms_norm_eps": 1e-5,
}
TINY_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.9,
}


@register(
    "DeepseekV2ForCausalLM",
    weights=deepseek_weights,
    ignored=("ep_size",),
    examples=("deepseek-ai/DeepSeek-V2-Lite-Chat", "deepseek-ai/DeepSeek-V2-Chat"),
    bfloat16_tolerance=0.04,
    tiny=(
        {**TINY_DEEPSEEK, "q_lora_rank": None},
        {
            **TINY_DEEPSEEK,
            "q_lora_rank": 24,
            "attention_bias": True,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
            "max_position_embeddings": 640,
            "rope_parameters": TINY_YARN,
        },
    ),
)
def deepseek_v2(cfg: HFConfig) -> DecoderSpec:
    cfg.expect("topk_method", "greedy", "group_limited_greedy")
    cfg.expect("scoring_func", "softmax")
    groups, top_groups = cfg.get("n_group", 1), cfg.get("topk_group", 1)
    if cfg.get("topk_method", "greedy") == "greedy":
        groups = top_groups = 1
    router = GroupLimitedTopK(
        experts=cfg["n_routed_experts"],
        top_k=cfg["num_experts_per_tok"],
        groups=groups,
        top_groups=top_groups,
        renormalize=cfg.get("norm_topk_prob", False),
        scale=cfg.get("routed_scaling_factor", 1.0),
    )
    return deepseek(cfg, router)
