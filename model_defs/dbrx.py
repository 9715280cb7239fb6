"""DBRX: fine-grained experts, clamped queries, keys and values, layer norms without bias.

Databricks 2024 (https://huggingface.co/databricks/dbrx-instruct).
"""

from dataclasses import replace

from model_defs.decoder import DecoderSpec, Layer, PreNorm
from model_defs.hf_config import HFConfig
from model_defs.layers.attention import GQA
from model_defs.layers.mlp import MLP
from model_defs.layers.moe import MoE, SoftmaxTopK
from model_defs.layers.norm import LayerNorm
from model_defs.layers.rope import rope_from_hf
from model_defs.registry import register
from model_defs.weights import Rename, Rule, Split, Subtree, Transpose

TINY_DBRX = {
    "vocab_size": 259,
    "d_model": 64,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 512,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.5, "rope_theta": 10000.0},
    "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 8, "moe_top_k": 3},
}


def dbrx_weights(cfg: HFConfig) -> tuple[Rule, ...]:
    gqa, ffn = _attention(cfg), cfg["ffn_config"]
    kv, experts = gqa.kv_heads * gqa.head_dim, ffn["moe_num_experts"]

    def flat(stored: str, ours: str) -> tuple[Rule, Rule]:
        """The experts' matrices one after another, under a name without a leaf."""
        into = tuple(f"experts.{e}.{ours}" for e in range(experts))
        sizes = (ffn["ffn_hidden_size"],) * experts
        return Rename(stored, f"{stored}.weight"), Split(stored, into, sizes)

    return (
        Subtree("transformer", "decoder"),
        Rename("wte", "embed"),
        Rename("blocks", "layers"),
        Rename("norm_f", "norm"),
        Rename("norm_attn_norm.norm_1", "pre_mixer_norm"),
        Rename("norm_attn_norm.norm_2", "pre_ffn_norm"),
        Rename("norm_attn_norm.attn", "mixer"),
        Rename("out_proj", "o_proj"),
        Split("Wqkv", ("q_proj", "k_proj", "v_proj"), (gqa.heads * gqa.head_dim, kv, kv)),
        Rename("router.layer", "router"),
        *flat("experts.mlp.w1", "gate_proj"),
        *flat("experts.mlp.v1", "up_proj"),
        *flat("experts.mlp.w2", "down_proj"),
        Transpose(r"experts\.\d+\.down_proj\.weight"),
    )


@register(
    "DbrxForCausalLM",
    weights=dbrx_weights,
    ignored=("emb_pdrop",),
    examples=("databricks/dbrx-instruct", "databricks/dbrx-base"),
    bfloat16_tolerance=0.03,
    tiny=(
        TINY_DBRX,
        {
            **TINY_DBRX,
            "attn_config": {"kv_n_heads": 4, "clip_qkv": 0.5, "rope_theta": 10000.0},
            "ffn_config": {
                **TINY_DBRX["ffn_config"],
                "moe_num_experts": 5,
                "moe_normalize_expert_weights": None,
                "ffn_act_fn": {"name": "gelu"},
            },
        },
    ),
)
def dbrx(cfg: HFConfig) -> DecoderSpec:
    cfg.expect("tie_word_embeddings", False)
    norm = LayerNorm(1e-5, bias=False)
    layer = Layer(_attention(cfg), _experts(cfg), PreNorm(norm))
    return DecoderSpec(
        vocab=cfg["vocab_size"],
        d_model=cfg["d_model"],
        layers=(layer,) * cfg["n_layers"],
        final_norm=norm,
        max_length=cfg["max_seq_len"],
    )


def _attention(cfg: HFConfig) -> GQA:
    read, heads = cfg.sub("attn_config"), cfg["n_heads"]
    kv_heads, head_dim = read.get("kv_n_heads", 1), cfg["d_model"] // heads
    cfg.expect("num_key_value_heads", kv_heads)
    rope = rope_from_hf(cfg, head_dim)
    rope = replace(rope, theta=read.get("rope_theta", rope.theta))
    return GQA(heads, kv_heads, head_dim, position=rope, clip=read.get("clip_qkv"))


def _experts(cfg: HFConfig) -> MoE:
    read = cfg.sub("ffn_config")
    read.expect("hidden_size", cfg["d_model"])
    read.expect("moe_normalize_expert_weights", 1)  # the norm's order; null for none
    for key in ("moe_jitter_eps", "moe_loss_weight", "uniform_expert_assignment"):
        read.get(key)  # they matter in training only
    normalize = read.raw.get("moe_normalize_expert_weights", 1) is not None
    act = read.sub("ffn_act_fn", default=HFConfig({"name": "silu"}, cfg.architecture))["name"]
    router = SoftmaxTopK(read["moe_num_experts"], read["moe_top_k"], normalize)
    return MoE(router, MLP(read["ffn_hidden_size"], act))
