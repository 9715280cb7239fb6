"""config.json files as published on the hub: each builds, with as many parameters as published.

Nothing is allocated. `tests/data/tensor_names.json` has the names of the tensors that some of the
checkpoints hold, with `{}` for a number; where it says how many tensors there are, it was taken
from a checkpoint's index file.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from model_defs import weights
from model_defs.decoder import Decoder, DecoderSpec, canonical_shapes, placements
from model_defs.heads import as_embedding
from model_defs.hf_config import UnsupportedConfig
from model_defs.layers.attention import GQA
from model_defs.layers.linear import BuildContext
from model_defs.layers.mla import MLA
from model_defs.layers.moe import MoE
from model_defs.layers.rope import Llama3, LongRope, Rope
from model_defs.registry import Family, family_of, list_families
from model_defs.sharding import ShardingRules, make_abstract_mesh

FOLDER = Path(__file__).resolve().parents[1] / "data" / "configs"
NAMES = json.loads((FOLDER.parent / "tensor_names.json").read_text())
DTYPE = np.dtype("float16")  # two bytes, as bfloat16
DEVICES = 16
TOLERANCE = 0.005

INDEX = "total size in the checkpoint's index"
HUB = "number the hub shows beside the weights"
CARD = "model card"


@dataclass(frozen=True)
class Published:
    """How many parameters a checkpoint is said to have, and by what.

    Attributes:
        parameters: a float where the source rounds.
        unused: of them, parameters that are stored and not used.
    """

    parameters: int | float
    source: str
    unused: int = 0


PUBLISHED = {
    "Alibaba-NLP/gte-Qwen2-7B-instruct": Published(7.61e9, HUB, unused=151646 * 3584),  # a head
    "CohereForAI/aya-23-8B": Published(8.03e9, HUB),
    "CohereForAI/c4ai-command-r-plus": Published(104e9, CARD),
    "CohereForAI/c4ai-command-r7b-12-2024": Published(8.03e9, HUB),
    "HuggingFaceTB/SmolLM2-135M-Instruct": Published(134_515_008, HUB),
    "LGAI-EXAONE/EXAONE-3.5-7.8B-Instruct": Published(7.82e9, HUB),
    "Qwen/Qwen-7B": Published(7_721_324_544, INDEX),
    "Qwen/Qwen1.5-MoE-A2.7B": Published(14.3e9, CARD),
    "Qwen/Qwen2-1.5B": Published(1_543_714_304, HUB),
    "Qwen/Qwen2-57B-A14B": Published(57.4e9, HUB),
    "Qwen/Qwen2.5-72B": Published(72.7e9, CARD),
    "Qwen/Qwen2.5-7B": Published(7_615_616_512, HUB),
    "Qwen/Qwen2.5-Math-RM-72B": Published(
        72_706_203_648 - 152064 * 8192 + 8192 * 8192 + 2 * 8192 + 1,
        "Qwen2.5-72B's, with two layers of a score in place of the head",
    ),
    "Qwen/Qwen3-235B-A22B": Published(235e9, CARD),
    "Qwen/Qwen3-30B-A3B": Published(30.5e9, CARD),
    "Qwen/Qwen3-8B": Published(8.19e9, HUB),
    "Skywork/Skywork-Reward-Llama-3.1-8B": Published(7.5e9, HUB),
    "THUDM/GLM-4-32B-0414": Published(32.57e9, "llama.cpp's report on the converted file"),
    "THUDM/chatglm3-6b": Published(6_243_584_032, INDEX, unused=32),
    "THUDM/glm-4-9b-chat": Published(9.4e9, HUB),
    "THUDM/glm-4-9b-chat-hf": Published(9.4e9, HUB),
    "allenai/OLMo-2-1124-7B": Published(7.3e9, HUB),
    "allenai/OLMo-7B-hf": Published(6.89e9, HUB),
    "allenai/OLMoE-1B-7B-0924": Published(6.92e9, HUB),
    "baichuan-inc/Baichuan2-13B-Chat": Published(13_896_668_160, INDEX),
    "baichuan-inc/Baichuan2-7B-Base": Published(7.51e9, HUB),
    "databricks/dbrx-instruct": Published(132e9, CARD),
    "deepseek-ai/DeepSeek-V2": Published(236e9, CARD),
    "deepseek-ai/DeepSeek-V2-Lite": Published(15.7e9, CARD),
    "deepseek-ai/DeepSeek-V3": Published(671e9, CARD),
    "deepseek-ai/deepseek-moe-16b-base": Published(16.4e9, CARD),
    "google/gemma-2-27b": Published(27.2e9, HUB),
    "google/gemma-3-1b-it": Published(999_885_952, HUB),
    "google/gemma-3-270m": Published(268_098_176, HUB),
    "google/gemma-7b": Published(8.54e9, HUB),
    # The card of the original rounds to 314e9. The converted checkpoint stores the tied head again.
    "hpcai-tech/grok-1": Published(
        316.5e9, "model card of TevunahAi/Grok-1-BF16", unused=131072 * 6144
    ),
    "ibm-granite/granite-3.0-3b-a800m-instruct": Published(3.3e9, CARD),
    "ibm-granite/granite-3.1-1b-a400m-instruct": Published(1.33e9, HUB),
    "ibm-granite/granite-3.1-8b-instruct": Published(8.17e9, HUB),
    "internlm/internlm2-7b-reward": Published(7.36e9, HUB),
    "internlm/internlm2-chat-7b": Published(7_737_708_544, INDEX),
    "internlm/internlm2_5-7b-chat": Published(7.74e9, HUB),
    "intfloat/e5-mistral-7b-instruct": Published(7.11e9, HUB),
    "meta-llama/Llama-3.1-405B": Published(406e9, HUB),
    "meta-llama/Llama-3.1-8B": Published(8_030_261_248, HUB),
    "meta-llama/Llama-3.2-1B": Published(1_235_814_400, HUB),
    "microsoft/Phi-3-small-8k-instruct": Published(7.39e9, HUB),
    "microsoft/Phi-3.5-MoE-instruct": Published(41.9e9, HUB),
    "microsoft/Phi-3.5-mini-instruct": Published(3_821_079_552, HUB),
    "microsoft/Phi-4-mini-instruct": Published(3_836_021_760, HUB),
    "microsoft/phi-4": Published(14_659_507_200, HUB),
    "mistralai/Mistral-7B-v0.3": Published(7_248_023_552, HUB),
    "mistralai/Mistral-Nemo-Base-2407": Published(12_247_782_400, HUB),
    "mistralai/Mistral-Small-24B-Base-2501": Published(23_572_403_200, HUB),
    "mistralai/Mixtral-8x22B-v0.1": Published(140_620_634_112, INDEX),
    "mistralai/Mixtral-8x7B-v0.1": Published(46.7e9, CARD),
    "openbmb/MiniCPM-2B-sft-bf16": Published(2.72e9, HUB),
    "openbmb/MiniCPM3-4B": Published(4.07e9, HUB),
    "stabilityai/stablelm-2-12b": Published(12.14e9, CARD),
    "stabilityai/stablelm-2-zephyr-1_6b": Published(1.644e9, CARD),
    "xverse/XVERSE-MoE-A4.2B": Published(25.8e9, CARD),
}
# "13B" is a class of size, not a count; the rest of what is checked here holds.
SIZE_CLASS_ONLY = {"xverse/XVERSE-13B"}
REPOSITORIES = sorted({*PUBLISHED, *SIZE_CLASS_ONLY})
# Their configs ask for attention to all positions, which nothing but an embedding can mean.
EMBEDDINGS = {"Alibaba-NLP/gte-Qwen2-7B-instruct"}

# Stored tensors that the plan must leave out by itself, by checkpoint.
NOT_WEIGHTS = {
    "THUDM/chatglm3-6b": ["transformer.rotary_pos_emb.inv_freq"],
    "THUDM/glm-4-9b-chat": ["transformer.rotary_pos_emb.inv_freq"],
    "deepseek-ai/DeepSeek-V3": [
        "model.layers.61.eh_proj.weight",  # the layer that predicts a further token
        "model.layers.61.enorm.weight",
        "model.layers.61.embed_tokens.weight",
        "model.layers.61.mlp.experts.255.down_proj.weight",
        "model.layers.61.shared_head.head.weight",
    ],
    "xverse/XVERSE-13B": [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(40)],
}


def config_of(repository: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{repository.replace('/', '--')}.json").read_text())


def family_for(repository: str) -> Family:
    family = family_of(config_of(repository))
    return as_embedding(family) if repository in EMBEDDINGS else family


@functools.cache
def spec_of(repository: str) -> DecoderSpec:
    return family_for(repository).spec(config_of(repository))


def build(spec: DecoderSpec) -> Decoder:
    rules = ShardingRules(make_abstract_mesh(1, 1))
    return spec.build(BuildContext(rules, DTYPE, DTYPE))


@dataclass(frozen=True)
class Short:
    """A model with equal layers once, so that it is small, and how many of each there are."""

    model: Decoder
    rules: ShardingRules
    counts: tuple[int, ...]

    def times(self, name: str) -> int:
        """How often the model has the array or tensor `name` of the short one."""
        layer = re.search(r"layers\.(\d+)\.", name)
        return self.counts[int(layer[1])] if layer else 1

    @property
    def num_parameters(self) -> int:
        shapes = canonical_shapes(self.model)
        return sum(math.prod(shape) * self.times(name) for name, shape in shapes.items())


@functools.cache
def short(repository: str, tp_size: int, ep_size: int = 1) -> Short:
    counts = Counter(spec_of(repository).layers)
    rules = ShardingRules(make_abstract_mesh(1, tp_size, ep_size=ep_size))
    model = replace(spec_of(repository), layers=tuple(counts)).build(
        BuildContext(rules, DTYPE, DTYPE)
    )
    return Short(model, rules, tuple(counts.values()))


def test_every_file_is_listed() -> None:
    files = {path.stem.replace("--", "/") for path in FOLDER.glob("*.json")}
    assert files == set(REPOSITORIES)


def test_every_family_has_a_published_config() -> None:
    families = {family_of(config_of(repository)).name for repository in REPOSITORIES}
    ours = [family for family in list_families() if family.home.startswith("model_defs/")]
    assert {family.name for family in ours if family.task == "generate"} <= families


@pytest.mark.parametrize("repository", PUBLISHED)
def test_published_config_has_the_published_number_of_parameters(repository: str) -> None:
    published = PUBLISHED[repository]
    found = short(repository, 1).num_parameters + published.unused
    if isinstance(published.parameters, int):
        assert found == published.parameters
    else:
        assert found == pytest.approx(published.parameters, rel=TOLERANCE)


@pytest.mark.parametrize("repository", REPOSITORIES)
def test_number_of_parameters_does_not_depend_on_the_mesh(repository: str) -> None:
    assert short(repository, DEVICES).num_parameters == short(repository, 1).num_parameters


@pytest.mark.parametrize("repository", ["deepseek-ai/DeepSeek-V2-Lite", "google/gemma-3-1b-it"])
def test_all_layers_count_as_one_of_each_kind_does(repository: str) -> None:
    assert build(spec_of(repository)).num_parameters == short(repository, 1).num_parameters


# ---- weights ---------------------------------------------------------------------------------


def as_pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "{}", name)


@pytest.mark.parametrize("repository", sorted(NAMES))
def test_the_plan_names_every_tensor_of_the_checkpoint(repository: str) -> None:
    facts = NAMES[repository]
    config, family = config_of(repository), family_for(repository)
    whole = "tensors" in facts  # else one layer of each kind will do
    model = build(spec_of(repository)) if whole else short(repository, 1).model
    shapes = canonical_shapes(model)
    rules = family.rules(config)
    stored = weights.export(rules, {name: (shape, "float16") for name, shape in shapes.items()})
    dropped = NOT_WEIGHTS.get(repository, [])
    found = {as_pattern(name) for name in [*stored, *dropped]}
    assert found == {*facts["names"], *map(as_pattern, dropped)}
    if whole:
        assert len(stored) + len(dropped) == facts["tensors"]
    headers = {name: (expr.shape, "float16") for name, expr in stored.items()}
    plan = weights.plan(rules, {**headers, **dict.fromkeys(dropped, ((4, 4), "float16"))}, shapes)
    assert set(plan.entries) == set(shapes)
    assert plan.dropped == tuple(sorted(dropped))


def test_an_embedding_reads_a_generating_models_checkpoint() -> None:
    repository = "Alibaba-NLP/gte-Qwen2-7B-instruct"
    config = config_of(repository)
    generator = family_of(config)
    as_stored = {key: value for key, value in config.items() if key != "is_causal"}
    layers = generator.spec(as_stored).layers[:1]
    stored = weights.export(
        generator.rules(as_stored),
        {
            name: (shape, "float16")
            for name, shape in canonical_shapes(
                build(replace(generator.spec(as_stored), layers=layers))
            ).items()
        },
    )
    headers = {name: (expr.shape, "float16") for name, expr in stored.items()}
    shapes = canonical_shapes(short(repository, 1).model)
    plan = weights.plan(family_for(repository).rules(config), headers, shapes)
    assert plan.dropped == ("lm_head.weight",)


# ---- sixteen devices -------------------------------------------------------------------------

# What every device keeps whole: norms, biases added after a sum over devices, and maps from a
# token's hidden state to few numbers that all devices need.
KEPT_WHOLE = re.compile(
    r".*norm\.(weight|bias)|.*\.(ffn\.down|mixer\.out)\.bias"
    r"|.*\.ffn\.(router\.weight|correction|shared_gate\.weight)|.*\.mixer\.latents\.weight"
    r"|head\.(hidden|out)\.(weight|bias)"
)


def has_experts(repository: str) -> bool:
    return any(isinstance(layer.ffn, MoE) for layer in set(spec_of(repository).layers))


@pytest.mark.parametrize("repository", REPOSITORIES)
def test_every_large_weight_splits_over_sixteen_devices(repository: str) -> None:
    for ep_size in (1, 4, 16) if has_experts(repository) else (1,):
        assert_large_weights_split(repository, ep_size)


def assert_large_weights_split(repository: str, ep_size: int) -> None:
    case = short(repository, DEVICES, ep_size)
    whole, total = 0, 0
    for path, placed in placements(case.model).items():
        name = ".".join(map(str, path))
        size = math.prod(placed.shape)
        part = math.prod(case.rules.sharding(*placed.axes).shard_shape(placed.shape))
        total += size * case.times(name)
        if part * DEVICES != size:
            assert part == size
            assert KEPT_WHOLE.fullmatch(name), name
            whole += size * case.times(name)
    assert whole < 0.05 * total  # the most: latents of a small model


# ---- cache -----------------------------------------------------------------------------------


def cache_numbers(config: dict[str, Any]) -> int:
    """Numbers a token leaves in the cache, from the config's own keys."""

    def first(*keys: str, default: Any = None) -> Any:
        return next((config[key] for key in keys if config.get(key) is not None), default)

    layers = first("num_hidden_layers", "num_layers", "n_layers")
    if "kv_lora_rank" in config:  # one latent and one rotated key, shared by all heads
        return layers * (config["kv_lora_rank"] + config["qk_rope_head_dim"])
    heads = first("num_attention_heads", "n_heads")
    kv_heads = first("num_key_value_heads", "multi_query_group_num", default=heads)
    if "attn_config" in config:
        kv_heads = config["attn_config"]["kv_n_heads"]
    size = first("head_dim", "kv_channels", default=first("hidden_size", "d_model") // heads)
    return layers * 2 * kv_heads * size


@pytest.mark.parametrize("repository", REPOSITORIES)
def test_cache_bytes_of_a_token_follow_the_formula(repository: str) -> None:
    case = short(repository, 1)
    caches = zip(case.counts, case.model.cache_specs, strict=True)
    found = sum(count * cache.token_bytes for count, cache in caches)
    assert found == 2 * cache_numbers(config_of(repository))


# ---- single facts ----------------------------------------------------------------------------


def attention(repository: str) -> list[GQA]:
    mixers = [layer.mixer for layer in spec_of(repository).layers]
    assert all(isinstance(mixer, GQA) for mixer in mixers)
    return cast(list[GQA], mixers)


def test_llama_3_scaling_is_read() -> None:
    rope = attention("meta-llama/Llama-3.2-1B")[0].position
    assert isinstance(rope, Rope) and rope.scaling == Llama3(32.0, 1.0, 4.0, 8192)


def test_longrope_magnitude_and_partial_rotation_are_read() -> None:
    rope = attention("microsoft/Phi-4-mini-instruct")[0].position
    assert isinstance(rope, Rope) and isinstance(rope.scaling, LongRope)
    assert rope.dim == 96
    assert rope.scaling.original_length == 4096
    assert rope.scaling.magnitude == pytest.approx(1.1902380714238083)


def test_gemma_layers_alternate_five_to_one() -> None:
    windows = [mixer.window for mixer in attention("google/gemma-3-1b-it")]
    assert windows == ([512] * 5 + [None]) * 4 + [512] * 2


def test_windows_that_are_switched_off_are_not_used() -> None:
    assert {mixer.window for mixer in attention("Qwen/Qwen2.5-7B")} == {None}


def test_first_layers_are_dense_where_the_config_says_so() -> None:
    layers = spec_of("deepseek-ai/DeepSeek-V3").layers
    assert [isinstance(layer.ffn, MoE) for layer in layers] == [False] * 3 + [True] * 58
    assert all(isinstance(layer.mixer, MLA) for layer in layers)


def test_an_encoder_that_sees_both_ways_is_refused_as_a_generator() -> None:
    config = config_of("Alibaba-NLP/gte-Qwen2-7B-instruct")
    with pytest.raises(UnsupportedConfig, match="is_causal"):
        family_of(config).spec(config)
