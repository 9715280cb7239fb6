"""What a benchmark asks of an engine: how many requests of how many tokens, and when."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from jaxserve.config import ConfigError

BATCH = re.compile(r"(\d+)x(\d+)/(\d+)")
MIX = re.compile(r"mix(\d+)")
# Without --cases: on an accelerator what peers were measured with, on a CPU what ends soon.
DEFAULT_CASES: Mapping[str, Mapping[str, str]] = {
    "latency": {
        "accelerator": "1x128/128,1x1024/128,8x128/128,8x128/1,32x512/128,32x512/1,64x1024/128,"
        "64x1024/1",
        "cpu": "1x512/1,1x128/64,8x128/64",
    },
    "throughput": {
        "accelerator": "128x1024/128,256x1024/128,256x1024/1,1000x1024/128,512x128/512,mix1000",
        "cpu": "32x128/32,mix32",
    },
}


@dataclass(frozen=True)
class Workload:
    """Requests that are all submitted at once: (input, output) tokens of each."""

    name: str
    lengths: tuple[tuple[int, int], ...]

    @property
    def num_requests(self) -> int:
        return len(self.lengths)

    @property
    def input_tokens(self) -> int:
        return sum(num_input for num_input, _ in self.lengths)

    @property
    def output_tokens(self) -> int:
        return sum(num_output for _, num_output in self.lengths)

    @property
    def longest(self) -> int:
        """Most tokens of a request, input and output together."""
        return max(map(sum, self.lengths))

    @property
    def is_prefill(self) -> bool:
        """Whether every request ends with its first token, so that only prompts are timed."""
        return all(num_output == 1 for _, num_output in self.lengths)

    def prompts(self, vocab: int, seed: int) -> list[list[int]]:
        """Random token ids, the same for the same seed."""
        draw = random.Random(seed)
        return [draw.choices(range(vocab), k=num_input) for num_input, _ in self.lengths]


def parse_cases(text: str) -> list[Workload]:
    """Read `1x128/128,mix1000`: n requests of input/output tokens each, or a mix of n.

    Raises:
        ConfigError: a case is spelled otherwise, or has a zero in it.
    """
    return [_parse_case(case.strip()) for case in text.split(",")]


def _parse_case(case: str) -> Workload:
    if match := BATCH.fullmatch(case):
        num, num_input, num_output = map(int, match.groups())
        if min(num, num_input, num_output) > 0:
            return Workload(case, ((num_input, num_output),) * num)
    elif (match := MIX.fullmatch(case)) and int(match[1]) > 0:
        return Workload(case, tuple(lognormal_mix(int(match[1]))))
    raise ConfigError(
        f"--cases: {case!r} is no case; write REQUESTSxINPUT/OUTPUT, such as 8x128/128, or mixN, "
        "such as mix1000, separated by commas"
    )


def lognormal_mix(num_requests: int) -> list[tuple[int, int]]:
    """(input, output) tokens of requests as users send them: many short ones, few long ones.

    Of both the logarithm is normal, with means 5 and deviations 1.1 and 0.9, rounded down and cut
    to 4..2048 and 4..1024. One thousand are 262,529 tokens in and 216,148 out.
    """
    draw = random.Random(0)
    return [
        (
            min(max(int(draw.lognormvariate(5.0, 1.1)), 4), 2048),
            min(max(int(draw.lognormvariate(5.0, 0.9)), 4), 1024),
        )
        for _ in range(num_requests)
    ]


def arrival_times(num_requests: int, rate: float, seed: int) -> list[float]:
    """Seconds at which requests arrive, the first at 0: a Poisson process of `rate` a second.

    With an infinite rate all arrive at 0. They do not wait for answers (an open loop).
    """
    draw = random.Random(seed)
    gaps: Iterable[float] = (draw.expovariate(rate) for _ in range(num_requests - 1))
    if rate == float("inf"):
        gaps = itertools.repeat(0.0, num_requests - 1)
    return list(itertools.accumulate(gaps, initial=0.0))
