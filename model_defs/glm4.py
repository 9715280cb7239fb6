"""GLM-4-0414 and GLM-Z1: GLM-4 with a norm after each branch as well.

Model card of zai-org/GLM-4-9B-0414.
"""

from model_defs.decoder import DecoderSpec, SandwichNorm
from model_defs.glm import GLM_TINY, glm_decoder, glm_weights
from model_defs.hf_config import HFConfig
from model_defs.layers.norm import RMSNorm
from model_defs.registry import register
from model_defs.weights import Rename, Rule


def glm4_weights(cfg: HFConfig) -> tuple[Rule, ...]:
    return (
        *glm_weights(cfg),
        Rename("post_self_attn_layernorm", "post_mixer_norm"),
        Rename("post_mlp_layernorm", "post_ffn_norm"),
    )


@register(
    "Glm4ForCausalLM",
    weights=glm4_weights,
    examples=("zai-org/GLM-4-9B-0414", "zai-org/GLM-Z1-32B-0414"),
    tiny=GLM_TINY,
)
def glm4(cfg: HFConfig) -> DecoderSpec:
    norm = RMSNorm(cfg["rms_norm_eps"])
    return glm_decoder(cfg, norm, SandwichNorm(norm))
