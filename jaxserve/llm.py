"""`LLM`: a model in this process, for scripts and notebooks.

    with LLM("demo") as llm:
        print(llm.generate("The capital of France is")[0].text)

Every method may be called from several threads, and while an event loop runs (as in a notebook).
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from jaxserve.config import EngineConfig
from jaxserve.engine.async_engine import AsyncEngine, RequestStream
from jaxserve.engine.engine import Engine
from jaxserve.log import ProgressDisplay
from jaxserve.request import FinishReason, InvalidRequest, RequestOutput, SamplingParams
from jaxserve.tokenizer import Tokenizer

T = TypeVar("T")

Prompt = str | list[int]
Conversation = Sequence[Mapping[str, str]]


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
        dtype .. compile_cache_dir: see `EngineConfig`; None leaves the config's value.
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
        tokenizer_path: str | None = None,
        revision: str | None = None,
        download_dir: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        tp_size: int | None = None,
        dp_size: int | None = None,
        page_size: int | None = None,
        mem_fraction_static: float | None = None,
        max_total_tokens: int | None = None,
        context_length: int | None = None,
        max_running_requests: int | None = None,
        chunked_prefill_size: int | None = None,
        random_seed: int | None = None,
        compile_cache_dir: str | None = None,
        chat_template: str | None = None,
        show_progress: bool = True,
    ) -> None:
        given = {
            "tokenizer_path": tokenizer_path,
            "revision": revision,
            "download_dir": download_dir,
            "dtype": dtype,
            "device": device,
            "tp_size": tp_size,
            "dp_size": dp_size,
            "page_size": page_size,
            "mem_fraction_static": mem_fraction_static,
            "max_total_tokens": max_total_tokens,
            "context_length": context_length,
            "max_running_requests": max_running_requests,
            "chunked_prefill_size": chunked_prefill_size,
            "random_seed": random_seed,
            "compile_cache_dir": compile_cache_dir,
        }
        changes = {name: value for name, value in given.items() if value is not None}
        self.config = dataclasses.replace(
            config or EngineConfig(model_path=model), model_path=model, **changes
        )
