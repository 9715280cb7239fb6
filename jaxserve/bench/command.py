"""`jaxserve bench`: measure the engine, beside Hugging Face transformers where asked.

Every result is a row of a table and one JSON line that names device, versions, commit and command.
"""

from __future__ import annotations

import argparse
import importlib
import json

from jaxserve.config import EngineConfig, add_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `jaxserve bench`."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    throughput = kinds.add_parser(
        "throughput", help="tokens/s of prefill and decode through the engine"
    )
    throughput.add_argument(
        "--hf", action="store_true", help="measure Hugging Face transformers (torch) in turn"
    )
    throughput.add_argument("--repeats", type=int, default=5, help="runs; the median is reported")
    throughput.add_argument(
        "--output-tokens", type=int, default=64, help="tokens generated in the decode cases"
    )
    step = kinds.add_parser("step", help="milliseconds of one decode step, by rows and context")
    step.add_argument("--rows", type=int, nargs="+", default=[1, 8], help="rows of the step")
    step.add_argument("--context", type=int, nargs="+", default=[128, 1024], help="tokens in KV")
    step.add_argument("--repeats", type=int, default=20, help="steps timed; median reported")
    host = kinds.add_parser("host", help="host cost of a step with the device faked, by rows")
    host.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 256], help="rows")
    host.add_argument("--repeats", type=int, default=200, help="steps timed; median reported")
    for kind in (throughput, step):
        add_flags(kind, EngineConfig)


def run(args: argparse.Namespace) -> int:
    """Run one benchmark; prints a table to standard error and JSON lines to standard output."""
    kind = importlib.import_module(f"jaxserve.bench.{args.kind}")  # these load JAX
    report = importlib.import_module("jaxserve.bench.report")
    results = kind.run(args)
    report.table(results)
    facts = report.environment()
    for result in results:
        print(json.dumps({**result, **facts}), flush=True)
    return 0
