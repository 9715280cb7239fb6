"""Continuous batching: which tokens of which requests the next step computes.

There is no prefill and no decode mode. Each step computes, for every scheduled request, `num_new`
tokens from `num_computed` on: one for a request that generates, a chunk for a prompt. Steps may be
scheduled before the results of the one before are known:

    schedule() -> step n   | schedule() -> step n+1   | update(step n) | schedule() -> step n+2
    num_pending 0 -> 1     | input token of n+1 still   | token arrives,
                           | on the device              | num_pending 2 -> 1

Pages and row slots are reused the moment they are free. That is safe because the device runs steps
in order: whatever a stale row writes, the new owner's step overwrites later.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

from jaxserve.request import FinishReason, InvalidRequest, Request, Status
from jaxserve.scheduler.buckets import Bucket, choose
from jaxserve.scheduler.page_pool import NoPagesLeft, PagePool


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A request's part in a step: its tokens `start .. start + num_new`.

    Attributes:
        samples: the step samples the request's next token.
        token_on_device: the (single) input token was sampled by the step before and is read there.
    """

    request: Request
    start: int
    num_new: int
    samples: bool
    token_on_device: bool


@dataclass(frozen=True)
class Batch:
    """One step: the rows of every rank, rows of one token first, and the shape it runs in."""

    ranks: tuple[tuple[Scheduled, ...], ...]
    bucket: Bucket

    @property
    def num_tokens(self) -> int:
        return sum(row.num_new for rows in self.ranks for row in rows)


@dataclass(frozen=True)
class Stats:
    """A snapshot for metrics."""

    num_waiting: int
    num_running: int
    num_preemptions: int
    pages_free: int
    pages_total: int


class _Rank:
    """Pages, row slots and running requests (in order of arrival) of one data-parallel rank."""

    def __init__(self, num_pages: int, max_rows: int) -> None:
        self.pool = PagePool(num_pages)
        self.free_rows = list(range(max_rows))
        self.running: list[Request] = []


class Scheduler:
    """First come, first served, with preemption by recomputation.

    Args:
        num_pages, max_rows, max_tokens_per_step: of each rank.
        max_model_len: longest prompt plus output.
        buckets: must hold (max_tokens_per_step, max_rows); more may come with `set_buckets`.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        max_rows: int,
        max_tokens_per_step: int,
        max_model_len: int,
        num_ranks: int = 1,
        buckets: Sequence[Bucket] = (),
    ) -> None:
        self.page_size = page_size
        self.max_rows = max_rows
        self.max_tokens_per_step = max_tokens_per_step
        self.max_model_len = max_model_len
        self.num_pages = num_pages
        self._ranks = [_Rank(num_pages, max_rows) for _ in range(num_ranks)]
        self._waiting: list[Request] = []  # in order of arrival
        self._requests: dict[str, Request] = {}
        self._order = itertools.count()
        self._num_preemptions = 0
        self.set_buckets(buckets or (Bucket(max_tokens_per_step, max_rows),))

    def set_buckets(self, buckets: Sequence[Bucket]) -> None:
        """Replace the shapes that can run."""
        if not any(
            b.tokens >= self.max_tokens_per_step and b.rows >= self.max_rows for b in buckets
        ):
            raise ValueError(
                f"no bucket holds {self.max_tokens_per_step} tokens and {self.max_rows} rows: "
                f"{[str(b) for b in buckets]}"
            )
        self._buckets = tuple(buckets)

    # ---- requests in and out --------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            InvalidRequest: it is empty, too long, or its id is in use.
            NoPagesLeft: it could never have enough pages, even alone.
        """
        if request.id in self._requests:
            raise InvalidRequest(f"request id {request.id!r} is in use by another request")
        if not request.tokens:
            raise InvalidRequest("the prompt has no tokens; send at least one")
        if request.num_prompt >= self.max_model_len:
            raise InvalidRequest(
                f"the prompt has {request.num_prompt} tokens; the context is {self.max_model_len} "
                f"tokens for prompt and output. Shorten the prompt."
            )
        limit = self.max_model_len
        if request.sampling.max_tokens is not None:
            limit = min(limit, request.num_prompt + request.sampling.max_tokens)
        if self._num_pages(limit) > self.num_pages:
            raise NoPagesLeft(
                f"the request may need {self._num_pages(limit)} pages of {self.page_size} tokens, "
                f"the pool has {self.num_pages}. Shorten prompt or max_tokens, lower "
                f"--context-length or raise --mem-fraction-static."
            )
        request.order = next(self._order)
        request.arrival_s = time.perf_counter()
        self._requests[request.id] = request
        self._waiting.append(request)

    def abort(self, request_id: str) -> bool:
        """End a request now; False if it is unknown or has ended."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._finish(request, FinishReason.ABORT)
        return True

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    @property
    def stats(self) -> Stats:
        return Stats(
            num_waiting=len(self._waiting),
            num_running=sum(len(rank.running) for rank in self._ranks),
            num_preemptions=self._num_preemptions,
            pages_free=sum(rank.pool.num_free for rank in self._ranks),
            pages_total=self.num_pages * len(self._ranks),
        )

    # ---- a step ---------------------------------------------------------------------------------

    def schedule(self) -> Batch | None:
        """Decide the next step, or None if there is nothing to compute now."""
        plans = [self._schedule_running(rank) for rank in self._ranks]
        self._admit(plans)
        if not any(plan.num_tokens for plan in plans):
            return None
        bucket = choose(
            self._buckets,
            max(plan.num_tokens for plan in plans),
            max(plan.num_rows for plan in plans),
        )
        return Batch(tuple(tuple(plan.singles + plan.chunks) for plan in plans), bucket)

    def _schedule_running(self, rank: _Rank) -> _RankPlan:
        """Rows for the requests that run already: single tokens, then chunks of what is left."""
        plan = _RankPlan()
        chunked = []
        page_size = self.page_size
        for request in list(rank.running):
            if request.status is not Status.RUNNING:
                continue  # preempted below for the sake of an earlier one
            length = request.length
            if length - request.num_computed > 1:
                chunked.append(request)
                continue
            if self._ends_with(request, length):
                continue  # its last token is on the way
            if length > len(request.pages) * page_size and not self._grow(rank, request):
                continue
            plan.add(request, 1)
        for request in chunked:
            if request.status is Status.RUNNING and plan.num_tokens < self.max_tokens_per_step:
                plan.add(request, self.max_tokens_per_step - plan.num_tokens)
        return plan

    def _admit(self, plans: list[_RankPlan]) -> None:
        """Start waiting requests, in order, where a row, pages and tokens are left."""
        while self._waiting:
            request = self._waiting[0]
            if request.num_pending:
                return  # preempted with a token on the way: its prompt is not complete yet
            need = self._num_pages(request.length + 1)
            open_ranks = [
                index
                for index, (rank, plan) in enumerate(zip(self._ranks, plans, strict=True))
                if rank.free_rows
                and plan.num_tokens < self.max_tokens_per_step
                and rank.pool.num_free >= min(need, self.num_pages)
            ]
            if not open_ranks:
                return
            index = max(open_ranks, key=lambda i: (self._ranks[i].pool.num_free, -i))
            rank, plan = self._ranks[index], plans[index]
            self._waiting.pop(0)
            request.rank, request.row = index, heapq.heappop(rank.free_rows)
            request.pages = rank.pool.allocate(self._num_pages(request.length))
            request.status = Status.RUNNING
            bisect.insort(rank.running, request, key=_arrival)
            plan.add(request, self.max_tokens_per_step - plan.num_tokens)

    def update(self, batch: Batch, sampled: Sequence[Sequence[int]]) -> list[Request]:
        """Take in a step's tokens; returns the requests that got one.

        Args:
            sampled: per rank one token per row of `batch`; ignored in rows that do not sample.
        """
        touched = []
        now_s = time.perf_counter()
        for rows, tokens in zip(batch.ranks, sampled, strict=True):
            for row, token in zip(rows, tokens, strict=True):
                request = row.request
                if not row.samples or request.status is Status.FINISHED:
                    continue
                request.num_pending -= 1
                request.tokens.append(token)
                if request.first_token_s is None:
                    request.first_token_s = now_s
                reason = self._finish_reason(request, token)
                if reason is not None:
                    self._finish(request, reason)
                touched.append(request)
        return touched

    # ---- parts ----------------------------------------------------------------------------------

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def _ends_with(self, request: Request, length: int) -> bool:
        """Whether a request of `length` tokens is complete, whatever its last token is."""
        limit = request.sampling.max_tokens
        return length >= self.max_model_len or (
            limit is not None and length - request.num_prompt >= limit
        )

    def _finish_reason(self, request: Request, token: int) -> FinishReason | None:
        sampling = request.sampling
        if token in sampling.stop_token_ids or (
            token in request.eos_ids and not sampling.ignore_eos
        ):
            return FinishReason.STOP
        if self._ends_with(request, len(request.tokens)):
            return FinishReason.LENGTH
        return None

    def _grow(self, rank: _Rank, request: Request) -> bool:
        """Give a request one more page; the latest arrivals yield theirs if none is free.

        Only requests after `request` yield, and those have no row in this step yet. False if it
        had to yield itself.
        """
        while rank.pool.num_free == 0:
            victim = rank.running[-1]
            self._preempt(rank, victim)
            if victim is request:
                return False
        request.pages += rank.pool.allocate(1)
        return True

    def _preempt(self, rank: _Rank, request: Request) -> None:
        """Take a request's pages; it waits, in its old place, to be computed again."""
        self._num_preemptions += 1
        self._vacate(rank, request)
        request.num_computed = 0
        request.status = Status.WAITING
        bisect.insort(self._waiting, request, key=_arrival)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        if request.status is Status.RUNNING:
            self._vacate(self._ranks[request.rank], request)
        else:
            self._waiting.remove(request)
        request.status, request.finish_reason = Status.FINISHED, reason
        request.finished_s = time.perf_counter()
        del self._requests[request.id]

    def _vacate(self, rank: _Rank, request: Request) -> None:
        rank.pool.release(request.pages)
        heapq.heappush(rank.free_rows, request.row)
        del rank.running[bisect.bisect_left(rank.running, request.order, key=_arrival)]
        request.pages, request.row, request.rank = [], -1, -1

    def check_integrity(self) -> None:
        """Assert that pages and row slots are owned as recorded."""
        for rank in self._ranks:
            rank.pool.check_integrity([request.pages for request in rank.running])
            rows = [request.row for request in rank.running]
            assert sorted(rows + rank.free_rows) == list(range(self.max_rows)), "row slots leak"
            assert all(request.status is Status.RUNNING for request in rank.running)


class _RankPlan:
    """The rows of one rank while a step is being put together."""

    def __init__(self) -> None:
        self.singles: list[Scheduled] = []
        self.chunks: list[Scheduled] = []
        self.num_tokens = 0

    @property
    def num_rows(self) -> int:
        return len(self.singles) + len(self.chunks)

    def add(self, request: Request, max_tokens: int) -> None:
        """Schedule the next `max_tokens` tokens of a request, or as many as it has."""
        start, length = request.num_computed, request.length
        num_new = min(length - start, max_tokens)
        request.num_computed = start + num_new
        samples = request.num_computed == length
        row = Scheduled(request, start, num_new, samples, start >= len(request.tokens))
        request.num_pending += samples
        (self.singles if num_new == 1 else self.chunks).append(row)
        self.num_tokens += num_new


def _arrival(request: Request) -> int:
    return request.order
