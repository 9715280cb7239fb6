"""DeepSeek-MoE: many small experts, some of which all tokens visit; the first layers are dense.

Dai et al. 2024 (arXiv:2401.06066).
"""

from model_defs.decoder import DecoderSpec, Layer, PreNorm
from model_defs.hf_config import HFConfig
from model_defs.layers.attention import GQA
from model_defs.layers.mlp import MLP
from model_defs.layers.moe import MoE, SoftmaxTopK
from model_defs.layers.norm import RMSNorm
from model_defs.llama import llama_weights
from model_defs.registry import register
from model_defs.weights import Rename, Rule


def deepseek_weights(cfg: HFConfig) -> tuple[Rule, ...]:
    return (*llama_weights(cfg), Rename("gate", "router"), Rename("shared_experts", "shared"))


@register(
    "DeepseekForCausalLM",
    weights=deepseek_weights,
    examples=("deepseek-ai/deepseek-moe-16b-chat", "deepseek-ai/deepseek-moe-16b-base"),
    bfloat16_tolerance=0.04,
    reference="original",
)
def deepseek(cfg: HFConfig) -> DecoderSpec:
    cfg.expect("pretraining_tp", 1)  # other values only re-order the reference's arithmetic
    cfg.expect("scoring_func", "softmax")
    norm, dense = RMSNorm(cfg["rms_norm_eps"]), MLP.from_hf(cfg)
    bias = cfg.get("attention_bias", False)
    attention = GQA.with_rope(cfg, qkv_bias=bias, out_bias=bias)
    width, shared = cfg["moe_intermediate_size"], cfg.get("n_shared_experts", 0)
    router = SoftmaxTopK(
        experts=cfg["n_routed_experts"],
        top_k=cfg["num_experts_per_tok"],
        renormalize=cfg.get("norm_topk_prob", False),
        eps=1e-20,
    )
    moe = MoE(
        router, MLP(width, dense.act), shared=MLP(width * shared, dense.act) if shared else None
    )
    first, every = cfg.get("first_k_dense_replace", 0), cfg.get("moe_layer_freq", 1)
    layers = [
        Layer(attention, moe if i >= first and i % every == 0 else dense, PreNorm(norm))
        for i in range(cfg["num_hidden_layers"])
    ]
    return DecoderSpec.from_hf(cfg, layers=layers, final_norm=norm)
