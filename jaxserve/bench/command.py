"""`jaxserve bench`: measure the engine, beside what other engines need for the same.

Every result is a row of a table on standard error and a JSON line on standard output, which names
device, versions, commit and command.
"""

from __future__ import annotations

import argparse
import importlib

from jaxserve.bench.peers import load_peers
from jaxserve.config import ConfigError, EngineConfig, add_flags

# The module of each kind; they load JAX.
MODULES = {
    "latency": "offline",
    "throughput": "offline",
    "serve": "serve",
    "step": "step",
    "host": "host",
}
HF_OUTPUT_TOKENS, HF_REPEATS = 64, 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `jaxserve bench`."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    latency = kinds.add_parser("latency", help="seconds of batches of few requests")
    throughput = kinds.add_parser(
        "throughput", help="tokens/s of batches of many requests, or beside transformers (--hf)"
    )
    for kind in (latency, throughput):
        kind.add_argument(
            "--cases",
            help="REQUESTSxINPUT/OUTPUT in tokens or mixN, separated by commas: 8x128/128,mix1000 "
            "(default: what peers were measured with; small ones on a CPU)",
        )
        kind.add_argument(
            "--suite",
            choices=sorted(load_peers().suites),
            help="all that peers were measured with of one model, its settings included",
        )
        kind.add_argument(
            "--repeats", type=_positive, help="runs; the median is reported (default: 1; --hf: 5)"
        )
    throughput.add_argument(
        "--hf",
        action="store_true",
        help="three small cases, in turn with Hugging Face transformers (torch)",
    )
    throughput.add_argument(
        "--output-tokens",
        type=_positive,
        help=f"tokens generated in the decode cases of --hf (default: {HF_OUTPUT_TOKENS})",
    )
    serve = kinds.add_parser(
        "serve", help="TTFT, TPOT and requests/s when requests arrive by chance"
    )
    serve.add_argument("--url", help="a server that runs, http://HOST:PORT, instead of --model")
    serve.add_argument(
        "--request-rate",
        type=_rate,
        nargs="+",
        default=[8.0],
        help="requests a second that arrive on average, or inf; one run each (default: 8)",
    )
    serve.add_argument("--num-requests", type=_positive, default=200, help="requests of a run")
    serve.add_argument("--input-tokens", type=_positive, default=512, help="of each request")
    serve.add_argument("--output-tokens", type=_positive, default=128, help="of each request")
    for kind in (latency, throughput, serve):
        kind.add_argument(
            "--budget-s",
            type=float,
            help="seconds this command may take: what does not fit is left out, and named",
        )
        kind.add_argument("--seed", type=int, default=0, help="of prompts and arrivals")
    step = kinds.add_parser("step", help="milliseconds of one decode step, by rows and context")
    step.add_argument("--rows", type=int, nargs="+", default=[1, 8], help="rows of the step")
    step.add_argument("--context", type=int, nargs="+", default=[128, 1024], help="tokens in KV")
    step.add_argument("--repeats", type=int, default=20, help="steps timed; median reported")
    host = kinds.add_parser("host", help="host cost of a step with the device faked, by rows")
    host.add_argument("--rows", type=_positive, nargs="+", default=[1, 8, 64, 256], help="rows")
    host.add_argument("--page-size", type=_positive, default=16, help="tokens per page")
    host.add_argument("--repeats", type=_positive, default=200, help="steps timed")
    for kind in (latency, throughput, serve, step):
        add_flags(kind, EngineConfig)


def run(args: argparse.Namespace) -> int:
    """Run one benchmark; prints tables to standard error and JSON lines to standard output."""
    name = MODULES[args.kind]
    if args.kind == "throughput":
        if args.hf:
            name = "beside_hf"
            args.output_tokens = args.output_tokens or HF_OUTPUT_TOKENS
            args.repeats = args.repeats or HF_REPEATS
            if args.cases or args.suite:
                raise ConfigError("--hf has its own cases; drop --cases and --suite")
        elif args.output_tokens is not None:
            raise ConfigError("--output-tokens belongs to --hf; name output tokens in --cases")
    return importlib.import_module(f"jaxserve.bench.{name}").run(args)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value
