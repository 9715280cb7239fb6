"""`--load-format dummy`: models of random weights from a config alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from converters.checkpoint import open_config
from converters.errors import CheckpointError
from jaxserve import LLM
from jaxserve.config import EngineConfig
from jaxserve.engine.dummy import _filler, dummy_params
from jaxserve.engine.engine import Engine
from jaxserve.engine.loader import build_model
from jaxserve.request import InvalidRequest, SamplingParams
from jaxserve.scheduler.buckets import Bucket
from jaxserve.tokenizer import TokenizerError
from jaxserve.verification.replay import replay
from model_defs.registry import get_family
from model_defs.sharding import ShardingRules, make_mesh

from .conftest import ONE_BUCKET, TWO_KV_HEADS, greedy

SMALL = {
    **ONE_BUCKET,
    "load_format": "dummy",
    "device": "cpu",
    "context_length": 64,
    "page_size": 8,
    "max_running_requests": 4,
    "chunked_prefill_size": 32,
    "max_total_tokens": 256,
    "compile_cache_dir": None,
}
# Pre-norm; norms with an offset around both branches, soft caps; experts; a latent cache; layer
# norms and parallel branches; norms after the branches only.
ARCHITECTURES = (
    "LlamaForCausalLM",
    "Gemma2ForCausalLM",
    "OlmoeForCausalLM",
    "DeepseekV3ForCausalLM",
    "CohereForCausalLM",
    "Olmo2ForCausalLM",
)


def write_config(architecture: str, path: Path) -> Path:
    """Write the config.json of the family's first tiny model, and nothing else."""
    fields = get_family(architecture).tiny[0]
    config = getattr(transformers, architecture).config_class(**fields)
    config.architectures = [architecture]
    path.write_text(config.to_json_string(use_diff=False))
    return path


@pytest.fixture(scope="module")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.json"
    config = transformers.LlamaConfig(**TWO_KV_HEADS, architectures=["LlamaForCausalLM"])
    path.write_text(config.to_json_string(use_diff=False))
    return path


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_finite_and_differ(architecture: str, tmp_path: Path) -> None:
    engine = Engine(EngineConfig(str(write_config(architecture, tmp_path / "c.json")), **SMALL))
    try:
        prompts = [list(range(3, 40)), [5, 6, 7]]
        pieces = [p for step in replay(engine.runner, prompts, Bucket(32, 4)) for p in step]
        logits = np.concatenate([piece.logits for piece in pieces])
        assert np.isfinite(logits).all()
        assert 0.01 < logits.std() < 100
        assert len(set(logits.argmax(axis=-1).tolist())) > 5
        for piece in pieces:
            assert all(np.abs(layer).max() < 1000 for layer in piece.layers)
    finally:
        engine.close()


def params_by_name(path: Path, seed: int = 0, tp_size: int = 1) -> dict[str, jax.Array]:
    checkpoint = open_config(path)
    spec = get_family(checkpoint.config["architectures"][0]).spec(checkpoint.config)
    rules = ShardingRules(make_mesh(1, tp_size))
    model = build_model(spec, rules, jnp.dtype("float32"), jnp.dtype("float32"))
    arrays = dummy_params(model, seed)
    for array, struct in zip(arrays, model.params, strict=True):
        assert (array.shape, array.dtype) == (struct.shape, struct.dtype)
        assert array.sharding.is_equivalent_to(struct.sharding, array.ndim)
    names = [placed.weights[0].name for placed in model.placed]
    return dict(zip(names, arrays, strict=True))


def test_matrices_keep_the_size_of_what_they_multiply(tiny_config: Path) -> None:
    params = params_by_name(tiny_config)
    fan_in = {"mixer.q_proj": 64, "mixer.o_proj": 64, "ffn.gate_proj": 64, "ffn.down_proj": 96}
    for name, size in fan_in.items():
        weight = np.asarray(params[f"decoder.layers.1.{name}.weight"])
        assert abs(weight.mean()) < 0.05 * weight.std()
        np.testing.assert_allclose(weight.std(), size**-0.5, rtol=0.05)
    assert np.abs(np.corrcoef(params["decoder.embed.weight"])[0, 1:]).max() < 0.6


def test_norms_scale_by_one_whatever_is_stored(tiny_config: Path, tmp_path: Path) -> None:
    for path, stored in (
        (tiny_config, 1.0),
        (write_config("Gemma2ForCausalLM", tmp_path / "offset.json"), 0.0),
    ):
        params = params_by_name(path)
        assert {np.unique(params[name]).item() for name in params if "norm" in name} == {stored}


def test_a_seed_gives_the_same_weights_and_another_one_others(tiny_config: Path) -> None:
    first, again, other = (params_by_name(tiny_config, seed) for seed in (3, 3, 4))
    name = "decoder.layers.0.mixer.q_proj.weight"
    np.testing.assert_array_equal(first[name], again[name])
    assert not np.array_equal(first[name], other[name])
    assert not np.array_equal(first[name], first["decoder.layers.1.mixer.q_proj.weight"])


def test_weights_are_made_where_they_stay(tiny_config: Path) -> None:
    params = params_by_name(tiny_config, tp_size=4)
    shards = params["decoder.layers.0.ffn.down_proj.weight"].addressable_shards
    assert len(shards) == 4
    assert len({np.asarray(shard.data).tobytes() for shard in shards}) == 4


def test_making_a_parameter_needs_no_memory_beside_it() -> None:
    shape = (4096, 1, 1024)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    fill = _filler(shape, jnp.dtype("bfloat16"), sharding)
    memory = fill.lower(np.uint32(1), 0.1).compile().memory_analysis()
    assert memory.output_size_in_bytes == 2 * 4096 * 1024
    assert memory.temp_size_in_bytes < 4096


# ---- configs without weights or tokenizers ------------------------------------------------------


def test_token_ids_go_in_and_out_without_a_tokenizer(tiny_config: Path) -> None:
    with LLM(str(tiny_config), EngineConfig(str(tiny_config), **SMALL), show_progress=False) as llm:
        one, two = llm.generate([[1, 2, 3], [4, 5]], greedy(6))
        assert (len(one.token_ids), len(two.token_ids)) == (6, 6)
        assert one.text == ""
        assert one.prompt_token_ids == [1, 2, 3]
        assert llm.generate([4, 5], greedy(6))[0].token_ids == two.token_ids
        with pytest.raises(InvalidRequest, match=r"without a tokenizer.*--tokenizer-path"):
            llm.generate("text")
        with pytest.raises(InvalidRequest, match="without a tokenizer"):
            llm.chat([{"role": "user", "content": "hello"}])
        with pytest.raises(InvalidRequest, match="use stop_token_ids") as caught:
            llm.generate([1], SamplingParams(stop="x"))
        assert caught.value.field == "stop"


def test_a_folder_with_a_config_and_a_tokenizer_takes_text(
    tiny_config: Path, tmp_path: Path, make_byte_tokenizer: Callable[..., Path]
) -> None:
    folder = make_byte_tokenizer(tmp_path / "model")
    (folder / "config.json").write_text(tiny_config.read_text())
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        Engine(EngineConfig(str(folder), **SMALL | {"load_format": "auto"}))
    with LLM(str(folder), EngineConfig(str(folder), **SMALL), show_progress=False) as llm:
        assert llm.generate("text", greedy(4))[0].prompt_token_ids == list(b"text")


def test_a_tokenizer_that_is_named_must_be_there(tiny_config: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(tiny_config.read_text())
    with pytest.raises(TokenizerError, match=r"(?s)no usable tokenizer in .*--tokenizer-path"):
        Engine(EngineConfig(str(tiny_config), **SMALL, tokenizer_path=str(tmp_path)))


@pytest.mark.parametrize("task", ["embed", "score"])
def test_texts_are_read_with_random_weights(task: str, tiny_config: Path, tmp_path: Path) -> None:
    config = json.loads(tiny_config.read_text())
    if task == "score":
        config |= {"architectures": ["LlamaForSequenceClassification"], "num_labels": 3}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    settings = EngineConfig(str(tmp_path), **SMALL, is_embedding=task == "embed")
    with LLM(str(tmp_path), settings, show_progress=False) as llm:
        texts = [[1, 2, 3], [4, 5]]
        read = llm.embed(texts) if task == "embed" else llm.classify(texts)
        assert read.shape == (2, 64 if task == "embed" else 3)
        assert np.isfinite(read).all()
        assert not np.array_equal(read[0], read[1])
