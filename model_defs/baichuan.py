"""Baichuan 1 and 2: the 7B rotates queries and keys, the 13B has ALiBi.

Yang et al. 2023 (arXiv:2309.10305). The sizes share an architecture name; only the 7B's config has
`max_position_embeddings`.
"""

from model_defs.decoder import DecoderSpec, pre_norm_decoder
from model_defs.hf_config import HFConfig
from model_defs.layers.attention import GQA, ALiBi
from model_defs.layers.embedding import LMHead
from model_defs.layers.mlp import MLP
from model_defs.llama import HF_LLAMA, tied_head
from model_defs.registry import register
from model_defs.weights import Rule, Split

VOCAB_1 = 64000  # of Baichuan 1, which has a plain head; Baichuan 2 normalises the head's rows


def baichuan_weights(cfg: HFConfig) -> tuple[Rule, ...]:
    parts = ("q_proj", "k_proj", "v_proj")
    return (*HF_LLAMA, Split("W_pack", parts, (cfg["hidden_size"],) * 3), *tied_head(cfg))


@register(
    "BaichuanForCausalLM",
    "BaiChuanForCausalLM",
    weights=baichuan_weights,
    ignored=(
        "_from_model_config",
        "gradient_checkpointing",
        "model_max_length",  # read where it is the only length
        "user_id",
        "z_loss_weight",
    ),
    examples=(
        "baichuan-inc/Baichuan-7B",
        "baichuan-inc/Baichuan-13B-Chat",
        "baichuan-inc/Baichuan2-7B-Chat",
        "baichuan-inc/Baichuan2-13B-Chat",
    ),
    reference="original",
)
def baichuan(cfg: HFConfig) -> DecoderSpec:
    unit_rows = cfg["vocab_size"] != VOCAB_1
    if unit_rows:
        cfg.expect("tie_word_embeddings", False)
    longest = cfg.get("max_position_embeddings")
    mixer = GQA.from_hf(cfg, position=ALiBi()) if longest is None else GQA.with_rope(cfg)
    return pre_norm_decoder(
        cfg,
        mixer,
        MLP.from_hf(cfg),
        head=LMHead(unit_rows=unit_rows),
        max_length=cfg["model_max_length"] if longest is None else longest,
    )
