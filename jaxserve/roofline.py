"""`jaxserve roofline MODEL`: the least time a step can take on TPUs, without having one.

The step is compiled for a TPU slice; what it must move and compute is counted and divided by what
the chip can do.
"""

from __future__ import annotations

import argparse
import importlib

import rich.console
import rich.table

from jaxserve.config import ConfigError, configure_topologies, user_cache_dir
from jaxserve.scheduler.buckets import Bucket

CHIPS = ("v5e", "v6e", "v5p", "tpu7x")
POOL_CONTEXTS = 2  # pages of the pool, in rows of the full context asked for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `roofline`."""
    parser.add_argument("model", metavar="MODEL", help="hub id or folder; config.json is enough")
    parser.add_argument("--chips", nargs="+", default=CHIPS[:2], choices=CHIPS, help="generations")
    parser.add_argument("--tp-size", type=int, default=4, help="devices that share the model")
    parser.add_argument("--rows", type=int, default=64, help="rows of the step")
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[64, 2048],
        help="tokens of the step: one a row, and what is left is one prompt's beginning",
    )
    parser.add_argument("--context", type=int, default=1024, help="KV tokens of a decode row")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")


def run(args: argparse.Namespace) -> int:
    """Print the table; return 0."""
    if min(args.tokens) < args.rows:
        raise ConfigError(
            f"--tokens {min(args.tokens)} is less than --rows {args.rows}: every row has a token."
        )
    configure_topologies()
    roofline = importlib.import_module("jaxserve.engine.roofline")  # deferred: these load JAX
    aot = importlib.import_module("pallas_kernels.tpu_aot")
    config = roofline.read_config(args.model, args.revision, user_cache_dir())
    table = rich.table.Table(
        title=f"{config['architectures'][0]}, bfloat16, {args.tp_size} devices; of one device:"
    )
    for column in (
        *("chip", "step", "held GiB", "weights GB", "KV GB", "GFLOP", "attention GFLOP"),
        *("collectives", "MB", "memory ms", "compute ms", "ideal ms", "tokens/s"),
    ):
        table.add_column(column, justify="left" if column in ("chip", "step") else "right")
    for name in args.chips:
        chip = aot.CHIPS[name]
        try:
            devices = aot.topology_devices(chip.topology)
        except aot.NoTopology as error:
            raise ConfigError(str(error)) from error
        max_tokens = max(args.context, *args.tokens)
        runner = roofline.topology_runner(
            config, devices, args.tp_size, max_rows=args.rows, max_model_len=max_tokens
        )
        num_pages = POOL_CONTEXTS * args.rows * -(-args.context // runner.page_size)
        for tokens in args.tokens:
            bucket = Bucket(tokens, args.rows)
            compiled = roofline.compile_step(runner, bucket, num_pages)
            rows = roofline.batch_rows(bucket, args.context)
            table.add_row(
                name,
                str(bucket),
                *_cells(roofline.count(runner, compiled, bucket, rows), chip, tokens),
            )
    console = rich.console.Console()
    console.print(table)
    for name in args.chips:
        chip = aot.CHIPS[name]
        console.print(
            f"{name}: {chip.hbm_bytes_per_s / 1e9:.0f} GB/s, {chip.bf16_flops_per_s / 1e12:.0f} "
            f"TFLOP/s and {chip.hbm_bytes / 2**30:.1f} GiB a device ({chip.source})"
        )
    return 0


def _cells(counts, chip, tokens: int) -> list[str]:
    ideal_s = counts.ideal_s(chip)
    return [
        f"{counts.held_bytes / 2**30:.2f}",
        f"{counts.weight_bytes / 1e9:.3f}",
        f"{counts.kv_bytes / 1e9:.3f}",
        f"{counts.matmul_flops / 1e9:.1f}",
        f"{counts.attention_flops / 1e9:.1f}",
        str(counts.num_collectives),
        f"{counts.collective_bytes / 1e6:.1f}",
        f"{counts.memory_s(chip) * 1e3:.2f}",
        f"{counts.compute_s(chip) * 1e3:.2f}",
        f"{ideal_s * 1e3:.2f}",
        f"{tokens / ideal_s:,.0f}",
    ]
