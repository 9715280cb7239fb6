"""`LLM` around the real engine, on a tiny random model made here."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from jaxserve import LLM, SamplingParams
from jaxserve.config import EngineConfig
from jaxserve.request import FinishReason, InvalidRequest

VOCAB = 262
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}


def random_weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    d, f, kv = CONFIG["hidden_size"], CONFIG["intermediate_size"], 16
    shapes = {"model.embed_tokens.weight": (VOCAB, d)}
    for layer in range(CONFIG["num_hidden_layers"]):
        for name, shape in {
            "self_attn.q_proj": (d, d),
            "self_attn.k_proj": (kv, d),
            "self_attn.v_proj": (kv, d),
            "self_attn.o_proj": (d, d),
            "mlp.gate_proj": (f, d),
            "mlp.up_proj": (f, d),
            "mlp.down_proj": (d, f),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    tensors = {n: random.normal(0, 0.3, s).astype(np.float32) for n, s in shapes.items()}
    norms = [f"layers.{i}.{n}_layernorm" for i in (0, 1) for n in ("input", "post_attention")]
    for name in (*norms, "norm"):
        tensors[f"model.{name}.weight"] = np.ones(d, np.float32)
    return tensors


@pytest.fixture(scope="module")
def model(
    tmp_path_factory: pytest.TempPathFactory, make_byte_tokenizer: Callable[..., Path]
) -> str:
    folder = make_byte_tokenizer(tmp_path_factory.mktemp("tiny"))
    (folder / "config.json").write_text(json.dumps(CONFIG), "utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.7}), "utf-8")
    safetensors.numpy.save_file(
        random_weights(), folder / "model.safetensors", metadata={"format": "pt"}
    )
    return str(folder)


@pytest.fixture(scope="module")
def llm(model: str) -> Iterator[LLM]:
    with small_llm(model) as llm:
        yield llm


def small_llm(model: str) -> LLM:
    return LLM(
        model,
        device="cpu",
        page_size=8,
        max_running_requests=4,
        chunked_prefill_size=32,
        show_progress=False,
    )


def test_one_prompt_or_many(llm: LLM) -> None:
    (one,) = llm.generate("Hello", GREEDY)
    assert len(one.token_ids) == 12
    assert one.finish_reason is FinishReason.LENGTH
    assert one.prompt_token_ids == list(b"Hello")
    assert one.text == llm.tokenizer.decode(one.token_ids)
    many = llm.generate(["Hello", "Good day"] * 5, GREEDY)
    assert [completion.text for completion in many[::2]] == [one.text] * 5
    assert llm.generate(list(b"Hello"), GREEDY) == [one]
    assert llm.generate([list(b"Hello")], GREEDY) == [one]
    assert llm.generate([], GREEDY) == []


def test_sampling_params_for_each_prompt(llm: LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (1, 5)]
    assert [len(c.token_ids) for c in llm.generate(["a", "b"], params)] == [1, 5]
    with pytest.raises(InvalidRequest, match="1 sampling_params"):
        llm.generate(["a", "b"], params[:1])


def test_a_mapping_gives_sampling_params_too(llm: LLM) -> None:
    params = SamplingParams(max_tokens=3, temperature=0)
    same = {"max_tokens": 3, "temperature": 0}
    assert llm.generate("Hello", same) == llm.generate("Hello", params)
    assert llm.generate(["a", "b"], [same, params])[1] == llm.generate("b", params)[0]
    assert "".join(llm.stream("Hello", same)) == llm.generate("Hello", params)[0].text
    with pytest.raises(TypeError, match="max_new_tokens"):
        llm.generate("Hello", {"max_new_tokens": 3})
    with pytest.raises(InvalidRequest, match="found 3"):
        llm.generate(["Hello"], [3])  # type: ignore[list-item]


def test_no_sampling_params_takes_the_checkpoints(llm: LLM) -> None:
    assert llm.default_sampling == SamplingParams(temperature=0.7)
    assert len(llm.generate("a")) == 1


def test_a_seed_gives_the_same_tokens_in_any_company(llm: LLM) -> None:
    seeded = SamplingParams(seed=5, max_tokens=10, ignore_eos=True)
    (alone,) = llm.generate("Hello", seeded)
    company = llm.generate(["x" * 40, "Hello", "y"], seeded)
    assert company[1].token_ids == alone.token_ids
    (other,) = llm.generate("Hello", SamplingParams(seed=6, max_tokens=10, ignore_eos=True))
    assert other.token_ids != alone.token_ids


def test_streamed_text_is_the_whole_text(llm: LLM) -> None:
    (whole,) = llm.generate("Hello", GREEDY)
    pieces = list(llm.stream("Hello", GREEDY))
    assert "".join(pieces) == whole.text


def test_a_stop_string_is_seen_streamed_and_whole(llm: LLM) -> None:
    (whole,) = llm.generate("Hello", GREEDY)
    stop = whole.text[3:5]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop=(stop,))
    (stopped,) = llm.generate("Hello", params)
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert (stopped.finish_reason, stopped.stop_reason) == (FinishReason.STOP, stop)
    assert "".join(llm.stream("Hello", params)) == stopped.text


def test_leaving_a_stream_early_frees_its_row(llm: LLM) -> None:
    endless = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    for _ in range(6):  # more than there are rows
        assert len(list(itertools.islice(llm.stream("Hello", endless), 2))) == 2
    assert len(llm.generate("Hello", GREEDY)) == 1


def test_chat_uses_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    (answer,) = llm.chat(messages, GREEDY)
    prompt = "<bos><|user|>Hi<eos><|assistant|>"
    assert llm.tokenizer.decode(answer.prompt_token_ids, skip_special_tokens=False) == prompt
    assert llm.chat([messages, messages], GREEDY) == [answer, answer]
    assert "".join(llm.stream(messages, GREEDY)) == answer.text


def test_async_streams_in_the_callers_loop(llm: LLM) -> None:
    async def collect() -> list[str]:
        async def one() -> str:
            return "".join([output.text async for output in llm.agenerate("Hello", GREEDY)])

        # The blocking calls work beside a running loop, too.
        return [*await asyncio.gather(one(), one()), llm.generate("Hello", GREEDY)[0].text]

    texts = asyncio.run(collect())
    assert len(set(texts)) == 1


def test_wrong_prompts_are_refused_and_the_rest_goes_on(llm: LLM) -> None:
    for prompt in ([VOCAB], "x" * 128, ""):
        with pytest.raises(InvalidRequest):
            llm.generate(["fine", prompt], GREEDY)
    with pytest.raises(InvalidRequest, match="max_tokens"):
        llm.generate("a", SamplingParams(max_tokens=0))
    assert len(llm.generate("Hello", GREEDY)) == 1


def test_a_model_that_is_not_there_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing-here"):
        LLM(str(tmp_path / "nothing-here"), show_progress=False)


def test_keywords_override_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[EngineConfig] = []

    def engine(config: EngineConfig, progress: Any) -> Any:
        configs.append(config)
        raise InvalidRequest("far enough")

    monkeypatch.setattr("jaxserve.llm.Engine", engine)
    base = EngineConfig(model_path="other", page_size=8, context_length=64)
    with pytest.raises(InvalidRequest, match="far enough"):
        LLM("tiny", base, context_length=32, dtype="float32", show_progress=False)
    assert configs == [
        EngineConfig(model_path="tiny", page_size=8, context_length=32, dtype="float32")
    ]


def test_every_keyword_is_a_field_of_the_config() -> None:
    keywords = set(LLM.__init__.__annotations__) - {"return", "model", "config"}
    ours = {"chat_template", "show_progress"}
    assert keywords - ours <= set(EngineConfig.__dataclass_fields__)


def test_closing_twice_is_safe(model: str) -> None:
    llm = small_llm(model)
    llm.close()
    llm.close()
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate("Hello", GREEDY)
