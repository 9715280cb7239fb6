"""XVERSE: Llama with as many KV heads as query heads, or with experts under the same name.

https://huggingface.co/xverse/XVERSE-13B, https://huggingface.co/xverse/XVERSE-MoE-A4.2B. The config
of the second names its experts.
"""

from model_defs.decoder import DecoderSpec, Layer, PreNorm
from model_defs.hf_config import HFConfig
from model_defs.layers.attention import GQA, head_dim_from_hf
from model_defs.layers.mlp import MLP
from model_defs.layers.moe import MoE, SoftmaxTopK
from model_defs.layers.norm import RMSNorm
from model_defs.layers.rope import rope_from_hf
from model_defs.llama import HF_LLAMA, tied_head
from model_defs.registry import register
from model_defs.weights import Rename, Rule


def xverse_weights(cfg: HFConfig) -> tuple[Rule, ...]:
    return (*HF_LLAMA, Rename("shared_experts", "shared"), *tied_head(cfg))


@register(
    "XverseForCausalLM",
    weights=xverse_weights,
    ignored=("max_tokenizer_truncation", "output_router_logits", "router_aux_loss_coef"),
    examples=("xverse/XVERSE-7B-Chat", "xverse/XVERSE-13B", "xverse/XVERSE-MoE-A4.2B"),
    reference="original",
)
def xverse(cfg: HFConfig) -> DecoderSpec:
    cfg.expect("pretraining_tp", 1)
    norm = RMSNorm(cfg["rms_norm_eps"])
    bias = cfg.get("attention_bias", False)
    rope = rope_from_hf(cfg, head_dim_from_hf(cfg))
    layer = Layer(
        mixer=GQA.from_hf(cfg, position=rope, qkv_bias=bias, out_bias=bias),
        ffn=_feed_forward(cfg),
        norms=PreNorm(norm),
    )
    return DecoderSpec.from_hf(cfg, layers=[layer] * cfg["num_hidden_layers"], final_norm=norm)


def _feed_forward(cfg: HFConfig) -> MLP | MoE:
    mlp = MLP.from_hf(cfg)
    if cfg.get("num_experts") is None and cfg.get("moe_top_k") is None:
        return mlp
    shared = mlp.width * cfg.get("num_shared_experts", 0)
    return MoE(
        SoftmaxTopK(cfg["num_experts"], cfg["moe_top_k"], renormalize=True, eps=1e-6),
        mlp,
        shared=MLP(shared, mlp.act) if shared else None,
    )
