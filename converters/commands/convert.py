"""`jaxserve convert SRC DST --to orbax|hf`: write a checkpoint in another format."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
import time

import rich.console
import rich.progress

LINE_INTERVAL_S = 10.0

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the two paths, the format, and what to do on the way."""
    parser.add_argument(
        "src", metavar="SRC", help="a folder, a .gguf file, a hub id, or 'demo' or 'gemma-270m'"
    )
    parser.add_argument("dst", metavar="DST", help="the folder to write")
    parser.add_argument("--to", required=True, choices=("orbax", "hf"), help="the format to write")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="convert the weights to it; without it each tensor keeps its own",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read everything back and compare it with SRC, bit by bit, before DST appears",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace DST when it is a checkpoint"
    )
    parser.add_argument(
        "--max-shard-bytes",
        type=int,
        metavar="N",
        help="size of the files of --to hf (default: 5 GB, or SRC's largest file if smaller)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--download-dir", help="where downloads are kept")


def run(args: argparse.Namespace) -> int:
    """Convert, say what was written, and return 0; errors are raised, and DST is then untouched."""
    converting = importlib.import_module("converters.convert")  # deferred: it imports JAX
    started_s = time.perf_counter()
    with ProgressBar() as progress:
        done = converting.convert(
            args.src,
            args.dst,
            args.to,
            dtype=args.dtype,
            verify=args.verify,
            overwrite=args.overwrite,
            revision=args.revision,
            download_dir=args.download_dir,
            max_shard_bytes=args.max_shard_bytes,
            progress=progress,
        )
    for name in done.dropped:
        logger.warning("left out, because the model does not use it: %s", name)
    verified = ", every one verified" if args.verify else ""
    print(
        f"{done.destination}: {done.num_tensors} tensors, {done.num_bytes / 1e9:.3f} GB"
        f"{verified} ({time.perf_counter() - started_s:.1f} s)"
    )
    return 0


class ProgressBar:
    """A `Progress` on standard error: a bar per stage on a terminal, else a line now and then."""

    def __init__(self) -> None:
        console = rich.console.Console(stderr=True)
        self._bars = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.DownloadColumn(),
            rich.progress.TransferSpeedColumn(),
            rich.progress.TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, rich.progress.TaskID] = {}
        self._next_line_s = 0.0

    def __enter__(self) -> ProgressBar:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._bars.disable:
            self._print_line(what, done, total)
            return
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what)
        self._bars.update(self._tasks[what], completed=done, total=total or None)

    def _print_line(self, what: str, done: int, total: int) -> None:
        now_s = time.perf_counter()
        if now_s < self._next_line_s and done != total:
            return
        self._next_line_s = now_s + LINE_INTERVAL_S
        of_total = f" of {total / 1e9:.3f}" if total else ""
        print(f"{what}: {done / 1e9:.3f}{of_total} GB", file=sys.stderr, flush=True)
