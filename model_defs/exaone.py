"""EXAONE 3.0 and 3.5: Llama under GPT-2's names.

LG AI Research 2024 (arXiv:2408.03541, arXiv:2412.04862).
"""

from model_defs.decoder import DecoderSpec, Layer, PreNorm
from model_defs.hf_config import HFConfig
from model_defs.layers.attention import GQA
from model_defs.layers.mlp import MLP
from model_defs.layers.norm import RMSNorm
from model_defs.llama import tied_head
from model_defs.registry import register
from model_defs.weights import Ignore, Rename, Rule, Subtree


def exaone_weights(cfg: HFConfig) -> tuple[Rule, ...]:
    return (
        Ignore(r".*\.rotary(_emb)?\.inv_freq"),
        Subtree("transformer", "decoder"),
        Rename("wte", "embed"),
        Rename("h", "layers"),
        Rename("ln_f", "norm"),
        Rename("ln_1", "pre_mixer_norm"),
        Rename("ln_2", "pre_ffn_norm"),
        Rename("attn.attention", "mixer"),
        Rename("out_proj", "o_proj"),
        Rename("mlp", "ffn"),
        Rename("c_fc_0", "gate_proj"),
        Rename("c_fc_1", "up_proj"),
        Rename("c_proj", "down_proj"),
        *tied_head(cfg),
    )


@register(
    "ExaoneForCausalLM",
    weights=exaone_weights,
    ignored=("attention_dropout", "embed_dropout"),
    examples=(
        "LGAI-EXAONE/EXAONE-3.0-7.8B-Instruct",
        "LGAI-EXAONE/EXAONE-3.5-7.8B-Instruct",
        "LGAI-EXAONE/EXAONE-3.5-2.4B-Instruct",
    ),
    reference="original",
)
def exaone(cfg: HFConfig) -> DecoderSpec:
    norm = RMSNorm(cfg["layer_norm_epsilon"])
    layer = Layer(
        mixer=GQA.with_rope(cfg),
        ffn=MLP(cfg["intermediate_size"], cfg.get("activation_function", "silu")),
        norms=PreNorm(norm),
    )
    # A config that does not say ties the head; the weight rules then refuse a checkpoint with one.
    return DecoderSpec.from_hf(cfg, layers=[layer] * cfg["num_layers"], final_norm=norm, tied=True)
