"""The shapes a step is compiled for, and the choice of one.

A bucket is (tokens, rows), both per rank. Decode buckets have one token per row; the others hold
prompt chunks beside decode rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Bucket:
    """One compiled shape: padded tokens and padded rows of a step."""

    tokens: int
    rows: int

    def __str__(self) -> str:
        return f"{self.tokens}x{self.rows}"


def powers_of_two(low: int, high: int) -> list[int]:
    """low, 2*low, 4*low, ... up to `high`, which is always the last."""
    sizes = []
    while low < high:
        sizes.append(low)
        low *= 2
    return [*sizes, high]


def make_buckets(max_tokens: int, max_rows: int) -> tuple[Bucket, ...]:
    """Every shape worth compiling: decode at 1, 2, 4, ... rows; chunks at doubling sizes.

    Raises:
        ValueError: a step could not hold one token for every row.
    """
    if not 1 <= max_rows <= max_tokens:
        raise ValueError(
            f"{max_rows} rows do not fit in a step of {max_tokens} tokens. Raise "
            f"--chunked-prefill-size or lower --max-running-requests."
        )
    decode = {Bucket(rows, rows) for rows in powers_of_two(1, max_rows)}
    smallest = min(max_tokens, max(32, 2 * max_rows))
    mixed = {Bucket(tokens, max_rows) for tokens in powers_of_two(smallest, max_tokens)}
    return tuple(sorted(decode | mixed))


def choose(buckets: Iterable[Bucket], num_tokens: int, num_rows: int) -> Bucket:
    """The cheapest bucket that holds a step: fewest tokens, then fewest rows."""
    return min(b for b in buckets if b.tokens >= num_tokens and b.rows >= num_rows)
