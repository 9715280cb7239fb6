"""Decide what each step computes: continuous batching over paged KV memory, without jax.

There are no prefill and decode modes. Each step computes, for each scheduled request, `num_new`
tokens from `num_computed` on. schedule() may be called for the next steps before update() has
brought the tokens of earlier ones; the device runs the steps in the order of schedule().

First come, first served, and nobody starves: on each rank the earliest arrival gets its tokens in
every step, because it may take the pages of all others, and no request overtakes the first one in
the queue.
"""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

from jaxserve.request import FinishReason, InvalidRequest, Request, Status
from jaxserve.scheduler.buckets import Bucket, choose
from jaxserve.scheduler.page_pool import NoPagesLeft, PagePool

_arrival = attrgetter("arrival")
_new_tuple = tuple.__new__


class Scheduled(NamedTuple):
    """One row of a batch: compute `num_new` tokens of a request from position `start` on.

    A NamedTuple, not a frozen dataclass, because one is made per row and step.
    """

    request: Request
    start: int
    num_new: int
    samples: bool  # these are the last tokens known, so the step samples the next one
    # The one input token is what an earlier step sampled into the request's row slot. Not
    # necessarily the step before: a row that waits for a page is left out, and keeps its slot.
    token_on_device: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """One step: the rows of each rank, those with one new token first, and the shape to run it in.

    The rows' `request.pages` and `request.row` hold until the next call of the scheduler.
    """

    ranks: tuple[tuple[Scheduled, ...], ...]
    bucket: Bucket


@dataclass(frozen=True)
class SchedulerStats:
    """Numbers of this moment, over all ranks; totals count from the start."""

    num_waiting: int
    num_running: int
    num_pages: int
    num_free_pages: int
    total_steps: int
    total_tokens: int  # computed by these steps, padding not counted
    total_bucket_tokens: int  # the same with padding
    total_preempted: int


class _Rank:
    """The pages and row slots of one data-parallel rank, and who has them."""

    __slots__ = ("ended", "free_rows", "index", "num_growing", "pool", "running")

    def __init__(self, index: int, num_pages: int, max_rows: int) -> None:
        self.index = index
        self.pool = PagePool(num_pages)
        self.free_rows = list(range(max_rows - 1, -1, -1))
        self.running: list[Request] = []  # by arrival
        self.num_growing = 0  # of these, the ones that generate
        self.ended: list[Request] = []  # their last token is scheduled; pages go at the next step

    def room(self, num_pages: int) -> tuple[int, int] | None:
        """Return (free pages, free rows) if a request of `num_pages` may start here, else None.

        It may when one page for each running row that generates is left over. Otherwise it would
        soon be preempted by them, and all its work done again.
        """
        num_free = self.pool.num_free
        if not self.free_rows or num_free < num_pages + self.num_growing:
            return None
        return num_free, len(self.free_rows)

    def admit(self, request: Request, num_pages: int) -> None:
        request.pages = self.pool.allocate(num_pages)
        request.rank = self.index
        request.row = self.free_rows.pop()
        request.status = Status.RUNNING
        insort(self.running, request, key=_arrival)
        self.num_growing += not request.prefill_only

    def release(self, request: Request) -> None:
        """Free a running request's pages and row slot at once."""
        del self.running[_find(self.running, request)]
        self.num_growing -= not request.prefill_only
        self.pool.release(request.pages)
        self.free_rows.append(request.row)
        request.pages = []
        request.rank = request.row = -1


class _Plan:
    """The rows of one rank in the batch being built."""

    __slots__ = ("chunks", "rank", "single", "tokens_left")

    def __init__(self, rank: _Rank, tokens_left: int) -> None:
        self.rank = rank
        self.tokens_left = tokens_left
        self.single: list[Scheduled] = []  # rows with one new token
        self.chunks: list[Scheduled] = []

    def compute_one(self, request: Request) -> None:
        """Add the one token of a request that is left to be computed.

        The same as `compute` then does, for the rows that most steps consist of.
        """
        start = request.num_computed
        request.num_computed = total = start + 1
        request.num_pending += 1
        self.tokens_left -= 1
        if total + 1 >= request.max_len or request.prefill_only:
            self.rank.ended.append(request)
        # What `Scheduled(...)` calls, without the call around it.
        row = _new_tuple(Scheduled, (request, start, 1, True, start >= len(request.tokens)))
        self.single.append(row)

    def compute(self, request: Request) -> None:
        """Add as many of the request's tokens as this step has left, at least one."""
        start = request.num_computed
        num_known = len(request.tokens)
        total = num_known + request.num_pending
        num_new = min(total - start, self.tokens_left)
        self.tokens_left -= num_new
        request.num_computed = start + num_new
        samples = request.num_computed == total
        if samples:
            request.num_pending += 1
            if request.prefill_only or total + 1 >= request.max_len:
                self.rank.ended.append(request)
        rows = self.single if num_new == 1 else self.chunks
        rows.append(Scheduled(request, start, num_new, samples, start >= num_known))


class Scheduler:
    """Queue, pages and row slots of all requests.

    Sizes are per rank: num_pages pages of page_size tokens, max_rows running requests,
    max_tokens_per_step tokens. max_model_len bounds prompt and output together.

    Raises:
        ValueError: a size is impossible, or no bucket is large enough.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        max_rows: int,
        max_tokens_per_step: int,
        max_model_len: int,
        buckets: Iterable[Bucket],
        num_ranks: int = 1,
    ) -> None:
        problems = [
            f"{name}={value} must be at least {least}"
            for name, value, least in (
                ("num_pages", num_pages, 1),
                ("page_size", page_size, 1),
                ("max_rows", max_rows, 1),
                ("max_tokens_per_step", max_tokens_per_step, max(1, max_rows)),
                ("max_model_len", max_model_len, 2),
                ("num_ranks", num_ranks, 1),
            )
            if value < least
        ]
        if problems:
            raise ValueError("; ".join(problems) + ".")
        self.num_pages = num_pages
        self.page_size = page_size
        self.max_rows = max_rows
        self.max_tokens_per_step = max_tokens_per_step
        self.max_model_len = max_model_len
        self._ranks = [_Rank(index, num_pages, max_rows) for index in range(num_ranks)]
        self._requests: dict[str, Request] = {}  # all that are not finished
        self._waiting: list[Request] = []  # by arrival
        self._in_flight: deque[Batch] = deque()
        self._num_arrived = 0
        self._total_steps = 0
        self._total_tokens = 0
        self._total_bucket_tokens = 0
        self._total_preempted = 0
        self.set_buckets(buckets)

    @property
    def has_work(self) -> bool:
        """Whether a request is not finished or a step not yet updated."""
        return bool(self._requests or self._in_flight)

    @property
    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            num_waiting=len(self._waiting),
            num_running=sum(len(rank.running) for rank in self._ranks),
            num_pages=self.num_pages * len(self._ranks),
            num_free_pages=sum(rank.pool.num_free for rank in self._ranks),
            total_steps=self._total_steps,
            total_tokens=self._total_tokens,
            total_bucket_tokens=self._total_bucket_tokens,
            total_preempted=self._total_preempted,
        )

    def set_buckets(self, buckets: Iterable[Bucket]) -> None:
        """Choose from these buckets from now on.

        Raises:
            ValueError: none of them holds a full step; the old ones stay.
        """
        ordered = tuple(sorted(buckets))
        choose(ordered, self.max_tokens_per_step, self.max_rows, decode_only=False)
        self._buckets = ordered

    # ---- requests come and go ------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Put a new request at the end of the queue.

        Raises:
            InvalidRequest: it is empty, too long, or its id is in use.
            NoPagesLeft: it could need more pages than one rank has.
        """
        assert request.status is Status.WAITING and request.num_output == 0, "not a new request"
        request.max_len = self._longest(request)
        request.arrival = self._num_arrived
        self._num_arrived += 1
        self._requests[request.id] = request
        self._waiting.append(request)

    def abort(self, request_id: str) -> bool:
        """Finish a request now; returns False if there is none of this id."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._finish(request, FinishReason.ABORT, time.perf_counter())
        return True

    def _longest(self, request: Request) -> int:
        """Return the most tokens a request may reach, prompt and output together."""
        num_prompt = request.num_prompt
        max_tokens = request.sampling.max_tokens
        if request.id in self._requests:
            raise InvalidRequest(f"request id {request.id!r} is in use by another request.")
        if num_prompt == 0:
            raise InvalidRequest("the prompt has no tokens; send at least one.", field="prompt")
        if num_prompt + (not request.prefill_only) > self.max_model_len:
            together = "" if request.prefill_only else ", prompt and output together"
            raise InvalidRequest(
                f"the prompt has {num_prompt} tokens, but the context is {self.max_model_len} "
                f"tokens{together}. Shorten the prompt or raise --context-length.",
                field="prompt",
            )
        in_pages = self.num_pages * self.page_size
        if request.prefill_only:
            if num_prompt > in_pages:
                raise NoPagesLeft(
                    f"the text needs {self._pages_for(num_prompt)} pages of {self.page_size} "
                    f"tokens, the pool has {self.num_pages}. Shorten it, or raise "
                    "--mem-fraction-static or --max-total-tokens.",
                    field="prompt",
                )
            return num_prompt
        # The last token of all is never computed, so it needs no place in a page.
        if max_tokens is None:
            longest = min(self.max_model_len, max(in_pages, num_prompt) + 1)
        else:
            longest = min(self.max_model_len, num_prompt + max_tokens)
        if longest - 1 > in_pages:
            fault = "max_tokens" if num_prompt <= in_pages else "prompt"
            raise NoPagesLeft(
                f"the request needs up to {self._pages_for(longest - 1)} pages of {self.page_size} "
                f"tokens ({num_prompt} of the prompt, max_tokens={max_tokens}), the pool has "
                f"{self.num_pages}. Lower max_tokens, shorten the prompt, or raise "
                "--mem-fraction-static or --max-total-tokens.",
                field=fault,
            )
        return longest

    def _finish(self, request: Request, reason: FinishReason, now_s: float) -> None:
        """Finish a request in any state; its rows in flight are ignored when they come back."""
        if request.row >= 0:
            self._ranks[request.rank].release(request)
        elif request.status is Status.WAITING:
            del self._waiting[_find(self._waiting, request)]
        request.status = Status.FINISHED
        request.finish_reason = reason
        request.finished_s = now_s
        request.num_pending = 0
        del self._requests[request.id]

    # ---- a step --------------------------------------------------------------------------------

    def schedule(self) -> Batch | None:
        """Build the next step, or return None when nothing can be computed now.

        With work left, None means that tokens must come back first: call update(), then again.
        """
        plans = [self._continue_running(rank) for rank in self._ranks]
        if self._waiting:
            self._admit_waiting(plans)
        num_tokens = [self.max_tokens_per_step - plan.tokens_left for plan in plans]
        if not any(num_tokens):
            return None
        ranks = tuple((*plan.single, *plan.chunks) for plan in plans)
        decode_only = not any(plan.chunks for plan in plans)
        num_rows = max(map(len, ranks))
        bucket = choose(self._buckets, max(num_tokens), num_rows, decode_only=decode_only)
        batch = Batch(ranks, bucket)
        self._in_flight.append(batch)
        self._total_steps += 1
        self._total_tokens += sum(num_tokens)
        self._total_bucket_tokens += bucket.tokens * len(ranks)
        return batch

    def update(self, batch: Batch, sampled: Sequence[Sequence[int]]) -> list[Request]:
        """Take the tokens a step has sampled; returns the requests that got one.

        A prefill-only request gets none; it is returned when its last token was computed.

        batch: the oldest one not yet updated.
        sampled: for each rank one token (an int) per row, in order; padding may follow, and what
            stands at a row that does not sample is ignored, as are rows of requests finished
            meanwhile.
        """
        assert self._in_flight and self._in_flight[0] is batch, "updates must follow the schedule"
        self._in_flight.popleft()
        now_s, finished = time.perf_counter(), Status.FINISHED
        touched: list[Request] = []
        touch = touched.append
        for rows, tokens in zip(batch.ranks, sampled, strict=True):
            assert len(tokens) >= len(rows), f"{len(tokens)} tokens for {len(rows)} rows"
            for (request, _, _, samples, _), token in zip(rows, tokens, strict=False):
                if not samples or request.status is finished:
                    continue
                touch(request)
                if request.prefill_only:
                    self._finish(request, FinishReason.STOP, now_s)
                    continue
                known = request.tokens
                known.append(token)
                request.num_pending -= 1
                if request.first_token_s is None:
                    request.first_token_s = now_s
                if token in request.end_ids:
                    self._finish(request, FinishReason.STOP, now_s)
                elif len(known) >= request.max_len:
                    self._finish(request, FinishReason.LENGTH, now_s)
        return touched

    def _continue_running(self, rank: _Rank) -> _Plan:
        """Plan the rows of the running requests: one token each first, then longer chunks."""
        for request in rank.ended:
            if request.row >= 0:
                rank.release(request)
        rank.ended.clear()
        plan = _Plan(rank, self.max_tokens_per_step)
        longer = []
        page_size, compute_one = self.page_size, plan.compute_one
        for request in rank.running:  # preemption shortens the list at its end
            start = request.num_computed
            if len(request.tokens) + request.num_pending - start > 1:
                longer.append(request)
            elif start < len(request.pages) * page_size or self._grow(rank, request):
                compute_one(request)
        for request in longer:
            if plan.tokens_left == 0:
                break
            plan.compute(request)
        return plan

    def _grow(self, rank: _Rank, request: Request) -> bool:
        """Give a running request one more page, preempting later arrivals if none is free.

        The latest arrival itself waits, with all it has, and False is returned: others will
        finish and free pages, or one of them will need its pages and preempt it then.
        """
        while rank.pool.num_free == 0:
            latest = rank.running[-1]
            if latest is request:
                return False
            self._preempt(latest)
        request.pages += rank.pool.allocate(1)
        return True

    def _preempt(self, request: Request) -> None:
        """Take everything from a running request and put it back into the queue."""
        self._ranks[request.rank].release(request)
        request.num_computed = 0
        request.status = Status.WAITING
        insort(self._waiting, request, key=_arrival)
        self._total_preempted += 1

    def _admit_waiting(self, plans: list[_Plan]) -> None:
        """Start waiting requests in order of arrival, each on the rank with the most room.

        A request gets the pages of all its tokens at once, so that only rows which generate need
        more. One that has to wait stops those behind it, as does a preempted one whose last token
        is still on the device.
        """
        waiting = self._waiting
        while waiting and not waiting[0].num_pending:
            request = waiting[0]
            num_pages = self._pages_for(len(request.tokens))
            best, best_room = None, (-1, -1)
            for plan in plans:
                room = plan.rank.room(num_pages) if plan.tokens_left else None
                if room is not None and room > best_room:
                    best, best_room = plan, room
            if best is None:
                return
            del waiting[0]
            best.rank.admit(request, num_pages)
            best.compute(request)

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    # ---- checks --------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Assert that pages, row slots, queue and requests agree; slow, for tests."""
        for rank in self._ranks:
            running = rank.running
            rank.pool.check_integrity(request.pages for request in running)
            rows = [*rank.free_rows, *(request.row for request in running)]
            assert sorted(rows) == list(range(self.max_rows)), f"row slots in use or free: {rows}"
            assert rank.num_growing == sum(not request.prefill_only for request in running)
            for request in running:
                assert request.rank == rank.index and request.status is Status.RUNNING
                assert len(request.pages) >= self._pages_for(request.num_computed)
        queues = [self._waiting, *(rank.running for rank in self._ranks)]
        for queue in queues:
            assert queue == sorted(queue, key=_arrival), "a queue is out of order"
            assert all(self._requests.get(request.id) is request for request in queue)
        for request in self._waiting:
            assert request.status is Status.WAITING and request.row == -1
            assert not request.pages and request.num_computed == 0


def _find(queue: list[Request], request: Request) -> int:
    """Return the index of a request in a list that is ordered by arrival."""
    index = bisect_left(queue, request.arrival, key=_arrival)
    assert queue[index] is request, f"request {request.id!r} is not in this queue"
    return index
