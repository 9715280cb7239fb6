"""The step shapes that get compiled, and the choice of one for a batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_SMALLEST_MIXED = 32  # tokens; a shorter chunk costs a step hardly less
# Where fine sizes begin: up to here an accelerator takes as long as it reads the weights, and
# padding is free; beyond, time grows with tokens.
_FREE_PADDING = 64
_COARSE_FROM = 2048  # steps this large are mostly full ones: prompts wait, and fill them up
# With one row, XLA for GPUs multiplies elementwise in some products and rounds to the model's dtype
# before it sums up: slower than two rows, and less exact.
_FEWEST_ROWS = 2
_FRACTIONS = ((1.0, 1.25, 1.5), (1.0, 1.5))  # of a power of two, in fine sizes below and from there


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


def make_buckets(
    max_tokens: int, max_rows: int, *, decodes: bool = True, fine: bool = False
) -> tuple[Bucket, ...]:
    """Return the buckets to compile, in ascending order; the last one holds every batch.

    Without `decodes` there are mixed buckets only: no request has a second step of one token.

    Decode-only buckets (r, r) for powers of two up to max_rows; mixed buckets (t, max_rows) for
    powers of two up to max_tokens. Every one is a compile, and a row costs a chunk's step little:
    only its last token's logits. With `fine` there are sizes between the powers of two where
    padding costs time: at most a quarter of a step up to 2048 tokens is padding, a third beyond.
    Decoding begins with two rows, then, and a short prompt beside few rows has mixed buckets
    (t, t / 2) with t up to max_rows.

    Raises:
        ValueError: the maxima are not 1 <= max_rows <= max_tokens.
    """
    if not 1 <= max_rows <= max_tokens:
        raise ValueError(
            f"buckets need 1 <= max_rows <= max_tokens, but max_rows={max_rows} and "
            f"max_tokens={max_tokens}: every running row must get a token in every step."
        )
    rows = _doubling(min(_FEWEST_ROWS, max_rows) if fine else 1, max_rows)
    # What holds no more tokens than there are rows pads to a little more than that.
    least = max_rows if decodes else 0
    if fine:
        rows = _with_fractions(rows, (_FRACTIONS[1],) * 2)
        sizes = _with_fractions(_doubling(_SMALLEST_MIXED, max_tokens))
        tokens = [size for size in sizes if size > least] or [max_tokens]
    else:
        tokens = _doubling(min(max_tokens, max(_SMALLEST_MIXED, 2 * least)), max_tokens)
    decode = {Bucket(size, size, True) for size in rows if size < max_tokens} if decodes else set()
    short = {
        Bucket(size, size // 2)
        for size in (_doubling(_FREE_PADDING, least) if fine and least > _FREE_PADDING else ())
    }
    return tuple(sorted(decode | short | {Bucket(size, max_rows) for size in tokens}))


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


def _with_fractions(
    sizes: Sequence[int], fractions: Sequence[Sequence[float]] = _FRACTIONS
) -> list[int]:
    """Return the sizes and, where padding costs time, some between them and their doubles."""
    below, beyond = fractions
    fine = [
        int(size * fraction)
        for size in sizes
        if size >= _FREE_PADDING
        for fraction in (beyond if size >= _COARSE_FROM else below)
    ]
    return sorted({*sizes, *(size for size in fine if size <= sizes[-1])})


def _doubling(first: int, last: int) -> list[int]:
    """Return first, 2 first, 4 first, ... below last, and last."""
    values = []
    while first < last:
        values.append(first)
        first *= 2
    return [*values, last]
