"""The step shapes that get compiled, and the choice of one for a batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_SMALLEST_MIXED = 32  # tokens; a shorter chunk costs a step hardly less


@dataclass(frozen=True, order=True, slots=True)
class Bucket:
    """One compiled shape of the step: padded tokens (T) and padded rows (R) of each rank.

    decode_only: for steps whose rows have one token each, which saves them what longer rows need.
    """

    tokens: int
    rows: int
    decode_only: bool = False

    def __str__(self) -> str:
        return f"{self.tokens}x{self.rows}{' decode' if self.decode_only else ''}"


def make_buckets(max_tokens: int, max_rows: int, *, decodes: bool = True) -> tuple[Bucket, ...]:
    """Return the buckets to compile, in ascending order; the last one holds every batch.

    Without `decodes` there are mixed buckets only: no request has a second step of one token.

    Decode-only buckets (r, r) for powers of two up to max_rows; mixed buckets (t, max_rows) for
    powers of two up to max_tokens. Every one is a compile, and a row costs a chunk's step little:
    only its last token's logits.

    Raises:
        ValueError: the maxima are not 1 <= max_rows <= max_tokens.
    """
    if not 1 <= max_rows <= max_tokens:
        raise ValueError(
            f"buckets need 1 <= max_rows <= max_tokens, but max_rows={max_rows} and "
            f"max_tokens={max_tokens}: every running row must get a token in every step."
        )
    decode = {Bucket(rows, rows, True) for rows in _doubling(1, max_rows)} if decodes else set()
    smallest = min(max_tokens, max(_SMALLEST_MIXED, 2 * max_rows if decodes else 0))
    mixed = {Bucket(tokens, max_rows) for tokens in _doubling(smallest, max_tokens)}
    return tuple(sorted({b for b in decode if b.tokens < max_tokens} | mixed))


def choose(
    buckets: Iterable[Bucket], num_tokens: int, num_rows: int, *, decode_only: bool
) -> Bucket:
    """Return the cheapest bucket that fits; tokens cost most, then rows.

    decode_only: every row of the step has one token. `buckets` must be in ascending order, as
    make_buckets gives them.

    Raises:
        ValueError: none fits.
    """
    for bucket in buckets:
        fits = bucket.tokens >= num_tokens and bucket.rows >= num_rows
        if fits and (decode_only or not bucket.decode_only):
            return bucket
    raise ValueError(
        f"no bucket holds {num_tokens} tokens in {num_rows} rows; the largest is "
        f"{max(buckets, default=None)}."
    )


def _doubling(first: int, last: int) -> list[int]:
    """Return first, 2 first, 4 first, ... below last, and last."""
    values = []
    while first < last:
        values.append(first)
        first *= 2
    return [*values, last]
