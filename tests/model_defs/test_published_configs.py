"""config.json files as published on the hub: each builds, with as many parameters as published.

The counts are the ones the hub shows for the safetensors files. Nothing is allocated.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from model_defs.layers.linear import BuildContext
from model_defs.layers.rope import Llama3, LongRope
from model_defs.registry import family_of
from model_defs.sharding import ShardingRules, make_abstract_mesh

FOLDER = Path(__file__).resolve().parents[1] / "data" / "configs"

PARAMETERS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "Qwen/Qwen2-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "google/gemma-3-1b-it": 999_885_952,
    "google/gemma-3-270m": 268_098_176,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "microsoft/Phi-3.5-mini-instruct": 3_821_079_552,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "microsoft/phi-4": 14_659_507_200,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "mistralai/Mistral-Nemo-Base-2407": 12_247_782_400,
    "mistralai/Mistral-Small-24B-Base-2501": 23_572_403_200,
}


def config_of(repository: str) -> dict:
    return json.loads((FOLDER / f"{repository.replace('/', '--')}.json").read_text())


def build(repository: str, tp_size: int = 1):
    config = config_of(repository)
    rules = ShardingRules(make_abstract_mesh(1, tp_size))
    dtype = np.dtype("float32")
    return family_of(config).spec(config).build(BuildContext(rules, dtype, dtype))


def test_every_file_is_listed() -> None:
    files = {path.stem.replace("--", "/") for path in FOLDER.glob("*.json")}
    assert files == set(PARAMETERS)


@pytest.mark.parametrize("repository", PARAMETERS)
def test_published_config_has_the_published_number_of_parameters(repository: str) -> None:
    assert build(repository).num_parameters == PARAMETERS[repository]


@pytest.mark.parametrize("repository", PARAMETERS)
def test_number_of_parameters_does_not_depend_on_the_mesh(repository: str) -> None:
    assert build(repository, tp_size=8).num_parameters == PARAMETERS[repository]


def test_llama_3_scaling_is_read() -> None:
    rope = family_of(config := config_of("meta-llama/Llama-3.2-1B")).spec(config)
    assert rope.layers[0].mixer.position.scaling == Llama3(32.0, 1.0, 4.0, 8192)


def test_longrope_magnitude_and_partial_rotation_are_read() -> None:
    config = config_of("microsoft/Phi-4-mini-instruct")
    rope = family_of(config).spec(config).layers[0].mixer.position
    assert isinstance(rope.scaling, LongRope)
    assert rope.dim == 96
    assert rope.scaling.original_length == 4096
    assert rope.scaling.magnitude == pytest.approx(1.1902380714238083)


def test_gemma_layers_alternate_five_to_one() -> None:
    config = config_of("google/gemma-3-1b-it")
    windows = [layer.mixer.window for layer in family_of(config).spec(config).layers]
    assert windows == ([512] * 5 + [None]) * 4 + [512] * 2


def test_windows_that_are_switched_off_are_not_used() -> None:
    config = config_of("Qwen/Qwen2.5-7B")
    assert {layer.mixer.window for layer in family_of(config).spec(config).layers} == {None}
