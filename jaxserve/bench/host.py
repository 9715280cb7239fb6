"""`jaxserve bench host`: what a step costs the host: scheduling, packing, taking tokens in.

The device is faked: it answers at once. Steps overlap as in the engine: a step's tokens come back
after the next one was scheduled.
"""

from __future__ import annotations

import argparse
import collections
import gc
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from jaxserve.bench import report
from jaxserve.engine.packing import SlotColumns, fill_rank
from jaxserve.engine.step import StepLayout
from jaxserve.request import Request, SamplingParams
from jaxserve.scheduler.buckets import make_buckets
from jaxserve.scheduler.scheduler import Batch, Scheduler

CONTEXT, MODEL_LEN = 1024, 4096
STEP_TOKENS = 8192
MIXED_PROMPT, MIXED_OUTPUT = 256, 64  # tokens; at every step one row in 64 begins
PARTS = ("schedule", "pack", "update")


def run(args: argparse.Namespace) -> int:
    """Measure decode steps and mixed ones, for every number of rows."""
    results = []
    for measure in (decode, mixed):
        for num_rows in args.rows:
            results.append(measure(num_rows, args.page_size, args.repeats))
            report.json_line(results[-1])
    report.table(results)
    return 0


def decode(num_rows: int, page_size: int, repeats: int) -> dict[str, object]:
    """Every row has its prompt behind it and generates one token a step."""
    host = Host(num_rows, page_size)
    sampling = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=repeats + 64, ignore_eos=True)
    for _ in range(num_rows):
        host.add(CONTEXT, sampling)
    while host.scheduler.stats.num_waiting or not host.is_decoding:
        host.step()
    return host.measure(f"decode {num_rows} rows", repeats)


def mixed(num_rows: int, page_size: int, repeats: int) -> dict[str, object]:
    """Rows end and others begin: requests come as fast as they can be taken."""
    host, draw = Host(num_rows, page_size), random.Random(0)

    def refill() -> None:
        while host.scheduler.stats.num_waiting < num_rows // 8 + 1:
            output = draw.randint(1, 2 * MIXED_OUTPUT)
            sampling = SamplingParams(temperature=0.7, max_tokens=output, ignore_eos=True)
            host.add(draw.randint(1, 2 * MIXED_PROMPT), sampling)

    for _ in range(2 * MIXED_OUTPUT):  # until rows are of all ages
        refill()
        host.step()
    return host.measure(f"mixed {num_rows} rows", repeats, refill)


@dataclass
class Host:
    """A scheduler and the arrays of its steps, without a device."""

    num_rows: int
    page_size: int
    num_requests: int = 0
    in_flight: collections.deque[Batch] = field(default_factory=collections.deque)

    def __post_init__(self) -> None:
        tokens = max(STEP_TOKENS, self.num_rows)
        buckets = make_buckets(tokens, self.num_rows)
        self.scheduler = Scheduler(
            num_pages=self.num_rows * -(-MODEL_LEN // self.page_size),
            page_size=self.page_size,
            max_rows=self.num_rows,
            max_tokens_per_step=tokens,
            max_model_len=MODEL_LEN,
            buckets=buckets,
        )
        self.layouts = {bucket: StepLayout(bucket, self.page_size) for bucket in buckets}
        self.columns = SlotColumns(self.num_rows)
        self.results = {bucket: np.full((1, bucket.rows), 11, np.int32) for bucket in buckets}

    @property
    def is_decoding(self) -> bool:
        """Whether the last step gave every row one token."""
        rows = self.in_flight[-1].ranks[0] if self.in_flight else ()
        return len(rows) == self.num_rows and all(row.token_on_device for row in rows)

    def add(self, num_prompt: int, sampling: SamplingParams) -> None:
        request = Request(str(self.num_requests), [7] * num_prompt, num_prompt, sampling)
        self.num_requests += 1
        self.scheduler.add(request)

    def step(self) -> tuple[float, float, float]:
        """One turn of the engine's loop; seconds of its three parts."""
        marks = [time.perf_counter()]
        batch = self.scheduler.schedule()
        marks.append(time.perf_counter())
        if batch is not None:
            layout = self.layouts[batch.bucket]
            packed = np.zeros((1, layout.size), np.int32)
            fill_rank(layout, packed[0], batch.ranks[0], self.columns)
            self.in_flight.append(batch)
        marks.append(time.perf_counter())
        while len(self.in_flight) > (1 if batch is not None else 0):
            done = self.in_flight.popleft()
            self.scheduler.update(done, self.results[done.bucket].tolist())
        marks.append(time.perf_counter())
        schedule_s, pack_s, update_s = np.diff(marks).tolist()
        return schedule_s, pack_s, update_s

    def measure(
        self, name: str, repeats: int, before: Callable[[], None] = lambda: None
    ) -> dict[str, object]:
        """Medians of `repeats` steps; what `before` does before each is not timed."""
        gc.collect()
        gc.freeze()
        tokens_before = self.scheduler.stats.total_tokens
        times = []
        for _ in range(repeats):
            before()
            times.append(self.step())
        tokens = self.scheduler.stats.total_tokens - tokens_before
        gc.unfreeze()
        result: dict[str, object] = {"case": name, "tokens a step": round(tokens / repeats, 1)}
        for part, values in zip(PARTS, zip(*times, strict=True), strict=True):
            result[f"{part} us"] = round(statistics.median(values) * 1e6, 1)
        totals = [sum(parts) * 1e6 for parts in times]
        result["total us"] = round(statistics.median(totals), 1)
        result["p99 us"] = round(float(np.percentile(totals, 99)), 1)
        return result
