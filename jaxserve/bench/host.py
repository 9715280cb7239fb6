"""What a step costs the host: scheduling, packing and taking tokens in, without a device."""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from jaxserve.engine.packing import SlotColumns, fill_rank
from jaxserve.engine.step import StepLayout
from jaxserve.request import Request, SamplingParams
from jaxserve.scheduler.buckets import make_buckets
from jaxserve.scheduler.scheduler import Scheduler

CONTEXT, PAGE_SIZE, MODEL_LEN = 1024, 64, 4096


def run(args: argparse.Namespace) -> list[dict[str, object]]:
    """`jaxserve bench host`: median microseconds of the parts of a decode step, by rows."""
    return [_measure(num_rows, args.repeats) for num_rows in args.rows]


def _measure(num_rows: int, repeats: int) -> dict[str, object]:
    pages_per_row = MODEL_LEN // PAGE_SIZE
    step_tokens = max(8192, num_rows * CONTEXT)
    scheduler = Scheduler(
        num_pages=num_rows * pages_per_row,
        page_size=PAGE_SIZE,
        max_rows=num_rows,
        max_tokens_per_step=step_tokens,
        max_model_len=MODEL_LEN,
        buckets=make_buckets(step_tokens, num_rows),
    )
    sampling = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=repeats + 8, ignore_eos=True)
    for index in range(num_rows):
        scheduler.add(Request(str(index), [7] * CONTEXT, CONTEXT, sampling))
    layouts: dict = {}
    columns = SlotColumns(num_rows)
    parts: dict[str, list[float]] = {"schedule_us": [], "pack_us": [], "update_us": []}
    while (batch := scheduler.schedule()) is not None:
        marks = [time.perf_counter()]
        scheduler.update(batch, [[11] * num_rows])
        marks.append(time.perf_counter())
        batch = scheduler.schedule()
        marks.append(time.perf_counter())
        if batch is None:
            break
        layout = layouts.setdefault(batch.bucket, StepLayout(batch.bucket, PAGE_SIZE))
        marks.append(time.perf_counter())
        vector = np.zeros(layout.size, np.int32)
        fill_rank(layout, vector, batch.ranks[0], columns)
        marks.append(time.perf_counter())
        scheduler.update(batch, [[11] * num_rows])
        parts["update_us"].append(marks[1] - marks[0])
        parts["schedule_us"].append(marks[2] - marks[1])
        parts["pack_us"].append(marks[4] - marks[3])
    medians = {name: statistics.median(values[1:]) * 1e6 for name, values in parts.items()}
    result: dict[str, object] = {"case": f"host {num_rows} rows", "rows": num_rows}
    result |= {name: round(value, 1) for name, value in medians.items()}
    result["total_us"] = round(sum(medians.values()), 1)
    return result
