"""Tiny random checkpoints, engines on them, and the tokens that transformers gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.request import Request, SamplingParams
from jaxserve.scheduler.buckets import Bucket

from ...model_defs import hf_reference

VOCAB, EOS = 262, 258
CONTEXT = 128
ONE_BUCKET = {"skip_background_compile": True}  # for tests that are about something else
TWO_KV_HEADS = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT + 32,
    "bos_token_id": 257,
    "eos_token_id": EOS,
    "pad_token_id": 256,
}
THREE_KV_HEADS = TWO_KV_HEADS | {
    "hidden_size": 96,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
}


@dataclass(frozen=True)
class TinyModel:
    """A checkpoint on disk and the reference implementation of it."""

    path: str
    reference: Any

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The next `count` tokens, each from all tokens before it: no cache, no batch."""
        tokens = list(prompt)
        for _ in range(count):
            (logits,) = hf_reference.hf_logits(self.reference, [tokens])
            tokens.append(int(logits[-1].argmax()))
        return tokens[len(prompt) :]


@pytest.fixture(scope="session")
def make_model(
    tmp_path_factory: pytest.TempPathFactory, make_byte_tokenizer: Callable[..., Path]
) -> Callable[[Mapping[str, Any]], TinyModel]:
    """Return a function that writes a random checkpoint with these fields in its config."""

    def make(fields: Mapping[str, Any]) -> TinyModel:
        folder = make_byte_tokenizer(tmp_path_factory.mktemp("tiny"))
        reference = hf_reference.make_tiny("LlamaForCausalLM", fields, seed=1)
        hf_reference.save(reference, folder)
        return TinyModel(str(folder), reference)

    return make


@pytest.fixture(scope="session")
def model(make_model: Callable[..., TinyModel]) -> TinyModel:
    return make_model(TWO_KV_HEADS)


@pytest.fixture(scope="session")
def odd_model(make_model: Callable[..., TinyModel]) -> TinyModel:
    """A model whose heads divide over few meshes."""
    return make_model(THREE_KV_HEADS)


class Driver:
    """An engine and the loop that a server would run around it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.buckets_used: Counter[Bucket] = Counter()
        self._num_added = 0
        dispatch = engine.runner.dispatch

        def watched(batch):
            self.buckets_used[batch.bucket] += 1
            return dispatch(batch)

        engine.runner.dispatch = watched

    def add(self, prompt: Sequence[int], sampling: SamplingParams) -> Request:
        self._num_added += 1
        return self.engine.add(list(prompt), sampling, f"request-{self._num_added}")

    def step(self) -> None:
        self.engine.step()
        self.engine.scheduler.check_integrity()

    def drain(self) -> None:
        while self.engine.has_work:
            self.step()
        stats = self.engine.scheduler.stats
        assert stats.num_free_pages == stats.num_pages

    def run(self, *jobs: tuple[Sequence[int], SamplingParams]) -> list[list[int]]:
        """Run these together; returns their outputs."""
        requests = [self.add(*job) for job in jobs]
        self.drain()
        return [output_of(request) for request in requests]

    def run_alone(self, *jobs: tuple[Sequence[int], SamplingParams]) -> list[list[int]]:
        return [self.run(job)[0] for job in jobs]

    @property
    def num_preempted(self) -> int:
        return self.engine.scheduler.stats.total_preempted


def output_of(request: Request) -> list[int]:
    return request.tokens[request.num_prompt :]


def greedy(max_tokens: int, *, ignore_eos: bool = True) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=ignore_eos)


def random_prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng((seed, length)).integers(0, 256, length).tolist()


def config_of(model: TinyModel, **changes: Any) -> EngineConfig:
    """Few buckets, and a pool that holds two requests of the full context."""
    settings = {
        "device": "cpu",
        "context_length": CONTEXT,
        "page_size": 8,
        "max_running_requests": 4,
        "chunked_prefill_size": 32,
        "max_total_tokens": 2 * CONTEXT,
    }
    return EngineConfig(model_path=model.path, **(settings | changes))


@pytest.fixture
def make_driver() -> Iterator[Callable[..., Driver]]:
    """Return a function that builds an engine; its arguments are those of `config_of`."""
    engines: list[Engine] = []

    def make(model: TinyModel, **changes: Any) -> Driver:
        engines.append(Engine(config_of(model, **changes)))
        return Driver(engines[-1])

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def driver(model: TinyModel) -> Iterator[Driver]:
    """A warm engine that the tests of a module share."""
    engine = Engine(config_of(model))
    engine.wait_until_warm()
    yield Driver(engine)
    engine.close()
