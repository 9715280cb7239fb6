"""`jaxserve bench`: measure the engine, beside Hugging Face transformers where asked.

Every result is a row of a table and one JSON line that names device, versions, commit and command.
"""

from __future__ import annotations

import argparse
import json
import sys

from jaxserve.config import EngineConfig, add_flags, from_args


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
    if args.kind == "host":
        from jaxserve.bench.host import run_host

        results = run_host(args.rows, args.repeats)
    elif args.kind == "step":
        from jaxserve.bench.step import run_step

        results = run_step(from_args(EngineConfig, args), args.rows, args.context, args.repeats)
    else:
        from jaxserve.bench.throughput import run_throughput

        results = run_throughput(
            from_args(EngineConfig, args),
            with_hf=args.hf,
            repeats=args.repeats,
            output_tokens=args.output_tokens,
        )
    from jaxserve.bench.report import environment, table

    facts = environment()
    table(results)
    for result in results:
        print(json.dumps({**result, **facts}), flush=True)
    sys.stdout.flush()
    return 0
