"""Tokens per second through the engine, and through Hugging Face transformers in the same run.

The two take turns, case by case and repeat by repeat, so that a noisy machine disturbs both alike.
"""

from __future__ import annotations

import argparse
import importlib
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from jaxserve.bench import report
from jaxserve.config import ConfigError, EngineConfig, from_args
from jaxserve.engine.engine import Engine
from jaxserve.log import ProgressDisplay
from jaxserve.request import SamplingParams


@dataclass(frozen=True)
class Case:
    """A batch of equal requests; what is timed is the prompt alone or the tokens after it."""

    name: str
    batch: int
    prompt: int
    output: int

    @property
    def is_prefill(self) -> bool:
        return self.output == 1

    @property
    def timed_tokens(self) -> int:
        return self.batch * (self.prompt if self.is_prefill else self.output - 1)


def cases(output_tokens: int) -> tuple[Case, ...]:
    return (
        Case("prefill 512", 1, 512, 1),
        Case("decode batch 1", 1, 128, output_tokens),
        Case("decode batch 8", 8, 128, output_tokens),
    )


def run(args: argparse.Namespace) -> int:
    """`jaxserve bench throughput --hf`."""
    config = from_args(EngineConfig, args)
    if config.load_format == "dummy":
        raise ConfigError("--load-format dummy: transformers loads a checkpoint's own weights")
    results = measure(config, repeats=args.repeats, output_tokens=args.output_tokens)
    for result in results:
        report.json_line(result)
    report.table(results)
    return 0


def measure(config: EngineConfig, *, repeats: int, output_tokens: int) -> list[dict[str, object]]:
    """Median tokens/s of every case, and the ratio to transformers."""
    with ProgressDisplay() as progress:
        engine = Engine(config, progress=progress, needs_tokenizer=False)
        engine.wait_until_warm()
        runners: dict[str, Callable[[Case, list[list[int]]], float]] = {
            "jaxserve": lambda case, prompts: _time_engine(engine, case, prompts)
        }
        reference = importlib.import_module("jaxserve.hf_reference")  # it loads torch
        timer = reference.HFTimer(
            config.model_path, revision=config.revision, download_dir=config.download_dir
        )
        runners["transformers"] = lambda case, prompts: timer.seconds(prompts, case.output)
        results = []
        draw = random.Random(0)
        vocab = engine.model_info.vocab_size
        for case in cases(output_tokens):
            seconds: dict[str, list[float]] = {name: [] for name in runners}
            for repeat in range(repeats + 1):  # the first one warms up and is not counted
                prompts = [
                    [draw.randrange(vocab) for _ in range(case.prompt)] for _ in range(case.batch)
                ]
                for name, measure in runners.items():
                    elapsed_s = measure(case, prompts)
                    if repeat:
                        seconds[name].append(elapsed_s)
                progress(case.name, repeat, repeats)
            results.append(_result(case, seconds))
        engine.close()
    return results


def _result(case: Case, seconds: dict[str, list[float]]) -> dict[str, object]:
    speed = {name: case.timed_tokens / statistics.median(s) for name, s in seconds.items()}
    result: dict[str, object] = {
        "case": case.name,
        "batch": case.batch,
        "prompt": case.prompt,
        "output": case.output,
    }
    result |= {f"{name} tok/s": round(value, 2) for name, value in speed.items()}
    result["ratio"] = round(speed["jaxserve"] / speed["transformers"], 2)
    return result


def _time_engine(engine: Engine, case: Case, prompts: list[list[int]]) -> float:
    """Seconds of the timed part: submission to first token, or first token to the last."""
    sampling = SamplingParams(temperature=0.0, max_tokens=case.output, ignore_eos=True)
    start_s = time.perf_counter()
    requests = [engine.add(p, sampling, f"bench-{i}") for i, p in enumerate(prompts)]
    while engine.has_work:
        engine.step()
    if case.is_prefill:
        return time.perf_counter() - start_s
    first_s = max(r.first_token_s or 0.0 for r in requests)
    last_s = max(r.finished_s or 0.0 for r in requests)
    return last_s - first_s
