"""Who gets tokens, pages and row slots first, who has to give them back, and when."""

from __future__ import annotations

import pytest

from jaxserve.request import FinishReason, Request, SamplingParams, Status
from jaxserve.scheduler.buckets import make_buckets
from jaxserve.scheduler.scheduler import Batch, Scheduler

EOS = 0


def make_scheduler(
    *, num_pages: int = 100, max_rows: int = 4, max_tokens: int = 16, num_ranks: int = 1
) -> Scheduler:
    return Scheduler(
        num_pages=num_pages,
        page_size=4,
        max_rows=max_rows,
        max_tokens_per_step=max_tokens,
        max_model_len=64,
        buckets=make_buckets(max_tokens, max_rows),
        num_ranks=num_ranks,
    )


def add(scheduler: Scheduler, name: str, num_prompt: int, max_tokens: int = 10) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens)
    request = Request(name, [1] * num_prompt, num_prompt, sampling, frozenset({EOS}))
    scheduler.add(request)
    return request


def schedule(scheduler: Scheduler) -> Batch:
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.check_integrity()
    return batch


def update(scheduler: Scheduler, batch: Batch, token: int = 7) -> list[Request]:
    touched = scheduler.update(batch, [[token] * len(rows) for rows in batch.ranks])
    scheduler.check_integrity()
    return touched


def shown(batch: Batch, rank: int = 0) -> list[tuple[str, int, int]]:
    return [(row.request.id, row.start, row.num_new) for row in batch.ranks[rank]]


def step(scheduler: Scheduler) -> list[tuple[str, int, int]]:
    """Run one step without overlap; returns rank 0's rows as (id, start, num_new)."""
    batch = schedule(scheduler)
    update(scheduler, batch)
    return shown(batch)


# ---- tokens and row slots ------------------------------------------------------------------------


def test_a_generating_request_gets_its_token_beside_a_long_prompt() -> None:
    scheduler = make_scheduler(max_tokens=8)
    add(scheduler, "short", 2)
    step(scheduler)
    add(scheduler, "long", 18)
    assert [step(scheduler) for _ in range(3)] == [
        [("short", 2, 1), ("long", 0, 7)],
        [("short", 3, 1), ("long", 7, 7)],
        [("short", 4, 1), ("long", 14, 4)],
    ]


def test_a_started_prompt_goes_before_new_requests() -> None:
    scheduler = make_scheduler(max_tokens=8)
    add(scheduler, "a", 12)
    add(scheduler, "b", 12)
    assert [step(scheduler) for _ in range(3)] == [
        [("a", 0, 8)],
        [("a", 8, 4), ("b", 0, 4)],
        [("a", 12, 1), ("b", 4, 7)],
    ]


def test_a_row_slot_is_free_at_the_step_after_the_last_token_was_scheduled() -> None:
    scheduler = make_scheduler(max_rows=1)
    first = add(scheduler, "first", 2, max_tokens=1)
    add(scheduler, "second", 3)
    before = schedule(scheduler)
    assert shown(before) == [("first", 0, 2)]
    after = schedule(scheduler)
    assert shown(after) == [("second", 0, 3)], "without waiting for the token itself"
    assert not first.is_finished
    assert update(scheduler, before) == [first]
    assert first.finish_reason is FinishReason.LENGTH
    update(scheduler, after)


def test_no_request_overtakes_the_first_that_has_to_wait() -> None:
    scheduler = make_scheduler(num_pages=8)
    add(scheduler, "a", 15)
    step(scheduler)
    add(scheduler, "large", 24, max_tokens=1)
    add(scheduler, "small", 1)
    assert step(scheduler) == [("a", 15, 1)]
    assert scheduler.stats.num_waiting == 2


@pytest.mark.parametrize(("num_prompt", "starts"), [(4, True), (5, False)])
def test_a_request_starts_if_each_running_row_still_has_a_page_to_grow(
    num_prompt: int, starts: bool
) -> None:
    scheduler = make_scheduler(num_pages=4)
    add(scheduler, "a", 8, max_tokens=8)  # two pages, and one that must stay free for it
    add(scheduler, "b", num_prompt, max_tokens=8)
    assert len(step(scheduler)) == 1 + starts


def test_the_first_request_finishes_under_a_stream_of_new_ones() -> None:
    scheduler = make_scheduler(num_pages=16, max_tokens=8)
    first = add(scheduler, "first", 10, max_tokens=50)
    for number in range(51):  # two chunks, then a token a step
        add(scheduler, str(number), 10)
        step(scheduler)
    assert first.is_finished
    assert first.num_output == 50


def test_every_request_of_a_crowd_finishes_in_order_of_arrival() -> None:
    scheduler = make_scheduler(num_pages=8, max_rows=3)
    requests = [add(scheduler, str(number), 6, max_tokens=20) for number in range(12)]
    finished: list[Request] = []
    while scheduler.has_work:
        touched = update(scheduler, schedule(scheduler))
        finished += [request for request in touched if request.is_finished]
    assert finished == requests
    assert scheduler.stats.total_preempted > 0


# ---- pages ---------------------------------------------------------------------------------------


def two_that_fill_the_pool() -> tuple[Scheduler, Request, Request]:
    """Two requests that share 4 pages of 4 tokens; in two steps the first will need one more."""
    scheduler = make_scheduler(num_pages=4)
    first, second = add(scheduler, "first", 5), add(scheduler, "second", 3)
    assert step(scheduler) == [("first", 0, 5), ("second", 0, 3)]
    assert step(scheduler) == [("first", 5, 1), ("second", 3, 1)]
    assert step(scheduler) == [("first", 6, 1), ("second", 4, 1)]
    assert scheduler.stats.num_free_pages == 0
    return scheduler, first, second


def test_the_latest_arrival_is_preempted_and_computed_again() -> None:
    scheduler, first, second = two_that_fill_the_pool()
    assert step(scheduler) == [("first", 7, 1), ("second", 5, 1)]
    assert step(scheduler) == [("first", 8, 1)]
    assert second.status is Status.WAITING
    assert (second.pages, second.num_computed, second.row) == ([], 0, -1)
    assert scheduler.stats.total_preempted == 1
    while not first.is_finished:
        assert [row[0] for row in step(scheduler)] == ["first"]
    assert step(scheduler) == [("second", 0, 7)], "its prompt and what it had generated"
    while not second.is_finished:
        step(scheduler)
    assert first.num_output == second.num_output == 10
    assert scheduler.stats.num_free_pages == 4


def test_a_preempted_request_waits_for_its_token_and_nobody_overtakes_it() -> None:
    scheduler, _, second = two_that_fill_the_pool()
    before, after = schedule(scheduler), schedule(scheduler)
    assert shown(before) == [("first", 7, 1), ("second", 5, 1)]
    assert shown(after) == [("first", 8, 1)]
    assert second.num_pending == 1
    scheduler.abort("first")
    add(scheduler, "late", 1)
    assert scheduler.schedule() is None
    assert update(scheduler, before, token=9) == [second]
    assert second.tokens == [1, 1, 1, 7, 7, 7, 9]
    assert shown(schedule(scheduler)) == [("late", 0, 1), ("second", 0, 7)]
    assert update(scheduler, after) == []


def test_a_preempted_request_may_finish_with_the_token_it_waited_for() -> None:
    scheduler, _, second = two_that_fill_the_pool()
    before, after = schedule(scheduler), schedule(scheduler)
    assert second.status is Status.WAITING
    update(scheduler, before, token=EOS)
    assert second.finish_reason is FinishReason.STOP
    assert update(scheduler, after) == []
    assert not scheduler.has_work


def test_a_page_freed_in_time_saves_from_preemption() -> None:
    scheduler, _, second = two_that_fill_the_pool()
    step(scheduler)
    scheduler.abort("first")
    while not second.is_finished:
        step(scheduler)
    assert scheduler.stats.total_preempted == 0


def test_the_latest_arrival_waits_for_a_page_with_all_it_has() -> None:
    scheduler = make_scheduler(num_pages=4)
    first, second = add(scheduler, "first", 1, max_tokens=7), add(scheduler, "second", 4)
    for _ in range(5):
        assert [row[0] for row in step(scheduler)] == ["first", "second"]
    assert step(scheduler) == [("first", 5, 1)]
    assert len(second.pages) == 2
    assert step(scheduler) == [("first", 6, 1)]
    assert first.is_finished
    assert step(scheduler) == [("second", 8, 1)]
    assert scheduler.stats.total_preempted == 0


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3])
def test_abort_frees_pages_and_row_slot_at_once(num_steps: int) -> None:
    scheduler = make_scheduler()
    request = add(scheduler, "a", 3, max_tokens=3)
    batches = [schedule(scheduler) for _ in range(num_steps)]
    assert scheduler.abort("a")
    scheduler.check_integrity()
    stats = scheduler.stats
    assert (stats.num_free_pages, stats.num_running, stats.num_waiting) == (100, 0, 0)
    assert scheduler.has_work == bool(batches)
    for batch in batches:
        assert update(scheduler, batch) == []
    assert request.num_output == 0
    assert not scheduler.has_work


def test_new_requests_go_to_the_rank_with_most_free_pages() -> None:
    scheduler = make_scheduler(num_ranks=2, max_tokens=64)
    for name, num_prompt in {"a": 20, "b": 3, "c": 4, "d": 30}.items():
        add(scheduler, name, num_prompt)
    batch = schedule(scheduler)
    assert shown(batch, 0) == [("a", 0, 20)]
    assert shown(batch, 1) == [("b", 0, 3), ("c", 0, 4), ("d", 0, 30)]


def test_a_preempted_request_goes_on_at_another_rank_behind_its_decode_rows() -> None:
    scheduler = make_scheduler(num_ranks=2, num_pages=6, max_rows=2, max_tokens=4)
    add(scheduler, "a", 8, max_tokens=12)
    add(scheduler, "x", 8, max_tokens=3)
    for _ in range(2):
        update(scheduler, schedule(scheduler))
    add(scheduler, "b", 8, max_tokens=12)
    add(scheduler, "c", 4, max_tokens=12)
    steps = []
    for _ in range(8):
        batch = schedule(scheduler)
        steps.append((shown(batch, 0), shown(batch, 1)))
        update(scheduler, batch)
    assert steps[3:] == [
        ([("a", 11, 1), ("b", 8, 1)], [("c", 5, 1)]),
        ([("a", 12, 1)], [("c", 6, 1), ("b", 0, 3)]),  # b arrived before c, and is longer
        ([("a", 13, 1)], [("c", 7, 1), ("b", 3, 3)]),
        ([("a", 14, 1)], [("c", 8, 1), ("b", 6, 3)]),
        ([("a", 15, 1)], [("b", 9, 1), ("c", 9, 1)]),
    ]
    assert scheduler.stats.total_preempted == 1
