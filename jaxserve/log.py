"""Log lines and progress on standard error; standard output belongs to a command's result."""

from __future__ import annotations

import logging
import sys
import time
from typing import TextIO

import rich.console
import rich.progress

LINE_INTERVAL_S = 5.0  # between progress lines where there is no terminal to draw a bar on
OUR_PACKAGES = ("jaxserve", "converters", "model_defs", "pallas_kernels")


class StderrHandler(logging.Handler):
    """Writes to whatever standard error is now: a progress bar redirects it while it is drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except (OSError, ValueError):  # closed: there is nowhere left to complain
            self.handleError(record)


def configure_logging(level: str) -> None:
    """Send our packages' log lines of `level` and above to standard error.

    Levels are those of `--log-level`. Calling it again replaces the earlier level. Other libraries'
    loggers are left as they are: they show warnings.
    """
    handler = StderrHandler()
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    )
    for name in OUR_PACKAGES:
        logger = logging.getLogger(name)
        logger.setLevel(level.upper())
        for earlier in [old for old in logger.handlers if isinstance(old, StderrHandler)]:
            logger.removeHandler(earlier)
        logger.addHandler(handler)


class ProgressDisplay:
    """Show how far long work is: bars on a terminal, a line every few seconds elsewhere.

    Calling it fits `converters.interface.Progress`: `display(what, done, total)`, any unit, total 0
    while unknown. Works from several threads. Use it as a context manager, or call `close()`.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._bars: rich.progress.Progress | None = None
        self._tasks: dict[str, rich.progress.TaskID] = {}
        self._started_s: dict[str, float] = {}
        self._line_s: dict[str, float] = {}
        if self._stream.isatty():
            self._bars = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(),
                rich.progress.TaskProgressColumn(),
                rich.progress.TimeElapsedColumn(),
                console=rich.console.Console(file=self._stream),
            )
            self._bars.start()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Report that `done` of `total` is reached in the stage called `what`."""
        if self._bars is None:
            self._print_line(what, done, total)
            return
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=None)
        self._bars.update(self._tasks[what], completed=done, total=total or None)

    def close(self) -> None:
        """Stop drawing; what was drawn stays on the screen."""
        if self._bars is not None:
            self._bars.stop()

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _print_line(self, what: str, done: int, total: int) -> None:
        now_s = time.perf_counter()
        started_s = self._started_s.setdefault(what, now_s)
        finished = total > 0 and done >= total
        if not finished and now_s - self._line_s.get(what, started_s - LINE_INTERVAL_S) < (
            LINE_INTERVAL_S
        ):
            return
        self._line_s[what] = now_s
        reached = f"{100 * done / total:.0f} %" if total > 0 else f"{done}"
        print(f"{what}: {reached} ({now_s - started_s:.1f} s)", file=self._stream, flush=True)
