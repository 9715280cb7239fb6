"""`LLM`: a model in this process, for scripts and notebooks.

    with LLM("demo") as llm:
        print(llm.generate("The capital of France is")[0].text)

Every method may be called from several threads, and while an event loop runs (as in a notebook).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import numbers
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from jaxserve.config import EngineConfig
from jaxserve.engine.async_engine import AsyncEngine, EngineUnavailable, StartupProgress, Task
from jaxserve.engine.engine import Engine, ModelInfo
from jaxserve.log import ProgressDisplay
from jaxserve.request import (
    FinishReason,
    InvalidRequest,
    RequestOutput,
    SamplingParams,
    with_end,
)
from jaxserve.tokenizer import Tokenizer, load_chat_template

T = TypeVar("T")

Conversation = Sequence[Mapping[str, str]]
Sampling = SamplingParams | Mapping[str, Any]
Texts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Completion:
    """What the model wrote after one prompt.

    `text` excludes stop strings and stop tokens, `token_ids` keeps a stop token. `stop_reason` is
    the stop string or the stop token's id when `finish_reason` is "stop".
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: str | int | None
    prompt_token_ids: list[int]


class LLM:
    """Load a model and generate with it.

    Args:
        model: hub id, HF folder, .gguf file, Orbax folder, or "demo".
        config: all settings at once; the keywords below override it.
        load_format .. compile_cache_dir: see `EngineConfig`; None leaves the config's value.
        chat_template: jinja text, or the path of a file, that replaces the checkpoint's.
        show_progress: show loading and compiling on standard error.

    Raises:
        ValueError: a subclass that says what is wrong with the model or a setting.
    """

    def __init__(
        self,
        model: str,
        config: EngineConfig | None = None,
        *,
        load_format: str | None = None,
        tokenizer_path: str | None = None,
        revision: str | None = None,
        download_dir: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        tp_size: int | None = None,
        dp_size: int | None = None,
        ep_size: int | None = None,
        page_size: int | None = None,
        mem_fraction_static: float | None = None,
        max_total_tokens: int | None = None,
        context_length: int | None = None,
        max_running_requests: int | None = None,
        chunked_prefill_size: int | None = None,
        random_seed: int | None = None,
        is_embedding: bool | None = None,
        compile_cache_dir: str | None = None,
        chat_template: str | None = None,
        show_progress: bool = True,
    ) -> None:
        given = {
            "load_format": load_format,
            "tokenizer_path": tokenizer_path,
            "revision": revision,
            "download_dir": download_dir,
            "dtype": dtype,
            "device": device,
            "tp_size": tp_size,
            "dp_size": dp_size,
            "ep_size": ep_size,
            "page_size": page_size,
            "mem_fraction_static": mem_fraction_static,
            "max_total_tokens": max_total_tokens,
            "context_length": context_length,
            "max_running_requests": max_running_requests,
            "chunked_prefill_size": chunked_prefill_size,
            "random_seed": random_seed,
            "is_embedding": is_embedding,
            "compile_cache_dir": compile_cache_dir,
        }
        changes = {name: value for name, value in given.items() if value is not None}
        self.config = dataclasses.replace(
            config or EngineConfig(model_path=model), model_path=model, **changes
        )
        self._chat_template = None if chat_template is None else load_chat_template(chat_template)
        self._ids = itertools.count()
        with contextlib.ExitStack() as stack:
            display = stack.enter_context(ProgressDisplay()) if show_progress else None
            self._engine = AsyncEngine(self._build, progress=StartupProgress(display))
            try:
                self._engine.wait_until_ready()
            except BaseException:
                self._engine.close()
                raise
        # A loop of its own: the caller's thread may run one already, as in a notebook.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="jaxserve-llm", daemon=True
        )
        self._thread.start()

    def _build(self, progress: StartupProgress) -> Engine:
        return Engine(self.config, progress=progress)

    @property
    def tokenizer(self) -> Tokenizer:
        return self._engine.tokenizer

    @property
    def model_info(self) -> ModelInfo:
        """Name, architecture, dtype, context length and KV pages of the loaded model."""
        return self._engine.model_info

    @property
    def default_sampling(self) -> SamplingParams:
        """What is used when no sampling parameters are given: the checkpoint's own settings."""
        return SamplingParams(**self.tokenizer.default_sampling)

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
        sampling_params: Sampling | Sequence[Sampling] | None = None,
    ) -> list[Completion]:
        """Continue one or many prompts, all at once, and return one completion per prompt.

        Args:
            prompts: text or token ids, one or a list.
            sampling_params: for all prompts, or one for each; a mapping of its fields will do.

        Raises:
            InvalidRequest: a prompt or parameter cannot be used; nothing was generated.
        """
        token_ids = [self._encode(prompt) for prompt in _as_list(prompts)]
        return self._generate(token_ids, sampling_params)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: Sampling | Sequence[Sampling] | None = None,
    ) -> list[Completion]:
        """Answer one conversation or many, as `generate` does.

        A conversation is a list of {"role", "content"}.
        """
        is_one = bool(messages) and isinstance(messages[0], Mapping)
        conversations = [messages] if is_one else messages
        token_ids = [
            self.tokenizer.encode_chat(conversation, chat_template=self._chat_template)
            for conversation in conversations
        ]
        return self._generate(token_ids, sampling_params)

    def stream(
        self,
        prompt: str | Sequence[int] | Conversation,
        sampling_params: Sampling | None = None,
    ) -> Iterator[str]:
        """Yield the text that follows a prompt or answers a conversation, piece by piece.

        Leaving the loop early stops the request.
        """
        request = self._engine.submit(
            self._encode(prompt), self._sampling(sampling_params), self._next_id()
        )
        stream = self._wait(request)
        try:
            is_finished = False
            while not is_finished:
                output = self._wait(anext(stream))
                is_finished = output.finished
                if output.text:
                    yield output.text
        finally:
            stream.close()

    async def agenerate(
        self,
        prompt: str | Sequence[int] | Conversation,
        sampling_params: Sampling | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Yield the outputs of one request in the caller's event loop; `text` is what is new."""
        outputs = self._engine.generate(
            self._encode(prompt), self._sampling(sampling_params), self._next_id()
        )
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                yield output

    def embed(self, texts: Texts) -> np.ndarray:
        """Return the embeddings of one or many texts, all at once: f32[texts, D].

        The checkpoint says which tokens' states they are made of, and whether they have length 1.
        A model that writes text gives embeddings when built with `is_embedding=True`.

        Args:
            texts: text or token ids, one or a list.

        Raises:
            InvalidRequest: the model is for something else, or a text cannot be read.
        """
        return self._read("embed", [self._encode(text) for text in _as_list(texts)])

    def classify(self, texts: Texts | Conversation | Sequence[Conversation]) -> np.ndarray:
        """Return the scores of one or many texts or conversations: f32[texts, labels], no softmax.

        A reward model has one label. A conversation is scored as a whole; to a text or conversation
        the token is added that the model wants at the end, if any.

        Raises:
            InvalidRequest: the model is for something else, or a text cannot be read.
        """
        is_one_conversation = not isinstance(texts, str) and isinstance(next(iter(texts)), Mapping)
        listed = [texts] if is_one_conversation else _as_list(texts)
        return self._read("score", [self._encode_whole(text) for text in listed])

    def score(
        self, query: str, texts: str | Sequence[str], *, item_first: bool = False
    ) -> np.ndarray:
        """Return the scores of `query` joined to each text: f32[texts, labels], no softmax.

        Args:
            item_first: put the text before the query.
        """
        items = [texts] if isinstance(texts, str) else texts
        return self.classify([item + query if item_first else query + item for item in items])

    def close(self) -> None:
        """Stop the engine and free the device; safe to call again."""
        if self._loop.is_closed():
            return
        self._engine.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _encode(self, prompt: str | Sequence[int] | Conversation) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if prompt and isinstance(prompt[0], Mapping):
            return self.tokenizer.encode_chat(prompt, chat_template=self._chat_template)
        return [int(token_id) for token_id in prompt]

    def _encode_whole(self, text: Any) -> list[int]:
        """Token ids of a text that is scored at its end; token ids are taken as they are."""
        if isinstance(text, str):
            token_ids = self.tokenizer.encode(text)
        elif text and isinstance(text[0], Mapping):
            token_ids = self.tokenizer.encode_chat(
                text, chat_template=self._chat_template, asks_for_answer=False
            )
        else:
            return self._encode(text)
        return with_end(token_ids, self.model_info.end_token)

    def _read(self, task: Task, texts: Sequence[list[int]]) -> np.ndarray:
        self._engine.check_task(task)
        for text in texts:
            self._engine.check_prompt(text)
        return self._wait(self._read_all(task, texts))

    async def _read_all(self, task: Task, texts: Sequence[list[int]]) -> np.ndarray:
        jobs = [self._engine.read(task, text, self._next_id()) for text in texts]
        return np.stack(await _together(jobs))

    def _next_id(self) -> str:
        return f"llm-{next(self._ids)}"

    def _sampling(self, given: Sampling | None) -> SamplingParams:
        if given is None:
            return self.default_sampling
        if isinstance(given, Mapping):
            return SamplingParams(**given)
        if not isinstance(given, SamplingParams):
            raise InvalidRequest(
                f"sampling_params: found {given!r}; give SamplingParams or a mapping of its fields."
            )
        return given

    def _generate(
        self,
        prompts: Sequence[list[int]],
        sampling_params: Sampling | Sequence[Sampling] | None,
    ) -> list[Completion]:
        if sampling_params is None or isinstance(sampling_params, (SamplingParams, Mapping)):
            each = [self._sampling(sampling_params)] * len(prompts)
        else:
            each = [self._sampling(params) for params in sampling_params]
        if len(each) != len(prompts):
            raise InvalidRequest(
                f"there are {len(prompts)} prompts, but {len(each)} sampling_params; "
                "give one for all prompts or one for each."
            )
        for prompt in prompts:
            self._engine.check_prompt(prompt)
        return self._wait(self._complete_all(prompts, each))

    async def _complete_all(
        self, prompts: Sequence[list[int]], params: Sequence[SamplingParams]
    ) -> list[Completion]:
        jobs = [self._complete(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
        return await _together(jobs)

    async def _complete(self, prompt: list[int], params: SamplingParams) -> Completion:
        stream = await self._engine.submit(prompt, params, self._next_id(), wants_updates=False)
        try:
            output = await stream.read_all()
        finally:
            stream.close()
        assert output.finish_reason is not None, "the last output says why it is the last"
        return Completion(
            text=output.text,
            token_ids=list(output.token_ids),
            finish_reason=output.finish_reason,
            stop_reason=stream.stop_reason,
            prompt_token_ids=prompt,
        )

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in our own loop; an interrupt of the caller cancels it."""
        if self._loop.is_closed():
            work.close()
            raise EngineUnavailable("this LLM was closed; make a new one.")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


async def _together(jobs: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Run all jobs; when one fails the others are cancelled."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _as_list(
    prompts: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
) -> list[str | Sequence[int]]:
    if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], numbers.Integral)):
        return [prompts]
    return list(prompts)
