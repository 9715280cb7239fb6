"""What a user asks for, what the scheduler keeps about it, and what is answered.

No jax here: the scheduler and every front end import this module.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from numbers import Integral, Real
from typing import Any

MAX_TEMPERATURE = 1e6  # far beyond the flattest useful distribution, and safe in float32
_INT32_MAX = 2**31 - 1
_INT64_MAX = 2**63 - 1


class InvalidRequest(ValueError):
    """A request that can never be served as asked.

    field: the request field to blame, None when it is not one field's fault. Of several wrong
    fields it is the first; the message lists them all.
    """

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class FinishReason(StrEnum):
    """Why a request produces no more tokens."""

    STOP = "stop"  # an end token or a stop string
    LENGTH = "length"  # max_tokens or the context limit
    ABORT = "abort"
    ERROR = "error"


class Status(Enum):
    """Where a request is in its life; a preempted request is WAITING again."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True)
class SamplingParams:
    """How to choose a request's tokens and when to end.

    Lists are accepted where tuples are declared, and one string for `stop`.

    Raises:
        InvalidRequest: a field has the wrong type or is out of range; all of them are named.
    """

    max_tokens: int | None = 128  # None: up to the context limit
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0  # 1: off
    top_k: int = 0  # 0 or -1: off
    min_p: float = 0.0  # 0: off
    seed: int | None = None  # None: a fresh one per request; of an int the low 32 bits count
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        problems: dict[str, str] = {}
        clean = {
            "max_tokens": _optional(_integer, self.max_tokens, 1, _INT64_MAX),
            "temperature": _number(self.temperature, 0, MAX_TEMPERATURE),
            "top_p": _number(self.top_p, 0, 1, excludes_low=True),
            "top_k": _integer(self.top_k, -1, _INT32_MAX),
            "min_p": _number(self.min_p, 0, 1),
            "seed": _optional(_integer, self.seed, -_INT64_MAX - 1, _INT64_MAX),
            "stop": _strings(self.stop),
            "stop_token_ids": _token_ids(self.stop_token_ids),
            "ignore_eos": _boolean(self.ignore_eos),
        }
        for name, value in clean.items():
            if isinstance(value, _Wrong):
                problems[name] = f"{name}={_shown(getattr(self, name))} must be {value.allowed}"
            else:
                object.__setattr__(self, name, value)
        if problems:
            raise InvalidRequest("; ".join(problems.values()) + ".", field=next(iter(problems)))


@dataclass(eq=False, slots=True)
class Request:
    """One request on its way through the scheduler, the only one that changes it.

    `tokens` is the prompt followed by the output so far; `[0, num_computed)` of them have their KV
    in `pages` or are scheduled to. Up to `num_pending` tokens more have been sampled but are still
    on the device: between schedule() and update() of overlapping steps one for each step in flight.

        [0, num_computed) | to be computed | pending on the device
        [0, num_prompt)   | output so far  |

    Times are time.perf_counter() seconds.
    """

    id: str
    tokens: list[int]
    num_prompt: int
    sampling: SamplingParams
    eos_ids: frozenset[int] = frozenset()
    seed: int = 0  # of its random draws; the low 32 bits count
    num_computed: int = 0
    num_pending: int = 0
    pages: list[int] = field(default_factory=list)
    rank: int = -1  # the data-parallel rank that holds the pages, -1: none
    row: int = -1  # the row slot on that rank, -1: none
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    arrived_s: float = field(default_factory=time.perf_counter)
    first_token_s: float | None = None
    finished_s: float | None = None
    # The text is read, not continued: the request ends with its last prompt token.
    prefill_only: bool = False
    arrival: int = -1  # place in the order of arrival; the scheduler gives it
    max_len: int = 0  # most tokens, prompt and output, it may reach; the scheduler gives it
    end_ids: frozenset[int] = field(init=False)  # a token of these ends the output
    result: Any = None  # what a prefill-only request has been read as so far; the engine keeps it

    def __post_init__(self) -> None:
        eos_ids = frozenset() if self.sampling.ignore_eos else self.eos_ids
        self.end_ids = eos_ids.union(self.sampling.stop_token_ids)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def is_finished(self) -> bool:
        return self.status is Status.FINISHED


def with_end(token_ids: list[int], end_token: int | None) -> list[int]:
    """Return a text that ends with `end_token`, appended where need be; with None, as it is."""
    if end_token is None or (token_ids and token_ids[-1] == end_token):
        return token_ids
    return [*token_ids, end_token]


@dataclass(frozen=True)
class RequestOutput:
    """What is new about a request: one update of its stream."""

    request_id: str
    token_ids: tuple[int, ...]  # new since the last update
    text: str  # new since the last update
    finished: bool
    finish_reason: FinishReason | None
    num_prompt: int
    num_output: int  # all output tokens so far


@dataclass(frozen=True)
class _Wrong:
    allowed: str


def _optional(check: Any, value: Any, low: int, high: int) -> Any:
    if value is None:
        return None
    checked = check(value, low, high)
    return _Wrong(f"{checked.allowed}, or None") if isinstance(checked, _Wrong) else checked


def _integer(value: Any, low: int, high: int) -> int | _Wrong:
    if isinstance(value, Integral) and not isinstance(value, bool):
        integer = int(value)
        if low <= integer <= high:
            return integer
    return _Wrong(f"an integer from {low} to {high}")


def _number(value: Any, low: float, high: float, *, excludes_low: bool = False) -> float | _Wrong:
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if low <= number <= high and not (excludes_low and number == low):
            return number
    above = f"above {low:g} and" if excludes_low else f"from {low:g}"
    return _Wrong(f"a number {above} {'at most' if excludes_low else 'to'} {high:g}")


def _boolean(value: Any) -> bool | _Wrong:
    return value if isinstance(value, bool) else _Wrong("True or False")


def _strings(value: Any) -> tuple[str, ...] | _Wrong:
    strings = (value,) if isinstance(value, str) else value
    if isinstance(strings, tuple | list) and all(isinstance(s, str) and s for s in strings):
        return tuple(strings)
    return _Wrong("a list of strings, none of them empty")


def _token_ids(value: Any) -> tuple[int, ...] | _Wrong:
    if isinstance(value, tuple | list):
        ids = [_integer(i, 0, _INT32_MAX) for i in value]
        wrong = [i for i in ids if isinstance(i, _Wrong)]
        if not wrong:
            return tuple(i for i in ids if isinstance(i, int))
    return _Wrong(f"a list of token ids, each an integer from 0 to {_INT32_MAX}")


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python converts
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


# What a prefill-only request has in place of sampling parameters.
NO_SAMPLING = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
