"""Counts compilations: none may happen after warm-up, and only a fresh one may be stored."""

from __future__ import annotations

import threading

import jax

EVENT = "/jax/core/compile/backend_compile_duration"
MISS_EVENT = "/jax/compilation_cache/cache_misses"


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


class _Misses(threading.local):
    """How often this thread compiled what JAX's persistent cache did not hold."""

    count = 0

    def listen(self, event: str, **metadata: object) -> None:
        if event == MISS_EVENT:
            self.count += 1


_misses = _Misses()
jax.monitoring.register_event_listener(_misses.listen)


def num_fresh_compiles() -> int:
    """How often XLA really compiled in this thread, as far as JAX's persistent cache tells.

    On a CPU, an executable that came from that cache serializes into one that cannot run (seen
    with jaxlib 0.10.2: "Function ... not found"), so what is stored must have been compiled here.
    """
    return _misses.count
