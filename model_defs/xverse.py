"""XVERSE: Llama with as many KV heads as query heads, or with experts under the same name.

https://huggingface.co/xverse/XVERSE-13B, https://huggingface.co/xverse/XVERSE-MoE-A4.2B. The config
of the second names its experts.
"""

from model_defs.decoder import DecoderSpec, pre_norm_decoder
from model_defs.hf_config import HFConfig
from model_defs.layers.attention import GQA
from model_defs.layers.mlp import MLP
from model_defs.layers.moe import MoE, SoftmaxTopK
from model_defs.llama import HF_LLAMA, tied_head
from model_defs.registry import register
from model_defs.weights import Rename, Rule


def xverse_weights(cfg: HFConfig) -> tuple[Rule, ...]:
    return (*HF_LLAMA, Rename("shared_experts", "shared"), *tied_head(cfg))


@register(
    "XverseForCausalLM",
    "XverseMoeForCausalLM",
    weights=xverse_weights,
    ignored=("max_tokenizer_truncation",),
    examples=("xverse/XVERSE-7B-Chat", "xverse/XVERSE-13B", "xverse/XVERSE-MoE-A4.2B"),
    reference="original",
)
def xverse(cfg: HFConfig) -> DecoderSpec:
    cfg.expect("pretraining_tp", 1)
    bias = cfg.get("attention_bias", False)
    mixer = GQA.with_rope(cfg, qkv_bias=bias, out_bias=bias)
    return pre_norm_decoder(cfg, mixer, _feed_forward(cfg))


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
