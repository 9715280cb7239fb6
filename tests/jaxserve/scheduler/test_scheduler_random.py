"""The scheduler under any interleaving, against a device that remembers who wrote each KV cell.

The model here is a hash of all previous tokens, read back from the pages, so that one wrong, stale
or missing cell changes the text. Every schedule() is also checked against the promises of
scheduler.py: who must be in the batch, who may not overtake, and when a row may be left out.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxserve.request import FinishReason, InvalidRequest, Request, SamplingParams, Status
from jaxserve.scheduler.buckets import Bucket, choose, make_buckets
from jaxserve.scheduler.page_pool import NoPagesLeft
from jaxserve.scheduler.scheduler import Batch, Scheduled, Scheduler

VOCABULARY = 13
GARBAGE = 99  # what the device returns where nobody may look


def next_token(tokens: Sequence[int]) -> int:
    return hash(tuple(tokens)) % VOCABULARY


def run_alone(request: Request, longest: int) -> list[int]:
    """Return prompt and output of a request that has the machine for itself."""
    tokens = request.tokens[: request.num_prompt]
    while len(tokens) < longest:
        tokens.append(next_token(tokens))
        if tokens[-1] in request.sampling.stop_token_ids:
            break
        if tokens[-1] in request.eos_ids and not request.sampling.ignore_eos:
            break
    return tokens


class FakeDevice:
    """Runs steps in the order of schedule(); a cell holds (arrival, position, token)."""

    def __init__(self, num_ranks: int, num_pages: int, page_size: int, max_rows: int) -> None:
        self.page_size = page_size
        self.cells = np.full((num_ranks, num_pages, page_size, 3), -1)
        self.last_tokens = np.full((num_ranks, max_rows), GARBAGE)

    def run(self, batch: Batch) -> list[list[int]]:
        """Return the sampled tokens, padded to the bucket's rows as a real step pads them."""
        sampled = []
        for rank, rows in enumerate(batch.ranks):
            for row in rows:
                self._write(rank, row)
            tokens = [self._read_and_sample(rank, row) for row in rows]
            sampled.append(tokens + [GARBAGE] * (batch.bucket.rows - len(rows)))
        return sampled

    def _cell(self, rank: int, request: Request, position: int) -> np.ndarray:
        page, offset = divmod(position, self.page_size)
        return self.cells[rank, request.pages[page], offset]

    def _write(self, rank: int, row: Scheduled) -> None:
        request = row.request
        for position in range(row.start, row.start + row.num_new):
            if row.token_on_device:
                token = self.last_tokens[rank, request.row]
            else:
                token = request.tokens[position]
            self._cell(rank, request, position)[:] = request.arrival, position, token

    def _read_and_sample(self, rank: int, row: Scheduled) -> int:
        request = row.request
        positions = range(row.start + row.num_new)
        cells = np.array([self._cell(rank, request, position) for position in positions])
        assert (cells[:, 0] == request.arrival).all(), "another request wrote into its pages"
        assert (cells[:, 1] == positions).all(), "a page holds other positions"
        tokens = cells[:, 2].tolist()
        num_known = min(len(tokens), len(request.tokens))
        assert tokens[:num_known] == request.tokens[:num_known]
        if not row.samples:
            return GARBAGE
        token = next_token(tokens)
        self.last_tokens[rank, request.row] = token
        return token


class Engine:
    """Drives a scheduler and checks each of its decisions."""

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        max_rows: int,
        max_tokens: int,
        max_model_len: int,
        num_ranks: int,
    ) -> None:
        self.all_buckets = make_buckets(max_tokens, max_rows)
        self.buckets = self.all_buckets[-1:]
        self.scheduler = Scheduler(
            num_pages=num_pages,
            page_size=page_size,
            max_rows=max_rows,
            max_tokens_per_step=max_tokens,
            max_model_len=max_model_len,
            num_ranks=num_ranks,
            buckets=self.buckets,
        )
        self.num_ranks = num_ranks
        self.device = FakeDevice(num_ranks, num_pages, page_size, max_rows)
        self.in_flight: deque[tuple[Batch, list[list[int]]]] = deque()
        self.unfinished: dict[str, Request] = {}
        self.num_added = 0

    def longest(self, num_prompt: int, max_tokens: int | None) -> int:
        in_pages = self.scheduler.num_pages * self.scheduler.page_size
        asked = in_pages + 1 if max_tokens is None else num_prompt + max_tokens
        return min(asked, self.scheduler.max_model_len)

    def add(
        self, prompt: list[int], sampling: SamplingParams, eos_ids: Iterable[int] = ()
    ) -> Request:
        name = str(self.num_added)
        request = Request(name, list(prompt), len(prompt), sampling, frozenset(eos_ids))
        self.scheduler.add(request)
        self.num_added += 1
        self.unfinished[name] = request
        self.scheduler.check_integrity()
        return request

    def abort(self, name: str) -> None:
        request = self.unfinished.pop(name)
        num_tokens = len(request.tokens)
        assert self.scheduler.abort(name)
        assert not self.scheduler.abort(name)
        self.scheduler.check_integrity()
        assert request.finish_reason is FinishReason.ABORT
        longest = self.longest(request.num_prompt, request.sampling.max_tokens)
        assert request.tokens == run_alone(request, longest)[:num_tokens]

    def set_buckets(self, chosen: Sequence[Bucket]) -> None:
        self.buckets = tuple(sorted({*chosen, self.all_buckets[-1]}))
        self.scheduler.set_buckets(chosen if self.all_buckets[-1] in chosen else self.buckets)

    # ---- a step --------------------------------------------------------------------------------

    def schedule(self) -> bool:
        """Schedule and run a step; returns whether there was one."""
        before = Snapshot(self)
        batch = self.scheduler.schedule()
        self.scheduler.check_integrity()
        before.check(batch)
        if batch is None:
            assert self.in_flight or not self.unfinished, "work is left, but no step can come"
            return False
        self.in_flight.append((batch, self.device.run(batch)))
        return True

    def update(self) -> None:
        batch, sampled = self.in_flight.popleft()
        getting = [
            (row.request, token)
            for rows, tokens in zip(batch.ranks, sampled, strict=True)
            for row, token in zip(rows, tokens, strict=False)
            if row.samples and not row.request.is_finished
        ]
        touched = self.scheduler.update(batch, sampled)
        self.scheduler.check_integrity()
        assert touched == [request for request, _ in getting]
        for request, token in getting:
            assert request.tokens[-1] == token
            assert request.num_pending <= len(self.in_flight)
            if request.is_finished:
                self.check_finished(self.unfinished.pop(request.id))

    def check_finished(self, request: Request) -> None:
        longest = self.longest(request.num_prompt, request.sampling.max_tokens)
        assert request.tokens == run_alone(request, longest)
        ended = request.tokens[-1] in request.end_ids
        assert request.finish_reason is (FinishReason.STOP if ended else FinishReason.LENGTH)
        assert request.num_pending == 0

    def step(self, depth: int) -> None:
        """Schedule one step and leave at most `depth - 1` in flight."""
        if not self.schedule() and self.in_flight:
            self.update()
        while len(self.in_flight) >= depth:
            self.update()

    def drain(self, depth: int) -> None:
        """Finish everything, within the steps the earliest request needs each time."""
        most = sum(2 * request.max_len + 3 * depth for request in self.unfinished.values())
        num_steps = 0
        while self.scheduler.has_work:
            self.step(depth)
            num_steps += 1
            assert num_steps <= most + depth, f"not finished in {num_steps} steps"
        assert not self.unfinished
        stats = self.scheduler.stats
        assert stats.num_free_pages == stats.num_pages
        assert stats.num_running == stats.num_waiting == 0


class Snapshot:
    """What is known before schedule(), and what must then be true of its batch."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        requests = engine.unfinished.values()
        self.total = {r: len(r.tokens) + r.num_pending for r in requests}
        # Those whose last token is on its way hold a row until schedule(), but need no more.
        self.running = [r for r in requests if r.row >= 0 and self.total[r] < r.max_len]
        self.rank = {r: r.rank for r in self.running}
        self.computed = {r: r.num_computed for r in self.running}

    def check(self, batch: Batch | None) -> None:
        rows = {row.request: row for rank in batch.ranks for row in rank} if batch else {}
        # A request preempted on one rank may start again on another in the same step.
        kept = {r for r in self.running if r.row >= 0 and r.rank == self.rank[r]}
        if batch is not None:
            self._check_shape(batch, rows)
        for request, row in rows.items():
            self._check_row(row, self.computed[request] if request in kept else 0)
        for rank in range(self.engine.num_ranks):
            running = [r for r in self.running if self.rank[r] == rank]
            self._check_rank(running, kept, rows)
        self._check_queue(kept, rows)

    def _check_shape(self, batch: Batch, rows: dict[Request, Scheduled]) -> None:
        scheduler = self.engine.scheduler
        num_rows = [len(rank) for rank in batch.ranks]
        num_tokens = [sum(row.num_new for row in rank) for rank in batch.ranks]
        assert sum(num_rows) == len(rows) > 0, "a request is in the batch twice"
        assert max(num_tokens) <= scheduler.max_tokens_per_step
        assert batch.bucket == choose(
            self.engine.buckets,
            max(num_tokens),
            max(num_rows),
            decode_only=all(row.num_new == 1 for row in rows.values()),
        )
        for index, rank in enumerate(batch.ranks):
            is_single = [row.num_new == 1 for row in rank]
            assert is_single == sorted(is_single, reverse=True), "single tokens come first"
            slots = {row.request.row for row in rank}
            assert len(slots) == len(rank) and slots <= set(range(scheduler.max_rows))
            assert all(row.request.rank == index for row in rank)

    def _check_row(self, row: Scheduled, start: int) -> None:
        request = row.request
        total = self.total[request]
        stop = row.start + row.num_new
        assert not request.is_finished
        assert row.start == start
        assert start < stop == request.num_computed <= total < request.max_len
        assert row.samples == (stop == total)
        assert row.token_on_device == (start >= len(request.tokens))
        assert len(request.pages) * self.engine.scheduler.page_size >= stop
        if start == 0:
            assert total == len(request.tokens), "it starts before its token came back"

    def _check_rank(
        self, running: list[Request], kept: set[Request], rows: dict[Request, Scheduled]
    ) -> None:
        """Check those who ran on one rank; `running` is in order of arrival."""
        if not running:
            return
        scheduler, rank = self.engine.scheduler, self.rank[running[0]]
        num_kept = len(kept.intersection(running))
        assert set(running[:num_kept]) <= kept, "preempted before a later arrival was"
        assert running[0] in rows, "the earliest arrival must go on"
        num_tokens = sum(row.num_new for r, row in rows.items() if r.rank == rank)
        requests = self.engine.unfinished.values()
        num_pages = len({page for r in requests if r.rank == rank for page in r.pages})
        for request in running[:num_kept]:
            if request not in rows and self.total[request] - self.computed[request] == 1:
                assert request is running[num_kept - 1], "only the latest may wait for a page"
                assert num_pages == scheduler.num_pages
            elif request not in rows or not rows[request].samples:
                assert num_tokens == scheduler.max_tokens_per_step, "tokens were left"

    def _check_queue(self, kept: set[Request], rows: dict[Request, Scheduled]) -> None:
        requests = self.engine.unfinished.values()
        left = [r for r in requests if r.status is Status.WAITING]
        if not left:
            return
        first = left[0]
        assert all(r.arrival < first.arrival for r in rows if r not in kept), "overtaken"
        if not first.num_pending:
            used = {r.rank for r in requests if r.row >= 0}
            assert len(used) == self.engine.num_ranks, "an empty rank takes any request"


# ---- any interleaving ----------------------------------------------------------------------------

token_ids = st.integers(0, VOCABULARY - 1)
prompts = st.lists(token_ids, min_size=1, max_size=14)
samplings = st.builds(
    SamplingParams,
    max_tokens=st.none() | st.integers(1, 20),
    stop_token_ids=st.lists(token_ids, max_size=1),
    ignore_eos=st.booleans(),
)
eos_sets = st.sets(token_ids, max_size=1)


class Interleavings(RuleBasedStateMachine):
    """Requests come and go while up to three steps are in flight."""

    @initialize(
        num_pages=st.integers(3, 12),
        page_size=st.integers(1, 4),
        max_rows=st.integers(1, 4),
        spare_tokens=st.integers(0, 8),
        max_model_len=st.integers(8, 40),
        num_ranks=st.integers(1, 2),
    )
    def start(
        self,
        num_pages: int,
        page_size: int,
        max_rows: int,
        spare_tokens: int,
        max_model_len: int,
        num_ranks: int,
    ) -> None:
        self.engine = Engine(
            num_pages=num_pages,
            page_size=page_size,
            max_rows=max_rows,
            max_tokens=max_rows + spare_tokens,
            max_model_len=max_model_len,
            num_ranks=num_ranks,
        )

    @rule(prompt=prompts, sampling=samplings, eos_ids=eos_sets)
    def add(self, prompt: list[int], sampling: SamplingParams, eos_ids: set[int]) -> None:
        scheduler = self.engine.scheduler
        in_pages = scheduler.num_pages * scheduler.page_size
        longest = self.engine.longest(len(prompt), sampling.max_tokens)
        if len(prompt) >= scheduler.max_model_len:
            with pytest.raises(InvalidRequest, match="but the context is"):
                self.engine.add(prompt, sampling, eos_ids)
        elif max(len(prompt), longest - 1) > in_pages:
            with pytest.raises(NoPagesLeft, match=f"the pool has {scheduler.num_pages}"):
                self.engine.add(prompt, sampling, eos_ids)
        else:
            request = self.engine.add(prompt, sampling, eos_ids)
            assert request.max_len == longest

    @precondition(lambda self: self.engine.unfinished)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.engine.abort(data.draw(st.sampled_from(list(self.engine.unfinished))))

    @precondition(lambda self: len(self.engine.in_flight) < 3)
    @rule()
    def schedule(self) -> None:
        self.engine.schedule()

    @precondition(lambda self: self.engine.in_flight)
    @rule()
    def update(self) -> None:
        self.engine.update()

    @precondition(lambda self: self.engine.unfinished)
    @rule(num_steps=st.integers(1, 10))
    def run_overlapped(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.engine.step(depth=2)

    @rule(data=st.data())
    def set_buckets(self, data: st.DataObject) -> None:
        buckets = st.lists(st.sampled_from(self.engine.all_buckets), unique=True)
        self.engine.set_buckets(data.draw(buckets))

    @invariant()
    def has_work_while_anything_is_left(self) -> None:
        if hasattr(self, "engine"):
            engine = self.engine
            assert engine.scheduler.has_work == bool(engine.unfinished or engine.in_flight)

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.engine.drain(depth=2)


Interleavings.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, print_blob=True
)
TestInterleavings = Interleavings.TestCase


# ---- many requests -------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_200_requests_in_a_small_pool_get_the_tokens_they_get_alone(
    num_ranks: int, depth: int
) -> None:
    rng = random.Random(10 * num_ranks + depth)
    engine = Engine(
        num_pages=20, page_size=4, max_rows=8, max_tokens=24, max_model_len=72, num_ranks=num_ranks
    )
    engine.set_buckets(engine.all_buckets)
    num_aborted = 0
    while engine.num_added < 200:
        if rng.random() < 0.5:
            prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 40))]
            sampling = SamplingParams(max_tokens=rng.randint(1, 32), ignore_eos=rng.random() < 0.7)
            engine.add(prompt, sampling, eos_ids={rng.randrange(VOCABULARY)})
        if num_aborted < engine.num_added // 5 and engine.unfinished and rng.random() < 0.3:
            engine.abort(rng.choice(list(engine.unfinished)))
            num_aborted += 1
        engine.step(depth)
    engine.drain(depth)
    assert num_aborted >= 30
    assert engine.scheduler.stats.total_preempted >= 10
