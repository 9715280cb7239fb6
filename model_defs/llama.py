"""Llama 1 to 3.3 and the checkpoints that are Llama under another name (SmolLM, Yi, ...).

Touvron et al. 2023 (arXiv:2302.13971), Grattafiori et al. 2024 (arXiv:2407.21783).
"""

from model_defs.decoder import DecoderSpec, pre_norm_decoder
from model_defs.heads import embeds, scores
from model_defs.hf_config import HFConfig
from model_defs.layers.attention import GQA
from model_defs.layers.mlp import MLP
from model_defs.registry import register
from model_defs.weights import HF_BLOCK_NAMES, Ignore, Rename, Rule, Subtree, Tie

HF_LLAMA: tuple[Rule, ...] = (
    Ignore(r".*\.rotary_emb\.inv_freq"),
    Subtree("model", "decoder"),
    Rename("input_layernorm", "pre_mixer_norm"),
    Rename("post_attention_layernorm", "pre_ffn_norm"),  # HF's name; it sits before the FFN
    *HF_BLOCK_NAMES,
)


def tied_head(cfg: HFConfig, default: bool = False) -> tuple[Rule, ...]:
    """The rule for a head that is the embedding table, where the config says so."""
    tied = cfg.get("tie_word_embeddings", default)
    return (Tie("lm_head.weight", "decoder.embed.weight"),) if tied else ()


def llama_weights(cfg: HFConfig) -> tuple[Rule, ...]:
    return (*HF_LLAMA, *tied_head(cfg))


TINY = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@register(
    "LlamaForCausalLM",
    weights=llama_weights,
    ignored=("is_llama_config", "unsloth_template"),
    examples=("meta-llama/Llama-3.1-8B-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    tiny=(
        TINY,
        {
            **TINY,
            "head_dim": 24,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
)
def llama(cfg: HFConfig) -> DecoderSpec:
    cfg.expect("pretraining_tp", 1)  # other values only re-order the reference's arithmetic
    cfg.expect("rope_interleaved", False)
    bias = cfg.get("attention_bias", False)
    mixer = GQA.with_rope(cfg, qkv_bias=bias, out_bias=bias)
    return pre_norm_decoder(cfg, mixer, MLP.from_hf(cfg, bias=cfg.get("mlp_bias", False)))


scores(
    llama,
    "LlamaForSequenceClassification",
    examples=("Skywork/Skywork-Reward-Llama-3.1-8B-v0.2",),
    tiny=({**TINY, "num_labels": 1}, {**TINY, "tie_word_embeddings": True, "num_labels": 3}),
)
embeds(
    llama,
    "LlamaModel",
    "LlamaEmbeddingModel",
    examples=("meta-llama/Llama-3.2-1B",),
    tiny=(TINY,),
)
