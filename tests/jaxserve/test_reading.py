"""Models that read texts, end to end: vectors and scores against transformers' hidden states.

The checkpoints are tiny and random, of transformers' own classes, with the byte tokenizer.
"""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
import uvicorn

from converters.errors import CheckpointError
from jaxserve import LLM
from jaxserve.config import ConfigError, EngineConfig, ServerConfig
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.engine import Engine
from jaxserve.request import InvalidRequest
from jaxserve.server.app import create_app
from jaxserve.server.lifecycle import listen

from ..model_defs import hf_reference

FIELDS = {
    "vocab_size": 262,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
    "pad_token_id": 256,
    "bos_token_id": 257,
    "eos_token_id": 258,
}
MIN_COSINE = 0.99999
TIMEOUT_S = 60.0
CONVERSATION = [
    {"role": "user", "content": "Is the sea salty?"},
    {"role": "assistant", "content": "It is."},
]
SMALL = {"device": "cpu", "page_size": 8, "chunked_prefill_size": 64}


def write_modules(folder: Path, pooling: dict[str, Any], *, normalize: bool) -> None:
    """Write the files in which sentence-transformers keeps what follows the transformer."""
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds[: 3 if normalize else 2])
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 64, **pooling})
    )


def texts_of(count: int) -> list[str]:
    """Texts of mixed length, from one byte to longer than a step."""
    rng = np.random.default_rng(0)
    lengths = [1, 2, 159, 160, *rng.integers(3, 100, count - 4)]
    return ["".join(map(chr, rng.integers(97, 123, length))) for length in lengths]


def states(model: Any, token_ids: list[int]) -> np.ndarray:
    """Hidden states f32[T, D] of one text after the final norm, in transformers."""
    with torch.no_grad():
        return model.base_model(torch.tensor([token_ids])).last_hidden_state[0].numpy()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.fixture(scope="module")
def make_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, make_byte_tokenizer: Callable[..., Path]
) -> Callable[..., tuple[Path, Any]]:
    """Return a function that writes a random checkpoint of an architecture, and its reference."""

    def make(architecture: str, **fields: Any) -> tuple[Path, Any]:
        folder = make_byte_tokenizer(tmp_path_factory.mktemp("reads"))
        model = hf_reference.make_tiny(architecture, FIELDS | fields, seed=3)
        hf_reference.save(model, folder)
        return folder, model

    return make


@pytest.fixture(scope="module")
def bare(make_checkpoint: Callable[..., tuple[Path, Any]]) -> tuple[Path, Any]:
    return make_checkpoint("LlamaModel")


@pytest.fixture(scope="module")
def classifier(make_checkpoint: Callable[..., tuple[Path, Any]]) -> tuple[Path, Any]:
    return make_checkpoint("LlamaForSequenceClassification", num_labels=3)


@pytest.fixture(scope="module")
def reward(make_checkpoint: Callable[..., tuple[Path, Any]]) -> tuple[Path, Any]:
    return make_checkpoint("Qwen2ForSequenceClassification", num_labels=1)


@pytest.fixture
def make_llm() -> Iterator[Callable[..., LLM]]:
    made: list[LLM] = []

    def make(folder: Path, **settings: Any) -> LLM:
        made.append(LLM(str(folder), show_progress=False, **(SMALL | settings)))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


# ---- vectors -------------------------------------------------------------------------------------

POOLINGS = [
    pytest.param(None, True, lambda h: h[-1], id="not-said"),
    pytest.param({"pooling_mode_lasttoken": True}, False, lambda h: h[-1], id="last"),
    pytest.param({"pooling_mode_mean_tokens": True}, True, lambda h: h.mean(0), id="mean"),
    pytest.param({"pooling_mode": "mean"}, False, lambda h: h.mean(0), id="mean-not-normalised"),
    pytest.param({"pooling_mode_cls_token": True}, True, lambda h: h[0], id="cls"),
]


@pytest.mark.parametrize(("pooling", "normalize", "pool"), POOLINGS)
def test_64_texts_equal_the_reference_and_one_at_a_time(
    bare: tuple[Path, Any],
    make_llm: Callable[..., LLM],
    pooling: dict[str, Any] | None,
    normalize: bool,
    pool: Callable[[np.ndarray], np.ndarray],
) -> None:
    folder, model = bare
    (folder / "modules.json").unlink(missing_ok=True)
    if pooling is not None:
        write_modules(folder, pooling, normalize=normalize)
    llm = make_llm(folder)
    texts = texts_of(64)
    together = llm.embed(texts)
    assert together.shape == (64, 64)
    assert together.dtype == np.float32
    for text, vector in zip(texts, together, strict=True):
        expected = pool(states(model, list(text.encode())))
        assert cosine(vector, expected) >= MIN_COSINE
        length = 1.0 if normalize else np.linalg.norm(expected)
        assert np.linalg.norm(vector) == pytest.approx(length, rel=1e-5)
    alone = np.concatenate([llm.embed(text) for text in texts])
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5 * np.abs(alone).max())


def test_a_generating_checkpoint_gives_vectors_when_asked(
    make_checkpoint: Callable[..., tuple[Path, Any]], make_llm: Callable[..., LLM]
) -> None:
    folder, model = make_checkpoint("Qwen2ForCausalLM", tie_word_embeddings=True)
    llm = make_llm(folder, is_embedding=True)
    expected = states(model, list(b"a text"))[-1]
    assert cosine(llm.embed("a text")[0], expected) >= MIN_COSINE
    with pytest.raises(InvalidRequest, match="without --is-embedding"):
        llm.generate("a text")


def test_two_ranks_and_two_shards_give_the_same_vectors(
    bare: tuple[Path, Any], make_llm: Callable[..., LLM]
) -> None:
    folder, _ = bare
    write_modules(folder, {"pooling_mode_mean_tokens": True}, normalize=True)
    texts = texts_of(12)
    one = make_llm(folder).embed(texts)
    np.testing.assert_allclose(make_llm(folder, dp_size=2, tp_size=2).embed(texts), one, atol=1e-5)


def test_a_causal_flag_that_is_off_is_refused_with_the_remedy(
    make_checkpoint: Callable[..., tuple[Path, Any]], make_llm: Callable[..., LLM]
) -> None:
    folder, _ = make_checkpoint("Qwen2ForCausalLM")
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "is_causal": False}))
    with pytest.raises(ConfigError, match="--is-embedding"):
        make_llm(folder)
    make_llm(folder, is_embedding=True)


@pytest.mark.parametrize(
    ("pooling", "told"),
    [
        ({"pooling_mode_max_tokens": True}, "'max'"),
        ({"pooling_mode": ["mean", "cls"]}, "'mean' and 'cls'"),
    ],
)
def test_unknown_pooling_is_refused_by_name(
    bare: tuple[Path, Any], make_llm: Callable[..., LLM], pooling: dict[str, Any], told: str
) -> None:
    folder, _ = bare
    write_modules(folder, pooling, normalize=True)
    with pytest.raises(CheckpointError, match=told):
        make_llm(folder)


# ---- scores --------------------------------------------------------------------------------------


def test_scores_equal_the_reference(
    classifier: tuple[Path, Any], make_llm: Callable[..., LLM]
) -> None:
    folder, model = classifier
    llm = make_llm(folder)
    texts = texts_of(20)
    scores = llm.classify(texts)
    assert scores.shape == (20, 3)
    for text, ours in zip(texts, scores, strict=True):
        expected = model.score(torch.tensor(states(model, list(text.encode()))[-1]))
        np.testing.assert_allclose(ours, expected.detach().numpy(), atol=1e-4)
    np.testing.assert_allclose(llm.score("ab", ["cd"]), llm.classify("abcd"), atol=1e-6)
    with pytest.raises(InvalidRequest, match="/classify"):
        llm.embed("x")


def test_a_conversation_is_scored_as_a_whole(
    reward: tuple[Path, Any], make_llm: Callable[..., LLM]
) -> None:
    llm = make_llm(reward[0])
    text = llm.tokenizer.render_chat(CONVERSATION, asks_for_answer=False)
    assert not text.endswith("<|assistant|>")
    (expected,) = llm.classify(text)
    np.testing.assert_allclose(llm.classify(CONVERSATION), [expected], atol=1e-6)
    np.testing.assert_allclose(llm.classify([CONVERSATION] * 2), [expected] * 2, atol=1e-6)


def test_texts_share_steps_and_leave_nothing_behind(bare: tuple[Path, Any]) -> None:
    folder, _ = bare
    (folder / "modules.json").unlink(missing_ok=True)
    engine = Engine(EngineConfig(model_path=str(folder), **SMALL))
    engine.wait_until_warm()
    requests = [engine.add([i] * 4, None, f"r{i}") for i in range(32)]
    while engine.has_work:
        engine.step()
        engine.scheduler.check_integrity()
    assert engine.steps == 2  # 128 tokens in steps of 64
    assert all(request.is_finished and request.num_output == 0 for request in requests)
    stats = engine.scheduler.stats
    assert stats.num_free_pages == stats.num_pages
    engine.close()


# ---- HTTP ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[..., str]]:
    """Return a function that serves a checkpoint on a loopback port and returns its URL."""
    running: list[tuple[AsyncEngine, uvicorn.Server, threading.Thread]] = []

    def run(folder: Path, **settings: Any) -> str:
        config = EngineConfig(model_path=str(folder), **(SMALL | settings))
        engine = AsyncEngine(lambda progress: Engine(config, progress=progress))
        engine.wait_until_ready()
        app = create_app(engine, ServerConfig(served_model_name="tiny"))
        (sock,) = listen("127.0.0.1", 0)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])))
        thread.start()
        running.append((engine, server, thread))
        return f"http://127.0.0.1:{sock.getsockname()[1]}"

    yield run
    for engine, server, thread in running:
        server.should_exit = True
        thread.join(TIMEOUT_S)
        engine.close()


@pytest.fixture(scope="module")
def embedding_url(start: Callable[..., str], make_checkpoint: Callable[..., Any]) -> str:
    return start(make_checkpoint("MistralModel", sliding_window=16)[0])


@pytest.fixture(scope="module")
def reward_url(start: Callable[..., str], reward: tuple[Path, Any]) -> str:
    return start(reward[0])


@pytest.fixture(scope="module")
def classifier_url(start: Callable[..., str], classifier: tuple[Path, Any]) -> str:
    return start(classifier[0], is_embedding=True)  # SGLang's flag for such servers


@pytest.fixture(scope="module")
def generating_url(start: Callable[..., str], make_checkpoint: Callable[..., Any]) -> str:
    return start(make_checkpoint("LlamaForCausalLM")[0])


def post(url: str, path: str, body: dict[str, Any], status: int = 200) -> Any:
    answer = httpx.post(url + path, json=body, timeout=TIMEOUT_S)
    assert answer.status_code == status, answer.text
    return answer.json()


def test_the_openai_client_reads_vectors(embedding_url: str) -> None:
    client = openai.OpenAI(base_url=f"{embedding_url}/v1", api_key="none")
    texts = texts_of(64)
    as_base64 = client.embeddings.create(model="tiny", input=texts)  # the client's own default
    as_floats = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    assert [one.index for one in as_base64.data] == list(range(64))
    for a, b in zip(as_base64.data, as_floats.data, strict=True):
        np.testing.assert_allclose(a.embedding, b.embedding, atol=1e-6)
    num_bytes = sum(map(len, texts))
    assert as_floats.usage.prompt_tokens == as_floats.usage.total_tokens == num_bytes


@pytest.mark.parametrize("mode", ["mean", "lasttoken", "cls"])
def test_the_openai_client_gets_what_sentence_transformers_computes(
    start: Callable[..., str], make_checkpoint: Callable[..., tuple[Path, Any]], mode: str
) -> None:
    from sentence_transformers import SentenceTransformer  # takes seconds

    folder, _ = make_checkpoint("Qwen2Model")
    write_modules(folder, {"pooling_mode": mode}, normalize=True)
    texts = texts_of(16)
    theirs = SentenceTransformer(str(folder), device="cpu").encode(texts, batch_size=4)
    client = openai.OpenAI(base_url=f"{start(folder)}/v1", api_key="none")
    ours = client.embeddings.create(model="tiny", input=texts).data
    assert len(ours) == len(theirs) == 16
    for one, expected in zip(ours, theirs, strict=True):
        vector = np.array(one.embedding)
        assert cosine(vector, expected) >= MIN_COSINE
        np.testing.assert_allclose(vector, expected, atol=2e-5)


def test_every_kind_of_input_gives_the_same_vector(embedding_url: str) -> None:
    ids = list(b"same")
    vectors = [
        one["embedding"]
        for given in ("same", ["same"], ids, [ids, ids])
        for one in post(embedding_url, "/v1/embeddings", {"model": "tiny", "input": given})["data"]
    ]
    raw = {"model": "tiny", "input": "same", "encoding_format": "base64"}
    (one,) = post(embedding_url, "/v1/embeddings", raw)["data"]
    vectors.append(np.frombuffer(base64.b64decode(one["embedding"]), "<f4").tolist())
    vectors.append(post(embedding_url, "/encode", {"text": "same"})["embedding"])
    assert len(vectors) == 7
    np.testing.assert_allclose(vectors, [vectors[0]] * 7, atol=1e-6)


def test_dimensions_cut_and_normalise_again(embedding_url: str) -> None:
    body = {"model": "tiny", "input": "same"}
    (whole,) = post(embedding_url, "/v1/embeddings", body)["data"]
    (cut,) = post(embedding_url, "/v1/embeddings", {**body, "dimensions": 10})["data"]
    expected = np.array(whole["embedding"][:10])
    np.testing.assert_allclose(cut["embedding"], expected / np.linalg.norm(expected), atol=1e-6)
    error = post(embedding_url, "/v1/embeddings", {**body, "dimensions": 65}, 400)["error"]
    assert error["param"] == "dimensions"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ""}, "input"),
        ({"input": "x" * 161}, "input"),
        ({"input": [400]}, "input"),
        ({"input": "x", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "x", "dimensions": 0}, "dimensions"),
        ({"input": "x", "truncate": True}, "truncate"),
    ],
)
def test_bad_embedding_requests_name_the_field(
    embedding_url: str, body: dict[str, Any], param: str
) -> None:
    error = post(embedding_url, "/v1/embeddings", {"model": "tiny", **body}, 400)["error"]
    assert error["param"] == param


def test_classify_answers_in_sglang_s_shape(classifier_url: str) -> None:
    one = post(classifier_url, "/classify", {"model": "tiny", "text": "good"})
    assert len(one["embedding"]) == 3
    assert one["meta_info"]["prompt_tokens"] == 4
    many = post(classifier_url, "/classify", {"text": ["good", "bad"]})
    np.testing.assert_allclose(many[0]["embedding"], one["embedding"], atol=1e-6)
    ids = post(classifier_url, "/classify", {"input_ids": list(b"good")})
    np.testing.assert_allclose(ids["embedding"], one["embedding"], atol=1e-6)
    assert post(classifier_url, "/classify", {"input_ids": [[]]}, 400)["error"]["param"]
    post(classifier_url, "/classify", {"text": "a", "input_ids": [1]}, 400)


def test_conversations_are_scored_like_their_text(reward_url: str, reward: Any) -> None:
    one = post(reward_url, "/classify", {"messages": CONVERSATION})
    text = "<bos><|user|>Is the sea salty?<eos><|assistant|>It is.<eos>"
    same = post(reward_url, "/classify", {"text": text})
    np.testing.assert_allclose(one["embedding"], same["embedding"], atol=1e-6)
    many = post(reward_url, "/classify", {"conv": [CONVERSATION, CONVERSATION[:1]]})
    assert [len(answer["embedding"]) for answer in many] == [1, 1]


def test_scores_of_items_are_those_of_the_joined_text(classifier_url: str) -> None:
    body = {"model": "tiny", "query": "ab", "items": ["c", "de"]}
    answer = post(classifier_url, "/v1/score", body)
    plain = post(classifier_url, "/classify", {"text": ["abc", "abde"]})
    np.testing.assert_allclose(answer["scores"], [one["embedding"] for one in plain], atol=1e-6)
    assert answer["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    first = post(classifier_url, "/v1/score", {**body, "item_first": True, "apply_softmax": True})
    assert np.sum(first["scores"], axis=1) == pytest.approx([1, 1])
    assert post(classifier_url, "/v1/score", {**body, "label_token_ids": [1]}, 400)["error"]


def test_documents_are_ranked_best_first(reward_url: str, classifier_url: str) -> None:
    documents = ["one", "two", "three"]
    ranks = post(reward_url, "/v1/rerank", {"query": "q", "documents": documents})
    scores = [rank["score"] for rank in ranks]
    assert scores == sorted(scores, reverse=True)
    assert [documents[rank["index"]] for rank in ranks] == [rank["document"] for rank in ranks]
    body = {"query": "q", "documents": documents, "top_n": 1, "return_documents": False}
    (best,) = post(reward_url, "/v1/rerank", body)
    assert best["index"] == ranks[0]["index"]
    assert best["document"] is None
    error = post(classifier_url, "/v1/rerank", {"query": "q", "documents": documents}, 400)
    assert "/v1/score" in error["error"]["message"]


def test_a_route_for_another_task_names_the_remedy(
    embedding_url: str, reward_url: str, generating_url: str
) -> None:
    vector = {"model": "tiny", "input": "x"}
    chat = {"model": "tiny", "messages": CONVERSATION[:1]}
    prompt = {"model": "tiny", "prompt": "x"}
    for url, path, body, remedy in (
        (generating_url, "/v1/embeddings", vector, "--is-embedding"),
        (generating_url, "/classify", {"text": "x"}, "score head"),
        (generating_url, "/v1/score", {"model": "tiny", "query": "q", "items": "i"}, "score head"),
        (embedding_url, "/v1/chat/completions", chat, "/v1/embeddings"),
        (embedding_url, "/v1/completions", prompt, "/v1/embeddings"),
        (embedding_url, "/generate", {"text": "x"}, "/v1/embeddings"),
        (embedding_url, "/v1/rerank", {"query": "q", "documents": ["d"]}, "/v1/embeddings"),
        (reward_url, "/v1/embeddings", vector, "/classify"),
        (reward_url, "/v1/chat/completions", {**chat, "stream": True}, "/classify"),
    ):
        assert remedy in post(url, path, body, 400)["error"]["message"]
    for url, is_generation in ((embedding_url, False), (reward_url, False), (generating_url, True)):
        assert httpx.get(f"{url}/get_model_info").json()["is_generation"] is is_generation
        assert httpx.get(f"{url}/health_generate", timeout=TIMEOUT_S).status_code == 200
