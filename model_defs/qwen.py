"""Qwen 1: fused q/k/v with a bias, a base that grows with long prompts, scaled queries (logn).

Bai et al. 2023 (arXiv:2309.16609); names and length rules as in the checkpoints' own code.
"""

from dataclasses import replace

from model_defs.decoder import DecoderSpec, Layer, PreNorm
from model_defs.hf_config import HFConfig, UnsupportedConfig
from model_defs.layers.attention import GQA
from model_defs.layers.mlp import MLP
from model_defs.layers.norm import RMSNorm
from model_defs.layers.rope import PromptNTK, Rope
from model_defs.llama import tied_head
from model_defs.registry import register
from model_defs.weights import Ignore, Rename, Rule, Split, Subtree


def qwen_weights(cfg: HFConfig) -> tuple[Rule, ...]:
    ours = {
        **{"wte": "embed", "h": "layers", "ln_f": "norm", "attn": "mixer", "mlp": "ffn"},
        **{"ln_1": "pre_mixer_norm", "ln_2": "pre_ffn_norm"},
        **{"mixer.c_proj": "mixer.o_proj", "ffn.c_proj": "ffn.down_proj"},
        **{"w1": "up_proj", "w2": "gate_proj"},  # the second is the gate
    }
    return (
        Ignore(r"transformer\.rotary_emb\.inv_freq"),
        Subtree("transformer", "decoder"),
        *(Rename(hf, name) for hf, name in ours.items()),
        Split("c_attn", ("q_proj", "k_proj", "v_proj"), (cfg["hidden_size"],) * 3),
        *tied_head(cfg),
    )


@register(
    "QWenLMHeadModel",
    weights=qwen_weights,
    ignored=(
        *("attn_dropout_prob", "emb_dropout_prob", "onnx_safe", "use_flash_attn"),
        *("bf16", "fp16", "fp32", "softmax_in_fp32", "use_cache_kernel"),
    ),
    examples=("Qwen/Qwen-7B-Chat", "Qwen/Qwen-1_8B-Chat", "Qwen/Qwen-72B"),
    reference="original",
)
def qwen(cfg: HFConfig) -> DecoderSpec:
    cfg.expect("scale_attn_weights", True)
    cfg.expect("use_cache_quantization", False)
    norm, bias = RMSNorm(cfg["layer_norm_epsilon"]), not cfg.get("no_bias", True)
    mixer = GQA.from_hf(cfg, qkv_bias=True, out_bias=bias)
    if mixer.heads != mixer.kv_heads or mixer.heads * cfg["kv_channels"] != cfg["hidden_size"]:
        raise UnsupportedConfig(
            f"{cfg.architecture}: {mixer.heads} heads, {mixer.kv_heads} KV heads and 'kv_channels' "
            f"{cfg['kv_channels']} with 'hidden_size' {cfg['hidden_size']}; implemented: as many "
            f"KV heads as heads, which together are as wide as the hidden size. Correct the config."
        )
    length = cfg["seq_length"]
    mixer = replace(
        mixer,
        position=Rope(
            cfg["rotary_emb_base"],
            int(mixer.head_dim * cfg.get("rotary_pct", 1.0)),
            PromptNTK(length) if cfg.get("use_dynamic_ntk", True) else None,
        ),
        logn=length if cfg.get("use_logn_attn", True) else None,
    )
    ffn = MLP(cfg["intermediate_size"] // 2, bias=bias)  # the key counts both halves
    layers = [Layer(mixer, ffn, PreNorm(norm))] * cfg["num_hidden_layers"]
    return DecoderSpec.from_hf(cfg, layers=layers, final_norm=norm)
