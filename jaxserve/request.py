"""What a user asks for (`SamplingParams`), and a request on its way through the engine."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from enum import Enum


class InvalidRequest(ValueError):
    """A request that can never be served as asked."""


class FinishReason(str, Enum):
    """Why a request ended."""

    STOP = "stop"  # an end-of-text token, a stop token or a stop string
    LENGTH = "length"  # max_tokens or the context limit
    ABORT = "abort"
    ERROR = "error"


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


_INT32_MAX = 2**31 - 1
_FLOAT32_MAX = struct.unpack("<f", b"\xff\xff\x7f\x7f")[0]


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt.

    Attributes:
        max_tokens: longest output; None allows up to the context limit.
        temperature: 0 takes the most likely token.
        top_p: smallest set of tokens with at least this mass.
        top_k: most likely tokens kept; 0 or -1 keeps all.
        min_p: least probability kept, as a share of the most likely token's.
        seed: same seed and prompt, same tokens, whatever else runs; None draws a fresh one.
        stop: strings that end the output and are not part of it.
        stop_token_ids: tokens that end the output.
        ignore_eos: go on after the model's end-of-text token.

    Raises:
        InvalidRequest: naming the field, its value and what is allowed.
    """

    max_tokens: int | None = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        self._check_integer("max_tokens", 1, None, optional=True)
        self._check_number("temperature", 0.0, _FLOAT32_MAX)
        self._check_number("top_p", 0.0, 1.0, above=True)
        self._check_number("min_p", 0.0, 1.0)
        self._check_integer("top_k", -1, _INT32_MAX)
        self._check_integer("seed", -(2**63), 2**64 - 1, optional=True)
        if not isinstance(self.ignore_eos, bool):
            raise InvalidRequest(f"ignore_eos is {self.ignore_eos!r}; allowed: true or false")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise InvalidRequest(f"stop holds {text!r}; allowed: strings that are not empty")
        for token in self.stop_token_ids:
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise InvalidRequest(f"stop_token_ids holds {token!r}; allowed: token ids from 0")

    def _check_integer(
        self, name: str, low: int, high: int | None, *, optional: bool = False
    ) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        fits = isinstance(value, int) and not isinstance(value, bool)
        if not fits or value < low or (high is not None and value > high):
            limit = f"an integer from {low}" + (f" to {high}" if high is not None else "")
            raise InvalidRequest(f"{name} is {value!r}; allowed: {limit}")

    def _check_number(self, name: str, low: float, high: float, *, above: bool = False) -> None:
        value = getattr(self, name)
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        if fits and math.isfinite(value) and low <= value <= high and not (above and value == low):
            return
        start = f"above {low:g}" if above else f"from {low:g}"
        end = "" if high == _FLOAT32_MAX else f" to {high:g}"
        raise InvalidRequest(f"{name} is {value!r}; allowed: a number {start}{end}")


@dataclass(eq=False)
class Request:
    """A request, owned by the scheduler: the only mutable object between user and device.

        tokens:  [prompt ............ | output ....... ] + num_pending tokens still on the device
        KV:      [0, num_computed)  in pages, or being written by a step that was dispatched

    Attributes:
        num_pending: sampled tokens whose value has not reached the host.
        pages: KV pages in token order; `row` and `rank`: its slot while running.
        seed: of its random draws.
    """

    id: str
    tokens: list[int]
    num_prompt: int
    sampling: SamplingParams
    eos_ids: frozenset[int] = frozenset()
    seed: int = 0
    num_computed: int = 0
    num_pending: int = 0
    pages: list[int] = field(default_factory=list)
    rank: int = -1
    row: int = -1
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    order: int = -1  # of arrival
    arrival_s: float = 0.0
    first_token_s: float | None = None
    finished_s: float | None = None

    @property
    def num_output(self) -> int:
        """Output tokens the host knows."""
        return len(self.tokens) - self.num_prompt

    @property
    def length(self) -> int:
        """Tokens of prompt and output, those still on the device included."""
        return len(self.tokens) + self.num_pending


@dataclass(frozen=True)
class RequestOutput:
    """News of a request: what came since the last one."""

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    finished: bool
    finish_reason: FinishReason | None
    num_prompt: int
    num_output: int
