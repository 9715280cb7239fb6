"""The pool of KV pages of one rank: a free list and reference counts."""

from __future__ import annotations

from collections.abc import Iterable


class NoPagesLeft(ValueError):
    """More pages were asked for than there are."""


class PagePool:
    """Pages 0 .. num_pages-1, each free or held by one or more owners."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._references = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free pages, or none.

        Raises:
            NoPagesLeft: fewer are free.
        """
        if count > len(self._free):
            raise NoPagesLeft(
                f"{count} pages asked for, {len(self._free)} of {self.num_pages} are free"
            )
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Add an owner to pages that have one already."""
        for page in pages:
            assert self._references[page] > 0, f"page {page} is free and cannot be shared"
            self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Drop one owner of each page; a page without owners is free."""
        for page in pages:
            assert self._references[page] > 0, f"page {page} was released twice"
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free.append(page)

    def check_integrity(self, owners: Iterable[Iterable[int]] | None = None) -> None:
        """Assert that every page is either free once or owned as often as it is counted.

        Args:
            owners: the page lists of everyone who holds pages, to compare with the counts.
        """
        free = set(self._free)
        assert len(free) == len(self._free), "a page is in the free list twice"
        for page, count in enumerate(self._references):
            assert (count == 0) == (page in free), f"page {page}: {count} owners, free: {page in free}"
        if owners is not None:
            counted = [0] * self.num_pages
            for pages in owners:
                for page in pages:
                    counted[page] += 1
            assert counted == self._references, "owners and reference counts disagree"
