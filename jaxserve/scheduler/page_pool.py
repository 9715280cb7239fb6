"""Which KV pages are free, and how many hold each of the others. Page contents are elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from jaxserve.request import InvalidRequest


class NoPagesLeft(InvalidRequest):
    """More pages are asked than there are."""


class PagePool:
    """The pages 0..num_pages-1 of one rank, each free or held by one or more owners.

    A freed page is the next to be given out: the device runs steps in order, so whatever a step
    in flight still writes to it comes before the writes of its next owner.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"a page pool needs at least one page, not num_pages={num_pages}.")
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._num_owners = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, num: int) -> list[int]:
        """Take `num` free pages, each with one owner; safe with num=0.

        Raises:
            NoPagesLeft: fewer are free; none is taken.
        """
        left = len(self._free) - num
        if left < 0:
            raise NoPagesLeft(
                f"{num} pages were asked, but {len(self._free)} of {self.num_pages} are free."
            )
        pages = self._free[left:]
        del self._free[left:]
        for page in pages:
            self._num_owners[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Give each of these held pages one more owner."""
        for page in pages:
            assert self._num_owners[page] > 0, f"page {page} is shared, but it is free"
            self._num_owners[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Take one owner from each of these pages; those without any become free."""
        for page in pages:
            num_owners = self._num_owners[page] - 1
            assert num_owners >= 0, f"page {page} is released, but it is free"
            self._num_owners[page] = num_owners
            if num_owners == 0:
                self._free.append(page)

    def check_integrity(self, owners: Iterable[Sequence[int]] | None = None) -> None:
        """Assert that every page is either free, once, or held.

        With `owners`, the pages of every owner, also that the counts are theirs exactly.
        """
        free = set(self._free)
        assert len(free) == len(self._free), "a page is in the free list twice"
        unowned = {page for page, num in enumerate(self._num_owners) if num == 0}
        assert free == unowned, f"free list and owner counts differ in {sorted(free ^ unowned)}"
        assert min(self._num_owners) >= 0, "a page has a negative number of owners"
        if owners is not None:
            held = Counter(page for pages in owners for page in pages)
            counted = {page: num for page, num in enumerate(self._num_owners) if num}
            assert held == counted, f"pages held: {dict(held)}; pages counted: {counted}"
