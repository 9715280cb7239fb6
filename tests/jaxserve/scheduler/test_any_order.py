"""The scheduler against a fake device: any order of events, and single cases."""

from __future__ import annotations

import random
from typing import Any

import hypothesis
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxserve.request import FinishReason, InvalidRequest, Request, SamplingParams, Status
from jaxserve.scheduler.buckets import Bucket, make_buckets
from jaxserve.scheduler.page_pool import NoPagesLeft
from jaxserve.scheduler.scheduler import Scheduler

from .fake_device import VOCAB, Simulation, run_alone

ENDLESS = SamplingParams(max_tokens=None, ignore_eos=True)


def greedy(max_tokens: int | None) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0)


# ---- any order of events --------------------------------------------------------------------


class AnyOrder(RuleBasedStateMachine):
    """Requests come and go, steps are scheduled ahead of the results of others."""

    @initialize(
        num_ranks=st.integers(1, 2),
        page_size=st.integers(1, 4),
        num_pages=st.integers(2, 10),
        max_rows=st.integers(1, 5),
        more_tokens=st.integers(0, 12),
        max_model_len=st.integers(2, 24),
        depth=st.integers(1, 3),
        all_buckets=st.booleans(),
    )
    def start(
        self,
        num_ranks: int,
        page_size: int,
        num_pages: int,
        max_rows: int,
        more_tokens: int,
        max_model_len: int,
        depth: int,
        all_buckets: bool,
    ) -> None:
        max_tokens = max_rows + more_tokens
        self.simulation = Simulation(
            num_pages=num_pages,
            page_size=page_size,
            max_rows=max_rows,
            max_tokens=max_tokens,
            max_model_len=max_model_len,
            num_ranks=num_ranks,
            depth=depth,
            buckets=make_buckets(max_tokens, max_rows) if all_buckets else (),
        )

    @rule(
        prompt=st.lists(st.integers(0, VOCAB - 1), max_size=26),
        max_tokens=st.none() | st.integers(1, 12),
        eos_ids=st.frozensets(st.integers(0, VOCAB - 1), max_size=2),
        stop_ids=st.lists(st.integers(0, VOCAB - 1), max_size=1),
        ignore_eos=st.booleans(),
    )
    def add(self, prompt, max_tokens, eos_ids, stop_ids, ignore_eos) -> None:
        scheduler = self.simulation.scheduler
        sampling = SamplingParams(
            max_tokens=max_tokens, stop_token_ids=tuple(stop_ids), ignore_eos=ignore_eos
        )
        limit = scheduler.max_model_len
        if max_tokens is not None:
            limit = min(limit, len(prompt) + max_tokens)
        fits = 0 < len(prompt) < scheduler.max_model_len and (
            limit - 1 <= scheduler.num_pages * scheduler.page_size  # the last is never computed
        )
        if fits:
            self.simulation.add(prompt, sampling, eos_ids)
        elif max_tokens is not None:
            with pytest.raises(InvalidRequest):
                self.simulation.add(prompt, sampling, eos_ids)

    @precondition(lambda self: self.simulation.requests)
    @rule(index=st.integers(0))
    def abort(self, index: int) -> None:
        requests = self.simulation.requests
        request = requests[index % len(requests)]
        was_finished = request.is_finished
        assert self.simulation.scheduler.abort(request.id) == (not was_finished)
        assert request.is_finished
        assert was_finished or request.finish_reason is FinishReason.ABORT

    @precondition(lambda self: len(self.simulation.in_flight) < self.simulation.depth)
    @rule()
    def schedule(self) -> None:
        self.simulation.schedule()

    @precondition(lambda self: self.simulation.in_flight)
    @rule()
    def update(self) -> None:
        self.simulation.update()

    @rule(steps=st.integers(1, 8))
    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.simulation.step()

    @invariant()
    def is_consistent(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.scheduler.check_integrity()
            self.simulation.check_finished()

    def teardown(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.drain()
            self.simulation.check_finished()
            self.simulation.check_idle()


AnyOrder.TestCase.settings = settings(
    max_examples=200,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
TestAnyOrder = AnyOrder.TestCase


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_crowd_in_a_small_pool(num_ranks: int, depth: int) -> None:
    draw = random.Random(100 * num_ranks + depth)
    simulation = Simulation(
        num_pages=14,
        page_size=3,
        max_rows=6,
        max_tokens=12,
        max_model_len=40,
        num_ranks=num_ranks,
        depth=depth,
        buckets=make_buckets(12, 6),
    )
    for _ in range(300):
        prompt = [draw.randrange(VOCAB) for _ in range(draw.randint(1, 25))]
        eos_ids = {draw.randrange(VOCAB)} if draw.random() < 0.3 else ()
        simulation.add(prompt, greedy(draw.randint(1, 15)), eos_ids)
        for _ in range(draw.randint(0, 5)):
            simulation.step()
        if draw.random() < 0.2:
            simulation.scheduler.abort(draw.choice(simulation.requests).id)
    simulation.drain()
    simulation.check_finished()
    simulation.check_idle()
    reasons = [request.finish_reason for request in simulation.requests]
    assert simulation.scheduler.stats.total_preempted > 10
    assert min(map(reasons.count, (FinishReason.STOP, FinishReason.LENGTH))) > 20


# ---- single cases ---------------------------------------------------------------------------


def test_single_tokens_come_before_chunks_and_chunks_fill_the_step() -> None:
    simulation = Simulation(max_tokens=8, num_pages=20, depth=3)
    first = simulation.add([1, 2, 3], greedy(9))
    simulation.step()
    long = simulation.add([4] * 20, greedy(9))
    (rows,) = simulation.schedule().ranks
    assert [(row.request, row.start, row.num_new) for row in rows] == [(first, 3, 1), (long, 0, 7)]
    (rows,) = simulation.schedule().ranks
    assert [(row.request, row.start, row.num_new) for row in rows] == [(first, 4, 1), (long, 7, 7)]
    assert not rows[1].samples
    assert rows[0].token_on_device and not rows[1].token_on_device


def test_last_token_of_a_prompt_counts_as_a_single_token() -> None:
    simulation = Simulation(max_tokens=8, max_rows=2, num_pages=20)
    simulation.add([1] * 9, greedy(5))
    simulation.schedule()
    simulation.add([2] * 9, greedy(5))
    (rows,) = simulation.schedule().ranks
    assert [(row.start, row.num_new, row.token_on_device) for row in rows] == [
        (8, 1, False),
        (0, 7, False),
    ]


def test_several_prompts_share_a_step() -> None:
    simulation = Simulation(max_tokens=16, num_pages=20)
    for length in (5, 6, 9):
        simulation.add([1] * length, greedy(3))
    (rows,) = simulation.schedule().ranks
    assert [row.num_new for row in rows] == [5, 6, 5]
    assert [row.samples for row in rows] == [True, True, False]


@pytest.mark.parametrize("max_tokens", [1, 2])
def test_no_step_is_wasted_on_a_request_whose_end_is_known(max_tokens: int) -> None:
    simulation = Simulation(depth=2)
    simulation.add([1, 2], greedy(max_tokens))
    for _ in range(max_tokens):
        assert simulation.schedule() is not None
        if len(simulation.in_flight) == 2:
            simulation.update()
    assert simulation.schedule() is None
    simulation.drain()
    simulation.check_finished()


def test_context_limit_ends_a_request() -> None:
    simulation = Simulation(max_model_len=8)
    request = simulation.add([1, 2, 3], ENDLESS, {0, 1, 2})
    simulation.drain()
    assert len(request.tokens) == 8
    assert request.finish_reason is FinishReason.LENGTH


def test_end_tokens() -> None:
    tokens = run_alone(Request("a", [1, 2], 2, greedy(6)), 2, 100)
    end = tokens[4]
    cut = tokens[: tokens.index(end, 2) + 1]
    for sampling, eos_ids, expected, reason in (
        (greedy(6), {end}, cut, FinishReason.STOP),
        (SamplingParams(max_tokens=6, ignore_eos=True), {end}, tokens, FinishReason.LENGTH),
        (SamplingParams(max_tokens=6, stop_token_ids=(end,)), (), cut, FinishReason.STOP),
        (
            SamplingParams(max_tokens=6, stop_token_ids=(end,), ignore_eos=True),
            {end},
            cut,
            FinishReason.STOP,
        ),
    ):
        simulation = Simulation()
        request = simulation.add([1, 2], sampling, eos_ids)
        simulation.drain()
        assert (request.tokens, request.finish_reason) == (expected, reason)
        assert request.arrived_s <= request.first_token_s <= request.finished_s


def test_a_preempted_request_keeps_tokens_that_arrive_and_resumes() -> None:
    simulation = Simulation(num_pages=6, page_size=2, max_rows=2, depth=2)
    early = simulation.add([1, 2, 3], greedy(9))
    late = simulation.add([4, 5, 6], greedy(6))
    while simulation.schedule() and not simulation.scheduler.stats.total_preempted:
        if len(simulation.in_flight) == 2:
            simulation.update()
    assert (late.status, late.num_pending, late.num_computed) == (Status.WAITING, 1, 0)
    num_tokens = len(late.tokens)
    while late.num_pending:
        simulation.update()
    assert len(late.tokens) == num_tokens + 1
    assert late.status is Status.WAITING
    simulation.drain()
    simulation.check_finished()
    assert early.finished_s < late.finished_s


def test_the_latest_arrival_yields_its_pages() -> None:
    simulation = Simulation(num_pages=8, page_size=2, max_rows=3, max_model_len=16, depth=1)
    requests = [simulation.add([i, i + 1], greedy(12)) for i in range(3)]
    order = []
    while simulation.unfinished:
        simulation.step()
        order += [r for r in requests if r.is_finished and r not in order]
    assert order == requests
    assert simulation.scheduler.stats.total_preempted > 0
    simulation.check_finished()


def test_requests_spread_over_ranks() -> None:
    simulation = Simulation(num_ranks=2, num_pages=20)
    requests = [simulation.add([1] * n, greedy(4)) for n in (8, 2, 2, 2)]
    simulation.schedule()
    assert [request.rank for request in requests] == [0, 1, 1, 0]


def test_an_aborted_row_is_ignored_when_it_comes_back() -> None:
    simulation = Simulation()
    request = simulation.add([1, 2], greedy(9))
    other = simulation.add([3, 4], greedy(9))
    simulation.schedule()
    assert simulation.scheduler.abort(request.id)
    assert simulation.update() == [other]
    assert (request.tokens, request.finish_reason) == ([1, 2], FinishReason.ABORT)
    assert request.first_token_s is None
    assert not simulation.scheduler.abort(request.id)
    assert not simulation.scheduler.abort("unknown")


def test_an_id_is_free_again_when_its_request_has_ended() -> None:
    simulation = Simulation()
    old = simulation.add([1, 2], greedy(9))
    simulation.schedule()
    simulation.scheduler.abort(old.id)
    new = Request(old.id, [5], 1, greedy(3))
    simulation.scheduler.add(new)
    simulation.requests.append(new)
    simulation.drain()
    assert old.tokens == [1, 2]
    assert new.tokens == run_alone(new, 1, 32)


def test_stats_count() -> None:
    simulation = Simulation(num_pages=8, page_size=4, max_rows=1, num_ranks=2)
    for _ in range(3):
        simulation.add([1, 2, 3, 4, 5], greedy(2))
    assert simulation.scheduler.stats.num_waiting == 3
    simulation.schedule()
    stats = simulation.scheduler.stats
    assert (stats.num_waiting, stats.num_running) == (1, 2)
    assert (stats.num_pages, stats.num_free_pages) == (16, 12)
    assert (stats.total_steps, stats.total_tokens, stats.total_preempted) == (1, 10, 0)
    simulation.drain()
    assert simulation.scheduler.stats.total_tokens == 3 * 6


def test_new_buckets_are_used() -> None:
    simulation = Simulation(max_tokens=16, max_rows=4)
    simulation.add([1, 2], greedy(9))
    assert simulation.schedule().bucket == Bucket(16, 4)
    simulation.buckets = (Bucket(1, 1), Bucket(16, 4))
    simulation.scheduler.set_buckets(reversed(simulation.buckets))
    assert simulation.schedule().bucket == Bucket(1, 1)


def test_buckets_must_hold_a_full_step() -> None:
    simulation = Simulation(max_tokens=16, max_rows=4)
    with pytest.raises(ValueError, match="no bucket holds 16 tokens in 4 rows"):
        simulation.scheduler.set_buckets([Bucket(16, 2), Bucket(8, 4)])
    simulation.add([1, 2], greedy(9))
    assert simulation.schedule().bucket == Bucket(16, 4)


SIZES = {
    "num_pages": 8,
    "page_size": 4,
    "max_rows": 4,
    "max_tokens_per_step": 16,
    "max_model_len": 32,
    "num_ranks": 1,
}


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        ("num_pages", 0, 1),
        ("page_size", 0, 1),
        ("max_rows", 0, 1),
        ("max_tokens_per_step", 3, 4),
        ("max_model_len", 1, 2),
        ("num_ranks", 0, 1),
    ],
)
def test_impossible_sizes_are_refused(name: str, value: int, least: int) -> None:
    sizes: dict[str, Any] = SIZES | {name: value}
    with pytest.raises(ValueError, match=f"{name}={value} must be at least {least}"):
        Scheduler(**sizes, buckets=[Bucket(16, 4)])


def test_requests_that_can_never_run_are_refused() -> None:
    simulation = Simulation(num_pages=4, page_size=4, max_model_len=32)
    simulation.add([1], greedy(3))
    with pytest.raises(InvalidRequest, match="request id 'r0' is in use by another request"):
        simulation.scheduler.add(Request("r0", [1], 1, greedy(3)))
    with pytest.raises(InvalidRequest, match="the prompt has no tokens; send at least one") as e:
        simulation.add([], greedy(3))
    assert e.value.field == "prompt"
    with pytest.raises(
        InvalidRequest, match=r"32 tokens, but the context is 32 .*--context-length"
    ) as e:
        simulation.add([1] * 32, greedy(1))
    assert e.value.field == "prompt"
    with pytest.raises(NoPagesLeft, match=r"needs up to 5 pages of 4 .* has 4.*max_tokens") as e:
        simulation.add([1] * 16, greedy(2))
    assert e.value.field == "max_tokens"
    with pytest.raises(NoPagesLeft, match="shorten the prompt") as e:
        simulation.add([1] * 17, greedy(1))
    assert e.value.field == "prompt"
    simulation.add([1] * 16, greedy(1))  # just fits
    simulation.drain()
    simulation.check_finished()


def test_without_max_tokens_the_pool_is_the_limit() -> None:
    simulation = Simulation(num_pages=2, page_size=4, max_model_len=32)
    request = simulation.add([1] * 3, ENDLESS)
    simulation.drain()
    assert request.finish_reason is FinishReason.LENGTH
    assert len(request.tokens) == 9  # the last one needs no page


def test_updates_follow_the_order_of_the_steps() -> None:
    simulation = Simulation()
    simulation.add([1, 2], greedy(9))
    simulation.schedule()
    second = simulation.schedule()
    with pytest.raises(AssertionError, match="updates must follow the schedule"):
        simulation.scheduler.update(second, [[0]])
