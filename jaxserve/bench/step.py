"""Milliseconds of one decode step through the engine, by rows and by tokens in KV."""

from __future__ import annotations

import argparse
import statistics
import time

from jaxserve.bench import report
from jaxserve.config import EngineConfig, from_args
from jaxserve.engine.engine import Engine
from jaxserve.log import ProgressDisplay
from jaxserve.request import SamplingParams


def run(args: argparse.Namespace) -> int:
    """`jaxserve bench step`."""
    config = from_args(EngineConfig, args)
    results = measure_steps(config, args.rows, args.context, args.repeats)
    for result in results:
        report.json_line(result)
    report.table(results)
    return 0


def measure_steps(
    config: EngineConfig, rows: list[int], contexts: list[int], repeats: int
) -> list[dict[str, object]]:
    """Median time between two steps' results while `rows` requests of `context` tokens decode."""
    results = []
    with ProgressDisplay() as progress:
        engine = Engine(config, progress=progress, needs_tokenizer=False)
        engine.wait_until_warm()
        for context in contexts:
            for num_rows in rows:
                step_ms = _decode_ms(engine, num_rows, context, repeats)
                results.append(
                    {
                        "case": f"decode {num_rows} x {context}",
                        "rows": num_rows,
                        "context": context,
                        "step_ms": round(step_ms, 3),
                        "tokens_per_s": round(num_rows / step_ms * 1e3, 1),
                    }
                )
                progress("decode steps", len(results), len(rows) * len(contexts))
        engine.close()
    return results


def _decode_ms(engine: Engine, num_rows: int, context: int, repeats: int) -> float:
    sampling = SamplingParams(temperature=0.0, max_tokens=repeats + 4, ignore_eos=True)
    requests = [engine.add([1 + i] * context, sampling, f"step-{i}") for i in range(num_rows)]
    while any(r.num_output == 0 for r in requests):
        engine.step()
    times = []
    while engine.has_work:
        start_s = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start_s)
    return statistics.median(times[1 : repeats + 1]) * 1e3
