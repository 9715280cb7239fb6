"""ChatGLM 2, ChatGLM 3 and GLM-4 9B in the layout of their own code.

Du et al. 2022 (arXiv:2103.10360), GLM Team 2024 (arXiv:2406.12793); model cards of
THUDM/chatglm2-6b, chatglm3-6b and glm-4-9b. Not chatglm2-6b-32k: its code divides positions by
`rope_ratio` where that of all others multiplies the base, and only its name tells it from them.
"""

from model_defs.decoder import DecoderSpec, Layer, PreNorm
from model_defs.hf_config import HFConfig
from model_defs.layers.attention import GQA
from model_defs.layers.mlp import MLP
from model_defs.layers.norm import LayerNorm, RMSNorm
from model_defs.layers.rope import Rope
from model_defs.registry import register
from model_defs.weights import Ignore, Rename, Rule, Split, Subtree


def _heads(cfg: HFConfig) -> tuple[int, int, int]:
    """Query heads, KV heads and the size of a head."""
    heads = cfg["num_attention_heads"]
    groups = cfg.get("multi_query_group_num", 1)
    if not cfg.get("multi_query_attention", False):
        groups = heads
    return heads, groups, cfg.get("kv_channels") or cfg["hidden_size"] // heads


def chatglm_weights(cfg: HFConfig) -> tuple[Rule, ...]:
    (heads, groups, dim), width = _heads(cfg), cfg["ffn_hidden_size"]
    qkv = ("q_proj", "k_proj", "v_proj")
    return (
        Ignore(r"transformer\.rotary_pos_emb\.inv_freq"),
        Subtree("transformer.encoder", "decoder"),
        Subtree("transformer.embedding.word_embeddings", "decoder.embed"),
        Subtree("transformer.output_layer", "lm_head"),
        Rename("final_layernorm", "norm"),
        Rename("input_layernorm", "pre_mixer_norm"),
        Rename("post_attention_layernorm", "pre_ffn_norm"),
        Rename("self_attention", "mixer"),
        Rename("dense", "o_proj"),
        Rename("mlp", "ffn"),
        Rename("dense_4h_to_h", "down_proj"),
        Split("query_key_value", qkv, (heads * dim, groups * dim, groups * dim))
        if cfg.get("multi_query_attention", False)
        else Split("query_key_value", qkv, (dim, dim, dim), groups=heads),
        Split("dense_h_to_4h", ("gate_proj", "up_proj"), (width, width)),
    )


@register(
    "ChatGLMModel",
    "ChatGLMForConditionalGeneration",
    weights=chatglm_weights,
    ignored=(
        # They change the order of the arithmetic only, or nothing.
        *("apply_query_key_layer_scaling", "attention_softmax_in_fp32", "bias_dropout_fusion"),
        *("fp32_residual_connection", "prefix_projection", "classifier_dropout"),
        # The original code reads padded_vocab_size and num_layers.
        *("attn_implementation", "vocab_size", "num_hidden_layers"),
        "attn_implementation",
    ),
    examples=("THUDM/chatglm2-6b", "THUDM/chatglm3-6b", "THUDM/glm-4-9b-chat"),
    reference="original",
)
def chatglm(cfg: HFConfig) -> DecoderSpec:
    for key in ("original_rope", "post_layer_norm"):
        cfg.expect(key, True)
    for key in ("pre_seq_len", "quantization_bit", "tie_word_embeddings"):
        cfg.expect(key, 0)
    if "chatglm2" in cfg.get("_name_or_path", ""):
        cfg.expect("rope_ratio", 1)
    cfg.expect("num_hidden_layers", cfg["num_layers"])  # the same number again
    heads, groups, dim = _heads(cfg)
    eps, bias = cfg["layernorm_epsilon"], cfg.get("add_bias_linear", False)
    qkv_bias = cfg.get("add_qkv_bias", False) or bias
    norm = RMSNorm(eps) if cfg.get("rmsnorm", True) else LayerNorm(eps)
    layer = Layer(
        mixer=GQA(
            heads,
            groups,
            dim,
            position=Rope(10000.0 * cfg.get("rope_ratio", 1), dim // 2, interleaved=True),
            qkv_bias=qkv_bias,
            out_bias=bias,
        ),
        ffn=MLP(cfg["ffn_hidden_size"], bias=bias),
        norms=PreNorm(norm),
        residual_after_norm=cfg.get("apply_residual_connection_post_layernorm", False),
    )
    return DecoderSpec(
        vocab=cfg["padded_vocab_size"],
        d_model=cfg["hidden_size"],
        layers=(layer,) * cfg["num_layers"],
        final_norm=norm,
        max_length=cfg["seq_length"],
    )
