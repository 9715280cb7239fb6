"""Requests that are only read: they end with their last prompt token and never decode."""

from __future__ import annotations

import pytest

from jaxserve.request import NO_SAMPLING, FinishReason, InvalidRequest, Request, SamplingParams
from jaxserve.scheduler.buckets import Bucket, make_buckets
from jaxserve.scheduler.page_pool import NoPagesLeft
from jaxserve.scheduler.scheduler import Batch, Scheduler

PAGE_SIZE = 4


def make(num_pages: int = 16, max_rows: int = 4, max_tokens: int = 12) -> Scheduler:
    return Scheduler(
        num_pages=num_pages,
        page_size=PAGE_SIZE,
        max_rows=max_rows,
        max_tokens_per_step=max_tokens,
        max_model_len=48,
        buckets=make_buckets(max_tokens, max_rows),
    )


def text(name: str, length: int) -> Request:
    return Request(name, [7] * length, length, NO_SAMPLING, prefill_only=True)


def update(scheduler: Scheduler, batch: Batch) -> list[str]:
    """Finish a step; returns the names of the requests that are returned."""
    done = scheduler.update(batch, [[5] * len(rows) for rows in batch.ranks])
    scheduler.check_integrity()
    return [request.id for request in done]


def test_texts_fill_a_step_and_end_with_it() -> None:
    scheduler = make()
    for name in "abcde":
        scheduler.add(text(name, 3))
    first = scheduler.schedule()
    assert first is not None
    assert [row.request.id for row in first.ranks[0]] == list("abcd")  # 12 tokens
    assert update(scheduler, first) == list("abcd")
    last = scheduler.schedule()
    assert last is not None
    assert update(scheduler, last) == ["e"]
    assert scheduler.stats.num_free_pages == scheduler.num_pages
    assert not scheduler.has_work


def test_pages_and_row_are_free_for_the_next_step_before_the_result_is_there() -> None:
    scheduler = make(num_pages=3, max_rows=1)
    scheduler.add(text("a", 12))
    scheduler.add(text("b", 12))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first is not None and second is not None
    assert second.ranks[0][0].request.id == "b"
    assert update(scheduler, first) == ["a"]
    assert update(scheduler, second) == ["b"]


def test_a_long_text_is_read_in_chunks_and_gets_no_token() -> None:
    scheduler = make()
    request = text("a", 30)
    scheduler.add(request)
    spans = []
    while (batch := scheduler.schedule()) is not None:
        (row,) = batch.ranks[0]
        spans.append((row.start, row.num_new, row.samples))
        update(scheduler, batch)
    assert spans == [(0, 12, False), (12, 12, False), (24, 6, True)]
    assert request.is_finished
    assert request.finish_reason is FinishReason.STOP
    assert request.tokens == [7] * 30


def test_a_text_may_fill_the_context_and_no_more() -> None:
    scheduler = make()
    scheduler.add(text("fits", 48))
    with pytest.raises(InvalidRequest, match="the context is 48 tokens"):
        scheduler.add(text("long", 49))
    with pytest.raises(NoPagesLeft, match="the pool has 2"):
        make(num_pages=2).add(text("large", 9))


def test_texts_run_beside_requests_that_generate() -> None:
    scheduler = make()
    scheduler.add(Request("g", [1, 2], 2, SamplingParams(max_tokens=4)))
    for name in "abc":
        scheduler.add(text(name, 20))
    ended = []
    while (batch := scheduler.schedule()) is not None:
        ended += update(scheduler, batch)
    assert ended.count("g") == 4
    assert sorted(set(ended)) == list("abcg")
    assert scheduler.stats.num_free_pages == scheduler.num_pages


def test_aborted_texts_leave_nothing_behind() -> None:
    scheduler = make()
    scheduler.add(text("a", 30))
    batch = scheduler.schedule()
    assert batch is not None
    assert scheduler.abort("a")
    assert update(scheduler, batch) == []
    assert scheduler.stats.num_free_pages == scheduler.num_pages


def test_buckets_without_decoding_are_mixed_ones_only() -> None:
    assert make_buckets(128, 32, decodes=False) == (
        Bucket(32, 32),
        Bucket(64, 32),
        Bucket(128, 32),
    )
