from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.request import InvalidRequest
from jaxserve.scheduler.page_pool import NoPagesLeft, PagePool


def test_allocated_pages_are_distinct_and_not_free() -> None:
    pool = PagePool(5)
    first, second = pool.allocate(2), pool.allocate(3)
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert pool.num_free == 0
    pool.check_integrity([first, second])


def test_allocating_nothing_is_safe() -> None:
    pool = PagePool(1)
    assert pool.allocate(0) == []
    assert pool.num_free == 1


def test_too_large_an_allocation_takes_nothing() -> None:
    pool = PagePool(4)
    pool.allocate(1)
    with pytest.raises(NoPagesLeft, match="4 pages were asked, but 3 of 4 are free"):
        pool.allocate(4)
    assert pool.num_free == 3
    pool.check_integrity()


def test_no_pages_left_is_an_invalid_request() -> None:
    assert issubclass(NoPagesLeft, InvalidRequest)


def test_a_shared_page_is_free_after_its_last_owner() -> None:
    pool = PagePool(2)
    pages = pool.allocate(1)
    pool.share(pages)
    pool.release(pages)
    assert pool.num_free == 1
    pool.release(pages)
    assert pool.num_free == 2
    pool.check_integrity([])


def test_a_freed_page_is_the_next_given_out() -> None:
    pool = PagePool(3)
    pages = pool.allocate(3)
    pool.release([pages[1]])
    assert pool.allocate(1) == [pages[1]]


def test_misuse_is_caught() -> None:
    pool = PagePool(2)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(AssertionError, match="is released, but it is free"):
        pool.release(pages)
    with pytest.raises(AssertionError, match="is shared, but it is free"):
        PagePool(2).share([0])


def test_integrity_check_finds_a_lost_page() -> None:
    pool = PagePool(2)
    pool.allocate(1)
    with pytest.raises(AssertionError, match="pages held"):
        pool.check_integrity([])


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="num_pages=0"):
        PagePool(0)


@given(st.lists(st.tuples(st.sampled_from(["allocate", "share", "release"]), st.integers(0, 6))))
def test_counts_follow_any_sequence_of_calls(calls: list[tuple[str, int]]) -> None:
    pool = PagePool(8)
    owners: list[list[int]] = []
    for name, number in calls:
        if name == "allocate":
            if number > pool.num_free:
                with pytest.raises(NoPagesLeft):
                    pool.allocate(number)
            else:
                owners.append(pool.allocate(number))
        elif owners:
            pages = owners[number % len(owners)]
            if name == "share":
                pool.share(pages)
                owners.append(list(pages))
            else:
                owners.remove(pages)
                pool.release(pages)
        pool.check_integrity(owners)
        held = Counter(page for pages in owners for page in pages)
        assert pool.num_free == 8 - len(held)
