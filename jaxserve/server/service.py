"""What the routes share: the engine, the model's name, prompts to tokens, groups of requests."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from starlette.requests import Request

from jaxserve.config import ServerConfig
from jaxserve.engine.async_engine import AsyncEngine, RequestStream, Task
from jaxserve.request import InvalidRequest, SamplingParams, with_end
from jaxserve.server.errors import APIError, bad_request, to_api_error
from jaxserve.server.protocol import Body, TokenIds

BodyT = TypeVar("BodyT", bound=Body)

# Longer texts are tokenized in a thread: this takes milliseconds, and others are waiting.
LONG_TEXT_CHARS = 8192
MAX_SEED = 2**64 - 1


@dataclass(frozen=True)
class Job:
    """One prompt to continue, `num_choices` times; `rid` names all of them."""

    rid: str
    prompt_token_ids: TokenIds
    sampling: SamplingParams
    num_choices: int = 1

    def parts(self) -> list[tuple[str, SamplingParams]]:
        """Return (request id, sampling) of each choice; choice i is sampled with seed + i."""
        if self.num_choices == 1:
            return [(self.rid, self.sampling)]
        parts = []
        for i in range(self.num_choices):
            seed = self.sampling.seed
            if seed is not None:
                seed += i if seed + i <= MAX_SEED else i - MAX_SEED
            parts.append((f"{self.rid}-{i}", dataclasses.replace(self.sampling, seed=seed)))
        return parts


class Service:
    """The engine as the routes see it."""

    def __init__(self, engine: AsyncEngine, config: ServerConfig, chat_template: str | None):
        self.engine = engine
        self.config = config
        self.chat_template = chat_template
        self._groups: dict[str, list[str]] = {}  # rid -> request ids in the engine

    @property
    def model_name(self) -> str:
        return self.config.served_model_name or self.engine.model_info.name

    @property
    def default_sampling(self) -> Mapping[str, float | int]:
        return self.engine.tokenizer.default_sampling

    def check_model(self, name: str | None) -> None:
        """Raise APIError 404 unless `name` is the model that is served; None is that model."""
        if name not in (None, self.model_name):
            raise APIError(
                404,
                f"the model {name!r} is not served here; the served one is {self.model_name!r}.",
                param="model",
                code="model_not_found",
            )

    async def encode(self, prompt: str | TokenIds, *, param: str) -> TokenIds:
        """Return a prompt's token ids; raises APIError naming `param` if it does not fit."""
        if isinstance(prompt, str):
            encode = self.engine.tokenizer.encode
            is_long = len(prompt) > LONG_TEXT_CHARS
            prompt = await asyncio.to_thread(encode, prompt) if is_long else encode(prompt)
            prompt = self._ended(prompt)
        self.check_prompt(prompt, param=param)
        return prompt

    async def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> TokenIds:
        """Return the token ids of a conversation; raises APIError if it does not fit."""
        token_ids = await asyncio.to_thread(
            self.engine.tokenizer.encode_chat, messages, chat_template=self.chat_template
        )
        self.check_prompt(token_ids, param="messages")
        return token_ids

    async def encode_conversation(
        self, messages: Sequence[Mapping[str, str]], *, param: str
    ) -> TokenIds:
        """Return the token ids of a conversation that is read as a whole."""
        token_ids = await asyncio.to_thread(
            self.engine.tokenizer.encode_chat,
            messages,
            chat_template=self.chat_template,
            asks_for_answer=False,
        )
        token_ids = self._ended(token_ids)
        self.check_prompt(token_ids, param=param)
        return token_ids

    def encode_pair(self, first: str, second: str) -> TokenIds:
        """Return the token ids of two texts in one, unchecked."""
        return self._ended(self.engine.tokenizer.encode_pair(first, second))

    def _ended(self, token_ids: TokenIds) -> TokenIds:
        """Append the token that this model scores a text at, where it has one."""
        return with_end(token_ids, self.engine.model_info.end_token)

    def check_prompt(self, prompt_token_ids: TokenIds, *, param: str) -> None:
        """Raise APIError naming `param` for a prompt that the engine would refuse."""
        try:
            self.engine.check_prompt(prompt_token_ids)
        except InvalidRequest as error:
            api_error = to_api_error(error)
            api_error.param = param
            raise api_error from error

    def token_limit(
        self, num_prompt: int, asked: int | None, default: int | None, *, param: str
    ) -> int | None:
        """Return max_tokens: what was asked, else the default as far as the context allows.

        Raises APIError when more was asked than the context holds.
        """
        limit = self.engine.model_info.max_model_len
        if asked is None:
            return None if default is None else min(default, limit - num_prompt)
        if num_prompt + asked > limit:
            raise bad_request(
                f"{num_prompt} prompt tokens and {param}={asked} exceed the model's context of "
                f"{limit} tokens. Ask for at most {limit - num_prompt}, or shorten the prompt.",
                param=param,
                code="context_length_exceeded",
            )
        return asked

    @contextlib.asynccontextmanager
    async def running(
        self, jobs: Sequence[Job], *, wants_updates: bool
    ) -> AsyncIterator[list[RequestStream]]:
        """Submit jobs and give their streams, all choices of the first job first.

        On leaving, whatever still runs is aborted. Raises what the engine refused them with.
        """
        parts = [(job, *part) for job in jobs for part in job.parts()]
        for job in jobs:
            if job.rid in self._groups:
                raise bad_request(f"rid {job.rid!r} is in use by another request.", param="rid")
        for job, request_id, _ in parts:
            self._groups.setdefault(job.rid, []).append(request_id)
        try:
            submissions = [
                self.engine.submit(
                    job.prompt_token_ids, sampling, request_id, wants_updates=wants_updates
                )
                for job, request_id, sampling in parts
            ]
            if len(submissions) == 1:
                yield [await submissions[0]]
            else:
                results = await asyncio.gather(*submissions, return_exceptions=True)
                for result in results:
                    if isinstance(result, BaseException):
                        raise result
                yield results
        finally:
            for _, request_id, _ in parts:
                self.engine.abort(request_id)  # does nothing to those that have ended
            for job in jobs:
                self._groups.pop(job.rid, None)

    async def read(
        self, task: Task, texts: Sequence[TokenIds], rids: Sequence[str]
    ) -> list[np.ndarray]:
        """Read all texts together; returns the scores or the embedding of each.

        When one fails, or nobody waits any more, the others are aborted.
        """
        for rid in rids:
            if rid in self._groups:
                raise bad_request(f"rid {rid!r} is in use by another request.", param="rid")
        if len(set(rids)) != len(rids):
            raise bad_request("the same rid was sent for several texts.", param="rid")
        self._groups.update({rid: [rid] for rid in rids})
        tasks = [
            asyncio.ensure_future(self.engine.read(task, text, rid))
            for text, rid in zip(texts, rids, strict=True)
        ]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for one in tasks:
                one.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for rid in rids:
                self._groups.pop(rid, None)

    def abort(self, rid: str) -> int:
        """Abort the requests of one rid; returns how many were running or waiting."""
        return sum(self.engine.abort(request_id) for request_id in self._groups.get(rid, ()))

    def abort_all(self) -> int:
        """Abort every request; returns how many were running or waiting."""
        return sum(self.abort(rid) for rid in list(self._groups))


async def read_body(request: Request, kind: type[BodyT]) -> BodyT:
    """Parse and validate a JSON body; raises pydantic.ValidationError (HTTP 400)."""
    return kind.model_validate_json(await request.body())


def new_id(prefix: str) -> str:
    """Return a fresh id in OpenAI's style, such as chatcmpl-1b2c…"""
    return f"{prefix}-{uuid.uuid4().hex}"


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return OpenAI's usage object; a prompt with several choices counts once."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
