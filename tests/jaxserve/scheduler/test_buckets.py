from __future__ import annotations

import pytest

from jaxserve.scheduler.buckets import Bucket, choose, make_buckets

FINE = (False, True)
SIZES = [(1, 1), (8, 8), (16, 4), (64, 64), (100, 24), (512, 64), (2048, 1), (4096, 256)]


@pytest.mark.parametrize("fine", FINE)
@pytest.mark.parametrize(("max_tokens", "max_rows"), SIZES)
def test_every_batch_up_to_the_maxima_has_a_bucket(
    max_tokens: int, max_rows: int, fine: bool
) -> None:
    buckets = make_buckets(max_tokens, max_rows, fine=fine)
    for num_rows in range(1, max_rows + 1):
        for num_tokens in {num_rows, (num_rows + max_tokens) // 2, max_tokens}:
            bucket = choose(buckets, num_tokens, num_rows, decode_only=False)
            assert bucket.tokens >= num_tokens
            assert bucket.rows >= num_rows


@pytest.mark.parametrize("fine", FINE)
@pytest.mark.parametrize(("max_tokens", "max_rows"), SIZES)
def test_the_last_bucket_is_the_largest_possible_batch(
    max_tokens: int, max_rows: int, fine: bool
) -> None:
    buckets = make_buckets(max_tokens, max_rows, fine=fine)
    assert buckets[-1] == Bucket(max_tokens, max_rows)
    assert list(buckets) == sorted(set(buckets))


@pytest.mark.parametrize("fine", FINE)
@pytest.mark.parametrize("max_rows", [1, 2, 3, 24, 64, 256])
def test_decode_rows_pad_to_less_than_twice_their_number(max_rows: int, fine: bool) -> None:
    buckets = make_buckets(4096, max_rows, fine=fine)
    for num_rows in range(1, max_rows + 1):
        bucket = choose(buckets, num_rows, num_rows, decode_only=True)
        assert bucket.tokens == bucket.rows < max(3 if fine else 2, 2 * num_rows)


def test_long_chunks_pad_to_less_than_twice_their_tokens() -> None:
    buckets = make_buckets(4096, 256)
    for num_tokens in range(512, 4097, 31):
        assert choose(buckets, num_tokens, 1, decode_only=False).tokens < 2 * num_tokens


def test_fine_sizes_pad_little_where_padding_costs() -> None:
    buckets = make_buckets(8192, 256, fine=True)
    for num_rows in range(64, 257):
        assert choose(buckets, num_rows, num_rows, decode_only=True).tokens <= 1.5 * num_rows
    for num_tokens in range(257, 8193):
        padded = choose(buckets, num_tokens, 1, decode_only=False).tokens
        assert 1 - num_tokens / padded < (1 / 4 if padded <= 2048 else 1 / 3)


def test_fine_sizes_for_texts_that_are_only_read() -> None:
    buckets = make_buckets(8192, 256, decodes=False, fine=True)
    assert {bucket.rows for bucket in buckets} == {256}
    assert buckets[0].tokens == 32
    for num_tokens in range(65, 2048):
        assert 1 - num_tokens / choose(buckets, num_tokens, 9, decode_only=False).tokens < 1 / 4


def test_there_are_few_buckets_because_each_is_a_compile() -> None:
    assert len(make_buckets(512, 64)) <= 16
    assert len(make_buckets(8192, 256)) <= 20
    assert len(make_buckets(8192, 256, fine=True)) <= 27


def test_short_prompts_beside_few_rows_have_small_steps() -> None:
    buckets = make_buckets(8192, 256, fine=True)
    for num_tokens in range(1, 257):
        bucket = choose(buckets, num_tokens, min(num_tokens, 32), decode_only=False)
        assert bucket.tokens < max(65, 2 * num_tokens)
    assert choose(buckets, 128, 65, decode_only=False) == Bucket(256, 128)


def test_tokens_cost_more_than_rows() -> None:
    buckets = (Bucket(16, 4), Bucket(16, 8), Bucket(32, 1))
    assert choose(buckets, 10, 1, decode_only=True) == Bucket(16, 4)
    assert choose(buckets, 10, 5, decode_only=False) == Bucket(16, 8)
    assert choose(buckets, 17, 1, decode_only=False) == Bucket(32, 1)


def test_longer_rows_never_go_to_a_decode_only_bucket() -> None:
    buckets = make_buckets(64, 8)
    assert choose(buckets, 4, 2, decode_only=True) == Bucket(4, 4, True)
    assert choose(buckets, 4, 2, decode_only=False) == Bucket(32, 8)


def test_no_bucket_fits() -> None:
    with pytest.raises(ValueError, match="no bucket holds 40 tokens in 2 rows"):
        choose((Bucket(32, 2),), 40, 2, decode_only=True)
    with pytest.raises(ValueError, match="no bucket holds"):
        choose((), 1, 1, decode_only=True)


@pytest.mark.parametrize(("max_tokens", "max_rows"), [(4, 8), (0, 0), (8, 0)])
def test_impossible_maxima_are_refused(max_tokens: int, max_rows: int) -> None:
    with pytest.raises(ValueError, match=f"max_rows={max_rows} and max_tokens={max_tokens}"):
        make_buckets(max_tokens, max_rows)
