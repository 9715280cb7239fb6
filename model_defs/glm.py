"""GLM-4 9B and GLM-Edge in Hugging Face's layout: Llama with a half, interleaved rotation.

GLM Team 2024 (arXiv:2406.12793).
"""

from model_defs.decoder import DecoderSpec, Layer, Norms, PreNorm
from model_defs.hf_config import HFConfig
from model_defs.layers.attention import GQA
from model_defs.layers.mlp import MLP
from model_defs.layers.norm import RMSNorm
from model_defs.layers.rope import rope_from_hf
from model_defs.llama import HF_LLAMA, TINY, tied_head
from model_defs.registry import register
from model_defs.weights import Rule, Split

GLM_TINY = (
    {**TINY, "head_dim": 16},
    {
        **TINY,
        "head_dim": 24,
        "num_key_value_heads": 1,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "partial_rotary_factor": 1.0,
    },
)


def glm_weights(cfg: HFConfig) -> tuple[Rule, ...]:
    width = cfg["intermediate_size"]
    gate_up = Split("gate_up_proj", ("gate_proj", "up_proj"), (width, width))
    return (*HF_LLAMA, gate_up, *tied_head(cfg))


def glm_decoder(cfg: HFConfig, norm: RMSNorm, norms: Norms) -> DecoderSpec:
    """The decoder, with `norms` around the branches of each layer."""
    mixer = GQA.from_hf(
        cfg,
        position=rope_from_hf(cfg, cfg["head_dim"], interleaved=True, fraction=0.5),
        qkv_bias=cfg.get("attention_bias", True),
    )
    layer = Layer(mixer, MLP.from_hf(cfg), norms)
    return DecoderSpec.from_hf(cfg, layers=[layer] * cfg["num_hidden_layers"], final_norm=norm)


@register(
    "GlmForCausalLM",
    weights=glm_weights,
    examples=("zai-org/glm-4-9b-chat-hf", "zai-org/glm-edge-1.5b-chat"),
    tiny=GLM_TINY,
)
def glm(cfg: HFConfig) -> DecoderSpec:
    norm = RMSNorm(cfg["rms_norm_eps"])
    return glm_decoder(cfg, norm, PreNorm(norm))
