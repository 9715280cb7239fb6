"""InternLM 2 and 2.5: Llama with one projection for queries, keys and values, stored by KV group.

Cai et al. 2024 (arXiv:2403.17297); https://huggingface.co/internlm/internlm2_5-7b-chat.
"""

from model_defs.decoder import DecoderSpec, pre_norm_decoder
from model_defs.heads import scores
from model_defs.hf_config import HFConfig
from model_defs.layers.attention import GQA, head_dim_from_hf
from model_defs.layers.embedding import ScoreHead
from model_defs.layers.mlp import MLP
from model_defs.llama import tied_head
from model_defs.registry import register
from model_defs.weights import Ignore, Rename, Rule, Split, Subtree


def internlm2_weights(cfg: HFConfig) -> tuple[Rule, ...]:
    heads, dim = cfg["num_attention_heads"], head_dim_from_hf(cfg)
    kv_heads = cfg.get("num_key_value_heads", heads)
    return (
        Ignore(r".*\.rotary_emb\.inv_freq"),
        Subtree("model", "decoder"),
        Subtree("output", "lm_head"),
        Rename("tok_embeddings", "embed"),
        Rename("attention_norm", "pre_mixer_norm"),
        Rename("ffn_norm", "pre_ffn_norm"),
        Rename("attention", "mixer"),
        Rename("feed_forward", "ffn"),
        Rename("w1", "gate_proj"),
        Rename("w2", "down_proj"),
        Rename("w3", "up_proj"),
        Rename("wo", "o_proj"),
        Split(
            "wqkv", ("q_proj", "k_proj", "v_proj"), (heads // kv_heads * dim, dim, dim), kv_heads
        ),
        *tied_head(cfg),
    )


@register(
    "InternLM2ForCausalLM",
    weights=internlm2_weights,
    ignored=("attn_implementation",),
    examples=("internlm/internlm2-chat-7b", "internlm/internlm2_5-7b-chat"),
    reference="original",
)
def internlm2(cfg: HFConfig) -> DecoderSpec:
    cfg.expect("pretraining_tp", 1)
    bias = cfg["bias"]  # of the attention only
    mixer = GQA.with_rope(cfg, qkv_bias=bias, out_bias=bias)
    return pre_norm_decoder(cfg, mixer, MLP.from_hf(cfg))


scores(
    internlm2,
    "InternLM2ForRewardModel",
    name="reward",
    # The published code appends this token to a conversation and reads the score there.
    head=lambda cfg: ScoreHead(1, end_token=cfg.get("reward_token_id")),
    rules=(Subtree("v_head", "score"),),
    examples=("internlm/internlm2-7b-reward", "internlm/internlm2-1_8b-reward"),
)
