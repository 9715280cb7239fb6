"""Counts compilations, so that a server can prove that none happens after warm-up."""

from __future__ import annotations

import threading

import jax

EVENT = "/jax/core/compile/backend_compile_duration"


class CompileCounter:
    """How often XLA compiled anything in this process since `reset`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_s: float, **metadata: object) -> None:
        if event == EVENT:
            with self._lock:
                self._count += 1

    @property
    def count(self) -> int:
        return self._count

    def reset(self) -> None:
        with self._lock:
            self._count = 0
