"""`jaxserve bench serve`: requests arrive at random times, whether or not earlier ones are done.

They go to a server that runs (`--url`), or to an engine in this process behind its asyncio front,
which leaves out HTTP alone.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from jaxserve.bench.http_stream import BenchError, get_json, stream_events
from jaxserve.bench.peers import load_peers
from jaxserve.bench.report import Report
from jaxserve.bench.session import Budget, Session
from jaxserve.bench.workloads import Workload, arrival_times
from jaxserve.config import ConfigError, EngineConfig, from_args
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.log import ProgressDisplay
from jaxserve.request import SamplingParams

NUM_WARM_UP = 4  # requests to a running server before anything is timed

Send = Callable[[list[int], int], AsyncIterator[int]]
"""(prompt, output tokens) -> how many tokens there are so far, whenever there are more."""


@dataclass(frozen=True)
class Load:
    """Random requests of equal size."""

    num_requests: int = 200
    input_tokens: int = 512
    output_tokens: int = 128
    seed: int = 0

    @property
    def workload(self) -> Workload:
        lengths = ((self.input_tokens, self.output_tokens),) * self.num_requests
        return Workload(f"{self.num_requests}x{self.input_tokens}/{self.output_tokens}", lengths)


@dataclass
class Record:
    """When a request was sent, and when each of its tokens arrived."""

    sent_s: float
    arrivals_s: list[float] = field(default_factory=list)

    def take(self, num_tokens: int) -> None:
        now_s = time.perf_counter()
        self.arrivals_s += [now_s] * (num_tokens - len(self.arrivals_s))


def run(args: argparse.Namespace) -> int:
    """Measure every request rate of `args`; a JSON line each, then a table."""
    load = Load(args.num_requests, args.input_tokens, args.output_tokens, args.seed)
    if args.url is not None:
        if args.model_path is not None:
            raise ConfigError("--url names a server that runs, --model a model to load; give one")
        return _serve_over_http(load, args)
    with Session(from_args(EngineConfig, args), args) as session:
        session.warm_up()
        serve_in_process(session, load, args.request_rate)
    return 0


def serve_in_process(session: Session, load: Load, rates: list[float]) -> None:
    """Measure a session's engine, which is closed afterwards."""
    front = AsyncEngine(lambda _: session.engine)
    front.wait_until_ready()
    ids = itertools.count()
    greedy = SamplingParams(temperature=0.0, max_tokens=load.output_tokens, ignore_eos=True)

    async def send(prompt: list[int], num_output: int) -> AsyncIterator[int]:
        async for output in front.generate(prompt, greedy, f"serve-{next(ids)}"):
            yield output.num_output

    vocab = session.engine.model_info.vocab_size
    try:
        asyncio.run(
            _all_rates(send, load, rates, vocab, session.report, session.budget, session.progress)
        )
    finally:
        front.close()


def _serve_over_http(load: Load, args: argparse.Namespace) -> int:
    url = args.url.rstrip("/")
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise ConfigError(f"--url is {args.url!r}; give a server's address, http://HOST:PORT")
    info = asyncio.run(get_json(f"{url}/get_model_info"))
    if "vocab_size" not in info:
        raise BenchError(f"{url}/get_model_info does not tell vocab_size: {info}")
    sampling = {"temperature": 0.0, "ignore_eos": True}

    async def send(prompt: list[int], num_output: int) -> AsyncIterator[int]:
        body = {
            "input_ids": prompt,
            "sampling_params": {**sampling, "max_new_tokens": num_output},
            "stream": True,
        }
        async for event in stream_events(f"{url}/generate", body):
            yield event["meta_info"]["completion_tokens"]

    async def measure() -> None:
        warm_up = Load(NUM_WARM_UP, load.input_tokens, load.output_tokens, load.seed + 1)
        prompts = warm_up.workload.prompts(info["vocab_size"], warm_up.seed)
        await asyncio.gather(*(_follow(send, prompt, load.output_tokens) for prompt in prompts))
        rates, vocab = args.request_rate, info["vocab_size"]
        await _all_rates(send, load, rates, vocab, report, Budget(args.budget_s), progress)

    peer = load_peers().model_like(info.get("architecture", ""), info.get("num_parameters", 0))
    report = Report({"url": url, **info}, peer)
    with ProgressDisplay() as progress:
        asyncio.run(measure())
    report.close()
    return 0


async def _follow(send: Send, prompt: list[int], num_output: int) -> Record:
    record = Record(time.perf_counter())
    async for num_tokens in send(prompt, num_output):
        record.take(num_tokens)
    if len(record.arrivals_s) != num_output:
        got = len(record.arrivals_s)
        raise BenchError(f"a request asked for {num_output} tokens and got {got}")
    return record


async def _all_rates(
    send: Send,
    load: Load,
    rates: list[float],
    vocab: int,
    report: Report,
    budget: Budget,
    progress: ProgressDisplay,
) -> None:
    for rate in rates:
        name = f"serve {rate:g}/s"
        prompts = load.workload.prompts(vocab, load.seed)
        at_s = arrival_times(load.num_requests, rate, load.seed)
        records = await _one_rate(name, send, prompts, at_s, load.output_tokens, budget, progress)
        if records is None:
            report.not_run.append(name)
            continue
        facts = summary(records)
        known = report.peer.serve.get(f"{rate:g}", {}) if report.peer else {}
        report.add(
            f"serve, {load.workload.name}",
            name,
            facts,
            {
                "request_rate": str(rate),
                "requests": load.num_requests,
                "input_tokens": load.input_tokens,
                "output_tokens": load.output_tokens,
                **facts,
                "peers": known,
            },
        )
        for peer, figures in known.items():
            report.add_peer(f"serve, {load.workload.name}", name, peer, figures)


async def _one_rate(
    name: str,
    send: Send,
    prompts: list[list[int]],
    at_s: list[float],
    num_output: int,
    budget: Budget,
    progress: ProgressDisplay,
) -> list[Record] | None:
    """Send each prompt at its time and follow them all; None when the budget ends before."""
    if budget.is_spent:
        return None
    start_s, done = time.perf_counter(), 0

    async def one(prompt: list[int], due_s: float) -> Record:
        nonlocal done
        await asyncio.sleep(max(0.0, start_s + due_s - time.perf_counter()))
        record = await _follow(send, prompt, num_output)
        done += 1
        progress(name, done, len(prompts))
        return record

    tasks = [
        asyncio.create_task(one(prompt, due_s)) for prompt, due_s in zip(prompts, at_s, strict=True)
    ]
    try:
        left_s = None if budget.left_s == float("inf") else budget.left_s
        return list(await asyncio.wait_for(asyncio.gather(*tasks), left_s))
    except TimeoutError:
        return None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def summary(records: list[Record]) -> dict[str, Any]:
    """Rates of the whole run; medians and 99th percentiles over its requests.

    ttft: milliseconds from sending a request to its first token; tpot: from there to the last one,
    per token; itl: between any two tokens of a request that did not arrive together.
    """
    first_s = min(record.sent_s for record in records)
    last_s = max(record.arrivals_s[-1] for record in records)
    seconds, num_tokens = last_s - first_s, sum(len(record.arrivals_s) for record in records)
    ttft = [record.arrivals_s[0] - record.sent_s for record in records]
    tpot = [
        (record.arrivals_s[-1] - record.arrivals_s[0]) / (len(record.arrivals_s) - 1)
        for record in records
        if len(record.arrivals_s) > 1
    ]
    gaps = np.concatenate([np.diff(record.arrivals_s) for record in records])
    facts = {
        "seconds": round(seconds, 6),
        "req_s": round(len(records) / seconds, 3),
        "out_tok_s": round(num_tokens / seconds, 1),
    }
    for name, values in (("ttft", ttft), ("tpot", tpot), ("itl", gaps[gaps > 0])):
        if len(values):
            facts[f"{name}_ms"] = round(float(np.median(values)) * 1e3, 3)
            facts[f"{name}_p99_ms"] = round(float(np.percentile(values, 99)) * 1e3, 3)
    return facts
