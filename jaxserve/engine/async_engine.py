"""The asyncio front of the engine: one thread steps it, any number of coroutines read from it.

    coroutine --submit/abort--> command queue --between two steps--> engine.add / engine.abort
    coroutine <--one call per event loop and step-- new tokens <------ engine.step

Only the step thread touches the engine. Everything about text (incremental decoding, stop
strings) happens on the reader's side, while the device computes the next step.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from jaxserve.request import FinishReason, InvalidRequest, Request, RequestOutput, SamplingParams
from jaxserve.tokenizer import StopStrings, StreamDecoder, Tokenizer

logger = logging.getLogger(__name__)

Task = Literal["generate", "score", "embed"]
DOES: dict[Task, str] = {
    "generate": "write text",
    "score": "score texts",
    "embed": "embed texts",
}
# What to ask a model for, and how to get a server that does something else.
USE: dict[Task, str] = {
    "generate": "Use /v1/chat/completions, /v1/completions or /generate.",
    "score": "Use /classify, /v1/score or /v1/rerank.",
    "embed": "Use /v1/embeddings. For anything else serve another model, and without "
    "--is-embedding.",
}
RESTART: dict[Task, str] = {
    "embed": "Start the server with --is-embedding to get this model's embeddings.",
    "score": "Serve a model with a score head: an architecture such as "
    "...ForSequenceClassification or ...ForRewardModel.",
}
State = Literal["starting", "compiling", "ready", "draining", "dead"]
DRAIN_POLL_S = 0.02
JOIN_TIMEOUT_S = 10.0


class EngineUnavailable(RuntimeError):
    """The engine takes no requests now; the message says why."""


class EngineDead(EngineUnavailable):
    """The engine failed and will not come back; the message holds the first error."""


class ContextLengthExceeded(InvalidRequest):
    """The prompt, or prompt plus asked output, do not fit in the model's context."""


class WrongTask(InvalidRequest):
    """The model that is served is not for this; the message says what is, and the remedy."""


class StepEngine(Protocol):
    """What is asked of `jaxserve.engine.engine.Engine` (and of its stand-in in tests)."""

    tokenizer: Tokenizer

    @property
    def model_info(self) -> Any: ...
    @property
    def has_work(self) -> bool: ...
    def add(
        self, prompt_token_ids: list[int], sampling: SamplingParams | None, request_id: str
    ) -> Request: ...
    def abort(self, request_id: str) -> bool: ...
    def step(self) -> list[Request]: ...
    def stats(self) -> Any: ...
    def close(self) -> None: ...


class StartupProgress:
    """How far loading and compiling are; written by the engine's threads, read by /health.

    Calling it fits `converters.interface.Progress`; each call is passed on to `display`.
    """

    def __init__(self, display: Callable[[str, int, int], None] | None = None) -> None:
        self._display = display
        self._stages: dict[str, tuple[int, int]] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        self._stages[what] = (done, total)
        if self._display is not None:
            self._display(what, done, total)

    @property
    def is_compiling(self) -> bool:
        return any("compil" in s["stage"] and s["done"] < s["total"] for s in self.describe())

    def describe(self) -> list[dict[str, Any]]:
        """Return each stage so far as {"stage", "done", "total"}; `total` is 0 while unknown."""
        stages = list(self._stages.items())
        return [{"stage": what, "done": done, "total": total} for what, (done, total) in stages]


@dataclass(frozen=True)
class _Update:
    """New tokens of one request; an update without tokens and reason says it was admitted."""

    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    result: np.ndarray | None = None  # of a text that was read, with its finish_reason


@dataclass(frozen=True)
class _Add:
    stream: RequestStream | TextRead


@dataclass(frozen=True)
class _Abort:
    request_id: str


@dataclass
class _Tracked:
    """A request the step thread knows, and how many of its output tokens were handed out."""

    stream: RequestStream | TextRead
    request: Request
    num_sent: int = 0


class TextRead:
    """A text on its way through a model that writes none; one coroutine waits for its result."""

    def __init__(
        self, engine: AsyncEngine, prompt_token_ids: Sequence[int], request_id: str
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids = list(prompt_token_ids)
        self.sampling = None
        self.wants_updates = False
        self.loop = asyncio.get_running_loop()
        self._engine = engine
        self._result: asyncio.Future[np.ndarray] = self.loop.create_future()

    async def result(self) -> np.ndarray:
        """Wait for scores f32[labels] or an embedding f32[D]; a caller that leaves aborts it.

        Raises:
            InvalidRequest: the engine refused the text.
            EngineUnavailable: it was aborted, or the engine has failed.
        """
        try:
            return await self._result
        except asyncio.CancelledError:
            self._engine.abort(self.request_id)
            raise

    def deliver(self, update: _Update | Exception) -> None:
        """Take what the step thread has for this request; called in the request's loop."""
        if self._result.done():
            return
        if isinstance(update, Exception):
            self._result.set_exception(update)
        elif update.result is not None:
            self._result.set_result(update.result)
        elif update.finish_reason is not None:
            self._result.set_exception(EngineUnavailable("the request was aborted."))


class RequestStream:
    """The outputs of one request: `async for output in stream`, in the loop that submitted it.

    The text excludes stop strings and stop tokens; `token_ids` keeps a stop token. After the last
    output `stop_reason` is the stop string or stop token that ended it, else None.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        request_id: str,
        *,
        wants_updates: bool,
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids = list(prompt_token_ids)
        self.sampling = sampling
        self.stop_reason: str | int | None = None
        self.loop = asyncio.get_running_loop()
        # A stop string can only be seen here, so such a request needs an update per step.
        self.wants_updates = wants_updates or bool(sampling.stop)
        self._engine = engine
        self._decoder = StreamDecoder(engine.tokenizer, prompt_token_ids)
        self._stop = StopStrings(sampling.stop)
        self._inbox: collections.deque[_Update | Exception] = collections.deque()
        self._arrival = asyncio.Event()
        self._num_output = 0
        self._is_finished = False

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._is_finished:
            raise StopAsyncIteration
        while not self._inbox:
            self._arrival.clear()
            await self._arrival.wait()
        token_ids: list[int] = []
        finish_reason = None
        while self._inbox and finish_reason is None:  # a slow reader gets several steps at once
            update = self._inbox.popleft()
            if isinstance(update, Exception):
                self._is_finished = True
                raise update
            token_ids.extend(update.token_ids)
            finish_reason = update.finish_reason
        return self._output(token_ids, finish_reason)

    async def read_all(self) -> RequestOutput:
        """Read to the end and return all of it as one output."""
        outputs = [output async for output in self]
        return dataclasses.replace(
            outputs[-1],
            text="".join(output.text for output in outputs),
            token_ids=tuple(i for output in outputs for i in output.token_ids),
        )

    async def admitted(self) -> None:
        """Return once the engine took the request; raises the error with which it refused."""
        while not self._inbox:
            self._arrival.clear()
            await self._arrival.wait()
        if isinstance(self._inbox[0], Exception):
            self._is_finished = True
            raise self._inbox[0]
        self._inbox.popleft()

    def deliver(self, update: _Update | Exception) -> None:
        """Take what the step thread has for this request; called in the stream's loop."""
        self._inbox.append(update)
        self._arrival.set()

    def close(self) -> None:
        """Abort the request unless it is finished. Needed when not read to its end."""
        if not self._is_finished:
            self._is_finished = True
            self._engine.abort(self.request_id)

    def _output(self, token_ids: list[int], finish_reason: FinishReason | None) -> RequestOutput:
        stopped_by_token = finish_reason is FinishReason.STOP
        visible = token_ids[:-1] if stopped_by_token else token_ids
        if self.sampling.stop:
            text, num_used = self._text_up_to_stop(visible, is_last=finish_reason is not None)
        elif finish_reason is not None:
            text, num_used = self._decoder.finish(visible), len(visible)
        else:
            text, num_used = self._decoder.push(visible), len(visible)
        if self._stop.matched is not None:
            token_ids = token_ids[:num_used]
            self.stop_reason = self._stop.matched
            if finish_reason is None:  # the engine does not know yet
                self.close()
            finish_reason = FinishReason.STOP
        elif stopped_by_token:
            self.stop_reason = token_ids[-1]
        self._num_output += len(token_ids)
        self._is_finished = finish_reason is not None
        return RequestOutput(
            request_id=self.request_id,
            token_ids=tuple(token_ids),
            text=text,
            finished=self._is_finished,
            finish_reason=finish_reason,
            num_prompt=len(self.prompt_token_ids),
            num_output=self._num_output,
        )

    def _text_up_to_stop(self, token_ids: list[int], *, is_last: bool) -> tuple[str, int]:
        """Return the text before a stop string, and the tokens it took to see that string."""
        text = ""
        for index, token_id in enumerate(token_ids):
            text += self._stop.push(self._decoder.push([token_id]))
            if self._stop.matched is not None:
                return text, index + 1
        if is_last:
            text += self._stop.push(self._decoder.finish())
            text += self._stop.flush()
        return text, len(token_ids)


class AsyncEngine:
    """Runs an engine in a thread of its own and gives its outputs to coroutines.

    Args:
        build: makes the engine, in the step thread; it gets the progress to report to.
        progress: where start-up progress is kept.
    """

    def __init__(
        self,
        build: Callable[[StartupProgress], StepEngine],
        *,
        progress: StartupProgress | None = None,
    ) -> None:
        self.progress = progress or StartupProgress()
        self._build = build
        self._engine: StepEngine | None = None
        self._error: BaseException | None = None
        self._condition = threading.Condition()  # guards the fields below
        self._commands: collections.deque[_Add | _Abort] = collections.deque()
        self._active: dict[str, RequestStream | TextRead] = {}
        self._phase: Literal["starting", "ready", "draining", "dead"] = "starting"
        self._is_closing = False
        self._is_settled = threading.Event()  # start-up has ended, well or badly
        self._thread = threading.Thread(target=self._run, name="jaxserve-step", daemon=True)
        self._thread.start()

    # ---- state -------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        if self._phase == "starting" and self.progress.is_compiling:
            return "compiling"
        return self._phase

    @property
    def error(self) -> BaseException | None:
        """What ended the engine, in start-up or later."""
        return self._error

    @property
    def was_started(self) -> bool:
        """Whether the engine was built; it may have failed since."""
        return self._engine is not None

    @property
    def engine(self) -> StepEngine:
        """The engine, for what never changes: tokenizer, model_info. Raises before it is there."""
        if self._engine is None:
            raise self._unavailable()
        return self._engine

    @property
    def tokenizer(self) -> Tokenizer:
        return self.engine.tokenizer

    @property
    def model_info(self) -> Any:
        return self.engine.model_info

    @property
    def num_active(self) -> int:
        """Requests that were submitted and have not ended."""
        return len(self._active)

    def stats(self) -> Any:
        return self.engine.stats()

    def wait_until_ready(self) -> None:
        """Block until start-up has ended; raises the error with which it failed."""
        self._is_settled.wait()
        if self._error is not None:
            raise self._error
        if self._phase != "ready":
            raise self._unavailable()

    # ---- requests ----------------------------------------------------------------------------

    async def submit(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        request_id: str,
        *,
        wants_updates: bool = True,
    ) -> RequestStream:
        """Hand a request to the engine and return its outputs; read them all or `close()` them.

        Args:
            prompt_token_ids: at least one, each below the vocabulary's size.
            sampling: how to choose tokens and when to stop.
            request_id: unique among the requests that run.
            wants_updates: False gives one output, at the end, which costs less.

        Raises:
            InvalidRequest: the request can never be served as asked.
            EngineUnavailable: starting, draining or dead.
        """
        if self._phase != "ready":
            raise self._unavailable()
        self.check_task("generate")
        self.check_prompt(prompt_token_ids)
        if sampling.stop and not self.tokenizer.has_text:
            raise InvalidRequest(
                "stop strings are found in text, and this model is served without a tokenizer; "
                "use stop_token_ids.",
                field="stop",
            )
        stream = RequestStream(
            self, prompt_token_ids, sampling, request_id, wants_updates=wants_updates
        )
        self._hand_over(stream)
        try:
            await stream.admitted()
        except BaseException:  # a cancelled caller will not read the stream
            stream.close()
            raise
        return stream

    async def read(
        self, task: Task, prompt_token_ids: Sequence[int], request_id: str
    ) -> np.ndarray:
        """Read a text and return its scores f32[labels] or its embedding f32[D].

        Args:
            task: which of both, "score" or "embed".
            prompt_token_ids, request_id: as in `submit`.

        Raises:
            InvalidRequest: the text can never be read, or the model is for something else.
            EngineUnavailable: starting, draining or dead.
        """
        if self._phase != "ready":
            raise self._unavailable()
        self.check_task(task)
        self.check_prompt(prompt_token_ids)
        text = TextRead(self, prompt_token_ids, request_id)
        self._hand_over(text)
        return await text.result()

    def _hand_over(self, stream: RequestStream | TextRead) -> None:
        with self._condition:
            if self._phase != "ready":
                raise self._unavailable()
            if stream.request_id in self._active:
                raise InvalidRequest(
                    f"request id {stream.request_id!r} is in use by another request."
                )
            self._active[stream.request_id] = stream
            self._commands.append(_Add(stream))
            self._condition.notify()

    async def generate(
        self, prompt_token_ids: Sequence[int], sampling: SamplingParams, request_id: str
    ) -> AsyncIterator[RequestOutput]:
        """Yield a request's outputs as they come; leaving the loop early aborts it."""
        stream = await self.submit(prompt_token_ids, sampling, request_id)
        try:
            async for output in stream:
                yield output
        finally:
            stream.close()

    def abort(self, request_id: str) -> bool:
        """Stop a request, from any thread; returns whether it was running or waiting."""
        with self._condition:
            if request_id not in self._active:
                return False
            self._commands.append(_Abort(request_id))
            self._condition.notify()
        return True

    def check_task(self, task: Task) -> None:
        """Raise WrongTask unless the model is for `task`."""
        info = self.model_info
        if info.task == task:
            return
        remedy = USE[info.task]
        if info.task == "generate":
            remedy = RESTART[task]
        raise WrongTask(
            f"{info.architecture} is served to {DOES[info.task]}, not to {DOES[task]}. {remedy}"
        )

    def check_prompt(self, prompt_token_ids: Sequence[int]) -> None:
        """Raise InvalidRequest for a prompt that can never be served."""
        info = self.model_info
        num_prompt = len(prompt_token_ids)
        if num_prompt == 0:
            raise InvalidRequest("the prompt has no tokens; send at least one.")
        writes = info.task == "generate"
        if num_prompt + writes > info.max_model_len:
            together = ", prompt and output together" if writes else ""
            raise ContextLengthExceeded(
                f"the prompt has {num_prompt} tokens, but the model's context is "
                f"{info.max_model_len} tokens{together}. Shorten the prompt."
            )
        wrong = next((i for i in prompt_token_ids if not 0 <= i < info.vocab_size), None)
        if wrong is not None:
            raise InvalidRequest(
                f"prompt token id {wrong} is not in the vocabulary of {info.vocab_size} tokens."
            )

    def _unavailable(self) -> EngineUnavailable:
        if self._phase == "dead":
            return EngineDead(f"the engine has failed: {self._error!r}. Restart the server.")
        if self._phase == "draining":
            return EngineUnavailable("the server is shutting down and takes no new requests.")
        return EngineUnavailable("the model is still loading; try again when /health answers 200.")

    # ---- ending ------------------------------------------------------------------------------

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and let running ones finish; abort those that take too long.

        Returns whether all of them finished by themselves.
        """
        with self._condition:
            if self._phase != "dead":
                self._phase = "draining"
        deadline_s = time.perf_counter() + timeout_s
        while self._active and time.perf_counter() < deadline_s:
            await asyncio.sleep(DRAIN_POLL_S)
        late = list(self._active)
        for request_id in late:
            self.abort(request_id)
        return not late

    def close(self, timeout_s: float = JOIN_TIMEOUT_S) -> bool:
        """Stop the step thread and close the engine; running requests end with an error.

        Returns False if the thread did not end in time: it loads a model, or waits for a
        compilation that cannot be interrupted.
        """
        with self._condition:
            self._is_closing = True
            if self._phase in ("starting", "ready"):
                self._phase = "draining"
            self._condition.notify()
        self._is_settled.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # ---- the step thread ---------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._engine = self._build(self.progress)
        except BaseException as error:  # told to whoever waits in wait_until_ready
            self._die(error)
            return
        tracked: dict[str, _Tracked] = {}
        try:
            with self._condition:
                if self._phase == "starting":
                    self._phase = "ready"
            self._is_settled.set()
            while self._wait_for_work():
                self._apply_commands(tracked)
                if self._engine.has_work:
                    self._publish(tracked, self._engine.step())
            self._fail_all()
        except Exception as error:
            logger.exception("the engine failed")
            self._die(error)
        finally:
            self._engine.close()

    def _wait_for_work(self) -> bool:
        """Sleep while there is nothing to do; returns False when the engine is to be closed."""
        with self._condition:
            while not (self._is_closing or self._commands or self._engine.has_work):
                self._condition.wait()
            return not self._is_closing

    def _apply_commands(self, tracked: dict[str, _Tracked]) -> None:
        with self._condition:
            commands = list(self._commands)
            self._commands.clear()
        deliveries: list[tuple[RequestStream | TextRead, _Update | Exception]] = []
        for command in commands:
            if isinstance(command, _Add):
                stream = command.stream
                try:
                    request = self._engine.add(
                        stream.prompt_token_ids, stream.sampling, stream.request_id
                    )
                except ValueError as error:
                    self._forget(stream.request_id)
                    deliveries.append((stream, error))
                else:
                    tracked[stream.request_id] = _Tracked(stream, request)
                    deliveries.append((stream, _Update()))
            elif command.request_id in tracked:
                ended = tracked.pop(command.request_id)
                self._engine.abort(command.request_id)
                self._forget(command.request_id)
                deliveries.append((ended.stream, _last_update(ended, FinishReason.ABORT)))
        self._deliver(deliveries)

    def _publish(self, tracked: dict[str, _Tracked], requests: Iterable[Request]) -> None:
        deliveries: list[tuple[RequestStream | TextRead, _Update | Exception]] = []
        for request in requests:
            entry = tracked.get(request.id)
            if entry is None:  # aborted while its last step ran
                continue
            reason = request.finish_reason
            if reason is not None:
                del tracked[request.id]
                self._forget(request.id)
                if reason is FinishReason.ERROR:
                    error = EngineUnavailable(f"request {request.id} failed in the engine.")
                    deliveries.append((entry.stream, error))
                    continue
                deliveries.append((entry.stream, _last_update(entry, reason)))
            elif entry.stream.wants_updates:
                new = tuple(request.tokens[request.num_prompt + entry.num_sent :])
                if new:
                    entry.num_sent += len(new)
                    deliveries.append((entry.stream, _Update(new)))
        self._deliver(deliveries)

    def _deliver(
        self, deliveries: list[tuple[RequestStream | TextRead, _Update | Exception]]
    ) -> None:
        """Wake each event loop once for all its requests."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[RequestStream | TextRead, Any]]] = {}
        for stream, update in deliveries:
            by_loop.setdefault(stream.loop, []).append((stream, update))
        for loop, updates in by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver_all, updates)
            except RuntimeError:  # the loop was closed with its readers
                for stream, _ in updates:
                    self.abort(stream.request_id)

    def _forget(self, request_id: str) -> None:
        with self._condition:
            self._active.pop(request_id, None)

    def _die(self, error: BaseException) -> None:
        with self._condition:
            self._phase, self._error = "dead", error
        self._is_settled.set()
        self._fail_all()

    def _fail_all(self) -> None:
        with self._condition:
            streams = list(self._active.values())
            self._active.clear()
            self._commands.clear()
        self._deliver([(stream, self._unavailable()) for stream in streams])


def _last_update(entry: _Tracked, reason: FinishReason) -> _Update:
    request = entry.request
    new = tuple(request.tokens[request.num_prompt + entry.num_sent :])
    is_whole = reason is not FinishReason.ABORT
    return _Update(new, reason, request.result if is_whole else None)


def _deliver_all(updates: list[tuple[RequestStream | TextRead, _Update | Exception]]) -> None:
    for stream, update in updates:
        stream.deliver(update)
