"""A device without a model, and a scheduler that is watched while it drives it.

`FakeDevice` keeps in every KV slot which request wrote it, for which position and token. It runs
steps in the order of their dispatch, as late as one likes, and checks that each row finds all of
its own tokens in its pages. Its "model" is a hash of those tokens, read from the pages.
`Simulation` is the engine's loop around it.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jaxserve.request import FinishReason, Request, SamplingParams, Status
from jaxserve.scheduler.buckets import Bucket, choose
from jaxserve.scheduler.scheduler import Batch, Scheduler

VOCAB = 12
GARBAGE = -7  # what the device returns for rows that do not sample


def next_token(tokens: Sequence[int]) -> int:
    """The model: any change in any token changes what follows."""
    return zlib.crc32(bytes(tokens)) % VOCAB


def run_alone(request: Request, num_prompt: int, max_model_len: int) -> list[int]:
    """The prompt and output of a request that has the device for itself."""
    tokens, sampling = list(request.tokens[:num_prompt]), request.sampling
    ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else request.eos_ids)
    most = max_model_len
    if sampling.max_tokens is not None:
        most = min(most, num_prompt + sampling.max_tokens)
    while len(tokens) < most:
        tokens.append(next_token(tokens))
        if tokens[-1] in ends:
            break
    return tokens


@dataclass(frozen=True)
class Row:
    """What a step knows of a row once it is dispatched: nothing that the host changes later."""

    id: str
    start: int
    stop: int
    known: tuple[int, ...] | None  # None: the one token is in last_tokens
    samples: bool
    pages: tuple[int, ...]
    slot: int


class FakeDevice:
    """Pages and last tokens of every rank, and the steps that wait to be run."""

    def __init__(self, num_ranks: int, num_pages: int, page_size: int, max_rows: int) -> None:
        self.page_size = page_size
        self.kv = [
            [[("nobody", -1, -1)] * page_size for _ in range(num_pages)] for _ in range(num_ranks)
        ]
        self.last_tokens = [[GARBAGE] * max_rows for _ in range(num_ranks)]
        self.queue: deque[list[list[Row]]] = deque()

    def dispatch(self, batch: Batch) -> None:
        """Queue a step, copying everything it needs, as an engine packs its arrays."""
        self.queue.append([[self._pack(row) for row in rows] for rows in batch.ranks])

    def _pack(self, row) -> Row:
        request, stop = row.request, row.start + row.num_new
        known = None if row.token_on_device else tuple(request.tokens[row.start : stop])
        assert known is None or len(known) == row.num_new, "a token is not known on the host"
        assert known is not None or row.num_new == 1
        assert len(request.pages) * self.page_size >= stop, "a page is missing"
        pages = tuple(request.pages)
        return Row(request.id, row.start, stop, known, row.samples, pages, request.row)

    def run(self) -> list[list[int]]:
        """Run the oldest step; returns its tokens, one per row of each rank."""
        step = self.queue.popleft()
        for rank, rows in enumerate(step):
            for row in rows:
                self._write(rank, row)
        return [[self._finish(rank, row) for row in rows] for rank, rows in enumerate(step)]

    def _write(self, rank: int, row: Row) -> None:
        tokens = (self.last_tokens[rank][row.slot],) if row.known is None else row.known
        for position, token in enumerate(tokens, row.start):
            page = row.pages[position // self.page_size]
            self.kv[rank][page][position % self.page_size] = (row.id, position, token)

    def _finish(self, rank: int, row: Row) -> int:
        places = [divmod(position, self.page_size) for position in range(row.stop)]
        read = [self.kv[rank][row.pages[page]][offset] for page, offset in places]
        assert [(id, position) for id, position, _ in read] == [
            (row.id, position) for position in range(row.stop)
        ], f"the pages of {row.id} hold {read}"
        if not row.samples:
            return GARBAGE
        token = next_token([token for _, _, token in read])
        self.last_tokens[rank][row.slot] = token
        return token


class Simulation:
    """The engine's loop with everything checked: up to `depth` steps are in flight."""

    def __init__(
        self,
        *,
        num_pages: int = 8,
        page_size: int = 4,
        max_rows: int = 4,
        max_tokens: int = 16,
        max_model_len: int = 32,
        num_ranks: int = 1,
        depth: int = 2,
        buckets: Iterable[Bucket] = (),
    ) -> None:
        self.buckets = tuple(sorted({*buckets, Bucket(max_tokens, max_rows)}))
        self.scheduler = Scheduler(
            num_pages=num_pages,
            page_size=page_size,
            max_rows=max_rows,
            max_tokens_per_step=max_tokens,
            max_model_len=max_model_len,
            num_ranks=num_ranks,
            buckets=self.buckets,
        )
        self.device = FakeDevice(num_ranks, num_pages, page_size, max_rows)
        self.depth = depth
        self.in_flight: deque[Batch] = deque()
        self.requests: list[Request] = []

    def add(
        self, prompt: Sequence[int], sampling: SamplingParams, eos_ids: Iterable[int] = ()
    ) -> Request:
        name = f"r{len(self.requests)}"
        request = Request(name, list(prompt), len(prompt), sampling, frozenset(eos_ids))
        self.scheduler.add(request)
        self.requests.append(request)
        return request

    @property
    def unfinished(self) -> list[Request]:
        return [request for request in self.requests if request.status is not Status.FINISHED]

    def schedule(self) -> Batch | None:
        """Schedule and dispatch one step."""
        waiting = [request for request in self.unfinished if request.status is Status.WAITING]
        before = {request.id: request.num_computed for request in self.unfinished}
        batch = self.scheduler.schedule()
        self.scheduler.check_integrity()
        self._check_progress(batch)
        if batch is None:
            return None
        self._check_batch(batch, before)
        self._check_first_come_first_served(waiting)
        self.device.dispatch(batch)
        self.in_flight.append(batch)
        return batch

    def update(self) -> list[Request]:
        """Run the oldest step on the device and take its tokens in."""
        batch = self.in_flight.popleft()
        sampled = self.device.run()
        expected = [
            (row.request, len(row.request.tokens), token)
            for rows, tokens in zip(batch.ranks, sampled, strict=True)
            for row, token in zip(rows, tokens, strict=True)
            if row.samples and row.request.status is not Status.FINISHED
        ]
        touched = self.scheduler.update(batch, sampled)
        self.scheduler.check_integrity()
        assert touched == [request for request, _, _ in expected]
        for request, length, token in expected:
            assert request.tokens[length:] == [token]
        return touched

    def step(self) -> None:
        """What an engine does: schedule, then collect what is too much in flight."""
        while len(self.in_flight) >= self.depth:
            self.update()
        batch = self.schedule()
        while len(self.in_flight) > (self.depth - 1 if batch else 0):
            self.update()

    def drain(self) -> int:
        """Step until all is done; returns the number of steps, which is bounded."""
        work = sum(self.scheduler.max_model_len for _ in self.unfinished)
        most = 2 * self.depth * (work + self.depth) + 10
        steps = 0
        while self.scheduler.has_work or self.in_flight:
            self.step()
            steps += 1
            assert steps <= most, f"not done after {steps} steps: {self.unfinished}"
        return steps

    def check_finished(self) -> None:
        """Assert that what finished has the tokens it would have had alone."""
        for request in self.requests:
            if request.finish_reason is None:
                continue
            alone = run_alone(request, request.num_prompt, self.scheduler.max_model_len)
            if request.finish_reason is FinishReason.ABORT:
                assert request.tokens == alone[: len(request.tokens)]
                continue
            assert request.tokens == alone
            ended = request.tokens[-1] in request.end_ids
            assert request.finish_reason is (FinishReason.STOP if ended else FinishReason.LENGTH)

    def check_idle(self) -> None:
        """Assert that nothing is held any more."""
        stats = self.scheduler.stats
        assert stats.num_free_pages == stats.num_pages
        assert (stats.num_waiting, stats.num_running) == (0, 0)
        assert not self.scheduler.has_work
        assert self.scheduler.schedule() is None

    def _check_batch(self, batch: Batch, before: dict[str, int]) -> None:
        scheduler = self.scheduler
        num_tokens = [sum(row.num_new for row in rows) for rows in batch.ranks]
        num_rows = [len(rows) for rows in batch.ranks]
        assert 0 < max(num_tokens) <= scheduler.max_tokens_per_step
        assert max(num_rows) <= scheduler.max_rows
        assert batch.bucket == choose(
            self.buckets,
            max(num_tokens),
            max(num_rows),
            decode_only=all(row.num_new == 1 for rows in batch.ranks for row in rows),
        )
        for index, rows in enumerate(batch.ranks):
            singles = [row.num_new == 1 for row in rows]
            assert singles == sorted(singles, reverse=True), "single tokens come first"
            assert len({row.request.row for row in rows}) == len(rows)
            for row in rows:
                request = row.request
                assert request.rank == index and request.status is Status.RUNNING
                assert row.start in (0, before[request.id]), "a gap in what is computed"
                assert request.num_computed == row.start + row.num_new
                known = len(request.tokens) + request.num_pending - row.samples
                assert row.samples == (row.start + row.num_new == known)
                assert request.num_pending <= self.depth

    def _check_first_come_first_served(self, waiting: list[Request]) -> None:
        started = [request.arrival for request in waiting if request.status is Status.RUNNING]
        left = [r.arrival for r in self.unfinished if r.status is Status.WAITING]
        assert not started or not left or max(started) < min(left), "a request was overtaken"

    def _check_progress(self, batch: Batch | None) -> None:
        """Assert that the first request that has something to compute computes it."""
        rows = {row.request.id for rows in batch.ranks for row in rows} if batch else set()
        for request in self.unfinished:  # in order of arrival
            if request.id in rows:
                return
            if len(request.tokens) + request.num_pending >= request.max_len:
                continue  # its last token is on the way
            assert request.status is Status.WAITING and request.num_pending, (
                f"{request.id} came first and got nothing"
            )
            return  # its tokens must come back before it starts again
