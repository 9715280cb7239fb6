"""`jaxserve verify`: does a model compute what its authors' code computes?

The same prompts go through Hugging Face transformers (or come with stored outputs) and through this
engine: prefill, chunked prefill, one token at a time, and real generation.
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

from jaxserve.config import ConfigError, EngineConfig, add_flags, add_model, from_args, take_model
from jaxserve.log import ProgressDisplay
from jaxserve.verification.reference import NUM_PROMPTS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model, what to compare, and every flag of the engine."""
    add_model(parser)
    parser.add_argument(
        "--golden",
        type=Path,
        metavar="FILE",
        help="compare with outputs stored in an .npz file (also looked for in the model's folder)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        help="largest difference of a logit (default: 1e-3, with --golden 2e-4)",
    )
    parser.add_argument(
        "--prompts",
        type=_count,
        metavar="N",
        help=f"how many of the {NUM_PROMPTS} prompts, or of the stored ones (default: all)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=_count,
        default=64,
        metavar="N",
        help="tokens to generate after each prompt (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_flags(parser, EngineConfig)
    parser.set_defaults(dtype="float32")


def run(args: argparse.Namespace) -> int:
    """Print the comparison; return 0 when everything agrees, else 1."""
    take_model(args, "verify")
    config = from_args(EngineConfig, args)
    if config.load_format == "dummy":
        raise ConfigError("--load-format dummy: random weights have nothing to be compared with")
    # Deferred: JAX and torch should not delay `--help` and the checks above.
    verification = importlib.import_module("jaxserve.verification.run")
    report = importlib.import_module("jaxserve.verification.report")
    options = verification.VerifyOptions(
        golden=args.golden,
        num_prompts=args.prompts,
        max_new_tokens=args.max_new_tokens,
        tolerance=args.tolerance,
    )
    with ProgressDisplay() as display:
        result = verification.verify(config, options, display)
    if args.json:
        print(json.dumps(report.to_json(result), indent=2))
    else:
        report.print_report(result)
    return 0 if result.passes else 1


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value
