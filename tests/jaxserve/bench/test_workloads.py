"""The workloads are exactly those that peers were measured with."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from pathlib import Path

import pytest

from jaxserve.bench.peers import load_peers, ratio_to_best
from jaxserve.bench.workloads import (
    DEFAULT_CASES,
    arrival_times,
    lognormal_mix,
    parse_cases,
)
from jaxserve.config import ConfigError, EngineConfig

CONFIGS = Path(__file__).parents[2] / "data" / "configs"
MODELS = {model.name: model for model in load_peers().models}


def test_the_lognormal_mix_has_the_totals_of_the_published_one() -> None:
    mix = lognormal_mix(1000)
    assert len(mix) == 1000
    assert sum(num_input for num_input, _ in mix) == 262_529
    assert sum(num_output for _, num_output in mix) == 216_148
    assert (min(mix)[0], max(mix)[0]) == (4, 2048)
    assert max(num_output for _, num_output in mix) == 1024
    assert lognormal_mix(10) == mix[:10]


def test_a_case_is_requests_input_and_output() -> None:
    batch, prefill, mix = parse_cases("512x128/256, 8x128/1,mix1000")
    assert batch.lengths == ((128, 256),) * 512
    assert (batch.num_requests, batch.input_tokens, batch.output_tokens) == (512, 65536, 131072)
    assert (batch.longest, batch.is_prefill) == (384, False)
    assert prefill.is_prefill
    assert (mix.name, mix.input_tokens) == ("mix1000", 262_529)


@pytest.mark.parametrize(
    "text", ["", "8x128", "8x128/0", "0x1/1", "mix", "mix0", "8x128/1,", "ax1/1"]
)
def test_a_case_that_is_misspelt_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no case; write REQUESTSxINPUT/OUTPUT"):
        parse_cases(text)


def test_prompts_are_random_and_the_same_for_a_seed() -> None:
    (case,) = parse_cases("3x50/2")
    prompts = case.prompts(1000, seed=1)
    assert [len(prompt) for prompt in prompts] == [50, 50, 50]
    assert prompts == case.prompts(1000, seed=1) != case.prompts(1000, seed=2)
    assert len({tuple(prompt) for prompt in prompts}) == 3
    assert all(0 <= token < 1000 for prompt in prompts for token in prompt)


def test_arrivals_are_a_poisson_process() -> None:
    times = arrival_times(20_000, 8.0, seed=0)
    assert times[0] == 0 and times == sorted(times)
    assert times == arrival_times(20_000, 8.0, seed=0) != arrival_times(20_000, 8.0, seed=1)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(1 / 8, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(1 / 8, rel=0.03)
    assert arrival_times(4, math.inf, seed=0) == [0, 0, 0, 0]
    assert arrival_times(1, 8.0, seed=0) == [0]


# ---- peers --------------------------------------------------------------------------------------


def test_default_cases_on_an_accelerator_are_those_of_the_peers() -> None:
    default = [DEFAULT_CASES[kind]["accelerator"] for kind in ("latency", "throughput")]
    names = [case.name for case in parse_cases(",".join(default))]
    assert names == list(MODELS["Llama-3.1-8B"].seconds)
    for model in MODELS.values():
        assert set(model.seconds) <= set(names)
        assert all(set(figures) <= {"vLLM", "SGLang"} for figures in model.seconds.values())


def test_figures_give_the_rates_that_were_published_with_them() -> None:
    published = {  # tokens/s, of output or, with one token of it, of the prompts
        ("Llama-3.1-8B", "1x128/128"): 153.4,
        ("Llama-3.1-8B", "32x512/1"): 44_513,
        ("Llama-3.1-8B", "512x128/512"): 16_754,
        ("Llama-3.1-8B", "mix1000"): 8043,
        ("OLMoE-1B-7B", "64x1024/1"): 173_268,
        ("OLMoE-1B-7B", "1000x1024/128"): 7881,
    }
    for (model, name), rate in published.items():
        (case,) = parse_cases(name)
        tokens = case.input_tokens if case.is_prefill else case.output_tokens
        assert tokens / MODELS[model].seconds[name]["vLLM"] == pytest.approx(rate, rel=5e-3)


def test_a_model_is_known_by_its_architecture_and_size() -> None:
    peers = load_peers()
    known = peers.model_like("LlamaForCausalLM", 8030261248)
    assert known is MODELS["Llama-3.1-8B"]
    assert peers.model_like("LlamaForCausalLM", 134515008) is None
    assert peers.model_like("MistralForCausalLM", 8030261248) is None


def test_suites_bring_config_and_settings() -> None:
    peers = load_peers()
    assert sorted(peers.suites) == ["h100-llama", "h100-olmoe"]
    for model in peers.models:
        config = EngineConfig(model.config, **peers.settings)
        assert config.load_format == "dummy"
        longest = max(case.longest for case in parse_cases(",".join(model.seconds)))
        assert longest <= (config.context_length or 0)
    same = {"Llama-3.1-8B": "meta-llama--Llama-3.1-8B", "OLMoE-1B-7B": "allenai--OLMoE-1B-7B-0924"}
    for name, stem in same.items():
        original = json.loads((CONFIGS / f"{stem}.json").read_text())
        assert json.loads(Path(MODELS[name].config).read_text()) == original


def test_the_ratio_is_to_the_faster_peer() -> None:
    assert ratio_to_best(0.5, {"a": 1.0, "b": 0.75}) == 1.5
    assert ratio_to_best(0.5, {}) is None
