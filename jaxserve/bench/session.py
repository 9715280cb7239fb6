"""What the benchmarks of an engine share: a budget of time, a warm engine, what it is set to."""

from __future__ import annotations

import argparse
import gc
import time
from typing import Any

from jaxserve.bench.peers import load_peers
from jaxserve.bench.report import Report
from jaxserve.config import EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.log import ProgressDisplay
from jaxserve.version import IMPORTED_AT_S

EMPTY_RUNS = 3  # of each bucket before anything is timed


class Budget:
    """Seconds this command may take, counted from its start; None: as many as it needs."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds

    @property
    def left_s(self) -> float:
        return float("inf") if self._seconds is None else self._seconds - since_start_s()

    @property
    def is_spent(self) -> bool:
        return self.left_s <= 0


def since_start_s() -> float:
    """Seconds since this process began to import us."""
    return time.time() - IMPORTED_AT_S


class Session:
    """An engine and the report of what is measured with it; a context manager.

    Args:
        args: of any kind of benchmark: --budget-s.
    """

    def __init__(self, config: EngineConfig, args: argparse.Namespace) -> None:
        self.progress = ProgressDisplay()
        self.budget = Budget(args.budget_s)
        self.engine = Engine(config, progress=self.progress, needs_tokenizer=False)
        self._ready_s = since_start_s()
        info = self.engine.model_info
        self.peer = load_peers().model_like(info.architecture, info.num_parameters)
        self.report = Report(settings_of(self.engine), self.peer)

    def warm_up(self) -> None:
        """Wait for every bucket and run each; the seconds since the start are the first result."""
        self.engine.wait_until_warm()
        self.engine.run_every_bucket(EMPTY_RUNS)
        all_s = since_start_s()
        gc.collect()
        gc.freeze()  # as the server does: what start-up made need not be looked at again
        row = {"s to ready": self._ready_s, "s to all buckets": all_s}
        facts = {
            "seconds": round(all_s, 2),
            "ready_s": round(self._ready_s, 2),
            "all_buckets_s": round(all_s, 2),
            "buckets": [str(bucket) for bucket in self.engine.runner.buckets],
            "compile_s": self.engine.stats()["compile_s"],
        }
        peers_s = self.peer.startup_s if self.peer else None
        self.report.add("start-up", "startup", row, facts, peers_s=peers_s)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.close()
        self.engine.close()
        self.report.close()


def settings_of(engine: Engine) -> dict[str, Any]:
    """What of an engine's settings decides how fast it is."""
    info, config = engine.model_info, engine.config
    return {
        "model": info.name,
        "architecture": info.architecture,
        "num_parameters": info.num_parameters,
        "dtype": info.dtype,
        "load_format": config.load_format,
        "tp_size": info.tp_size,
        "dp_size": info.dp_size,
        "context_length": info.max_model_len,
        "page_size": info.page_size,
        "num_pages": info.num_pages,
        "max_running_requests": info.max_running_requests,
        "overlap_schedule": not config.disable_overlap_schedule,
    }
