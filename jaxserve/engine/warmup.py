"""Compiling every bucket behind the first one, with which the engine serves already."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from converters.interface import Progress
from jaxserve.engine.kv_cache import StepMemory
from jaxserve.engine.mappings import TooManyMappings
from jaxserve.engine.runner import Runner
from jaxserve.scheduler.buckets import Bucket

logger = logging.getLogger(__name__)

STACK_BYTES = 64 * 2**20  # XLA's passes recurse deeper than a thread's default stack allows
# On a CPU one compilation keeps every core busy, and serving wants some of them.
COMPILE_THREADS = {"cpu": 1, "tpu": 4, "gpu": 4}


def large_stack_pool(num_threads: int) -> ThreadPoolExecutor:
    """Threads that XLA can compile in."""
    before = threading.stack_size(STACK_BYTES)
    try:
        # The executor starts a thread per submitted task until it has enough: start them now,
        # while the stack size holds.
        pool = ThreadPoolExecutor(num_threads, thread_name_prefix="compile")
        barrier = threading.Barrier(num_threads)
        for ready in [pool.submit(barrier.wait) for _ in range(num_threads)]:
            ready.result()
        return pool
    finally:
        threading.stack_size(before)


class BackgroundCompiler:
    """Compiles buckets in threads and hands each over as soon as it is there.

    Args:
        on_ready: called from a compile thread with the bucket and its executable.
        fits: whether a step that needs this much memory can run; else it is left out.
        first: the bucket that serves already; it is stored once the first of `buckets` is there.
    """

    def __init__(
        self,
        runner: Runner,
        buckets: Sequence[Bucket],
        on_ready: Callable[[Bucket, object], None],
        progress: Progress | None,
        *,
        fits: Callable[[StepMemory], bool],
        first: Bucket,
    ) -> None:
        self._fits = fits
        self._runner = runner
        self._on_ready = on_ready
        self._progress = progress
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.total, self.done = len(buckets), 0
        self.error: BaseException | None = None
        self._start_s = time.perf_counter()
        platform = runner.model.rules.mesh.devices.flat[0].platform
        self._pool = large_stack_pool(COMPILE_THREADS.get(platform, 4))
        self._futures: list[Future] = [
            self._pool.submit(self._compile, bucket) for bucket in buckets[:1]
        ]
        # Stored by the same threads: a store must not slow down what the engine waits for.
        self._futures.append(self._pool.submit(self._save, first))
        self._futures += [self._pool.submit(self._compile, bucket) for bucket in buckets[1:]]

    def _compile(self, bucket: Bucket) -> None:
        if self._stop.is_set():
            return
        try:
            compiled, memory = self._runner.compile(bucket, self._runner.num_pages)
        except TooManyMappings as error:
            logger.warning("the step for %s is left out: %s", bucket, error)
        except BaseException as error:
            self.error = error
            logger.exception("compiling %s failed; larger buckets serve instead", bucket)
            return
        else:
            if self._fits(memory):
                self._on_ready(bucket, compiled)
            else:
                logger.warning(
                    "the step for %s is left out: beside the pool it needs %.2f GiB, over the "
                    "limit",
                    bucket,
                    memory.fixed / 2**30,
                )
        with self._lock:
            self.done += 1
            done = self.done
        if self._progress is not None:
            self._progress("compiling further buckets", done, self.total)
        if done == self.total:
            logger.info(
                "all %d further buckets compiled in %.1f s",
                done,
                time.perf_counter() - self._start_s,
            )

        self._save(bucket)

    def _save(self, bucket: Bucket) -> None:
        if not self._stop.is_set():
            self._runner.save_compiled(bucket)

    @property
    def is_done(self) -> bool:
        return all(future.done() for future in self._futures)

    def wait(self) -> None:
        """Block until every bucket is compiled; raises what a compilation raised."""
        for future in self._futures:
            future.result()
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        """Drop what has not started; wait for what has."""
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
