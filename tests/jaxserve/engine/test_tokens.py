"""The tokens of a request do not depend on what else the engine does."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from jaxserve.request import FinishReason, SamplingParams

from .conftest import CONTEXT, EOS, ONE_BUCKET, Driver, TinyModel, greedy, output_of, random_prompt

# Around pages of 8, buckets of 16 and 32 tokens, and the context of 128.
LENGTHS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 96, 100, 120)
NEW = 8
JOBS = [(random_prompt(length), greedy(NEW)) for length in LENGTHS]


@pytest.fixture(scope="module")
def expected(model: TinyModel) -> list[list[int]]:
    """What transformers continues each of JOBS with."""
    return [model.greedy(prompt, NEW) for prompt, _ in JOBS]


def test_the_reference_says_different_things(expected: list[list[int]]) -> None:
    assert len({tuple(tokens) for tokens in expected}) == len(JOBS)
    assert len({token for tokens in expected for token in tokens}) > 40


def test_greedy_tokens_are_those_of_transformers_in_every_bucket(
    driver: Driver, expected: list[list[int]]
) -> None:
    driver.buckets_used.clear()
    assert driver.run_alone(*JOBS) == expected
    for size in (2, 3, 4):  # rows, so that every decode bucket runs
        for first in range(0, len(JOBS), size):
            last = first + size
            assert driver.run(*JOBS[first:last]) == expected[first:last]
    assert driver.run(*reversed(JOBS)) == expected[::-1]
    assert set(driver.buckets_used) == set(driver.engine.runner.buckets)


def test_without_overlap_the_tokens_are_the_same(
    model: TinyModel, make_driver: Callable[..., Driver], expected: list[list[int]]
) -> None:
    driver = make_driver(model, disable_overlap_schedule=True)
    assert driver.run(*JOBS) == expected


def test_prompts_in_one_piece_give_the_same_tokens(
    model: TinyModel, make_driver: Callable[..., Driver], expected: list[list[int]]
) -> None:
    driver = make_driver(model, **ONE_BUCKET, chunked_prefill_size=CONTEXT)
    assert driver.run_alone(*JOBS) == expected
    assert driver.run(*JOBS) == expected


def test_prompts_in_tiny_pieces_give_the_same_tokens(
    model: TinyModel, make_driver: Callable[..., Driver], expected: list[list[int]]
) -> None:
    assert make_driver(model, **ONE_BUCKET, chunked_prefill_size=5).run(*JOBS) == expected


@pytest.mark.parametrize("page_size", [1, 16, 128])
def test_page_size_does_not_matter(
    model: TinyModel,
    make_driver: Callable[..., Driver],
    expected: list[list[int]],
    page_size: int,
) -> None:
    driver = make_driver(model, **ONE_BUCKET, page_size=page_size)
    assert driver.run(*JOBS[6:12]) == expected[6:12]


def test_preempted_requests_give_the_same_tokens(driver: Driver) -> None:
    jobs = [(random_prompt(length), greedy(60)) for length in (50, 52, 54, 56)]
    alone = driver.run_alone(*jobs)
    before = driver.num_preempted
    assert driver.run(*jobs) == alone
    assert driver.num_preempted > before


def test_200_requests_come_and_go(driver: Driver) -> None:
    draw = random.Random(0)
    jobs = [
        (
            random_prompt(draw.randint(1, 90), seed),
            greedy(draw.randint(1, 30), ignore_eos=draw.random() < 0.5),
        )
        for seed in range(200)
    ]
    before = driver.num_preempted
    requests, doomed = [], []
    for job in jobs:
        requests.append(driver.add(*job))
        if draw.random() < 0.2:
            doomed.append((draw.randint(0, 60), requests[-1]))
        for _ in range(draw.choice((0, 0, 0, 1, 4, 30))):
            driver.step()
            for moment, request in list(doomed):
                if moment == 0:
                    driver.engine.abort(request.id)
                    driver.engine.scheduler.check_integrity()
                    doomed.remove((moment, request))
            doomed = [(moment - 1, request) for moment, request in doomed]
    driver.drain()
    assert driver.num_preempted > before
    reasons = [request.finish_reason for request in requests]
    assert reasons.count(FinishReason.ABORT) >= 20
    assert reasons.count(FinishReason.STOP) + reasons.count(FinishReason.LENGTH) >= 120
    for job, request in zip(jobs, requests, strict=True):
        (alone,) = driver.run(job)
        if request.finish_reason is FinishReason.ABORT:
            assert output_of(request) == alone[: request.num_output]
        else:
            assert output_of(request) == alone


def test_end_of_text_ends_a_request_unless_ignored(
    driver: Driver, model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = random_prompt(9)
    tokens = model.greedy(prompt, 10)
    end = tokens[4]
    cut = tokens[: tokens.index(end) + 1]
    assert driver.engine.tokenizer.eos_ids == {EOS}
    monkeypatch.setattr(driver.engine.tokenizer, "eos_ids", frozenset({end}))
    assert driver.run((prompt, greedy(10, ignore_eos=False))) == [cut]
    assert driver.run((prompt, greedy(10))) == [tokens]
    stop = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True, stop_token_ids=(end,))
    assert driver.run((prompt, stop)) == [cut]


def test_the_context_limit_ends_a_request(driver: Driver, model: TinyModel) -> None:
    prompt = random_prompt(CONTEXT - 5)
    sampling = SamplingParams(max_tokens=None, temperature=0, ignore_eos=True)
    assert driver.run((prompt, sampling)) == [model.greedy(prompt, 5)]


# ---- random sampling ------------------------------------------------------------------------


def seeded(seed: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=20, temperature=1.2, top_p=0.95, top_k=100, seed=seed, ignore_eos=True
    )


def test_a_seed_and_a_prompt_give_the_same_tokens_in_any_company(driver: Driver) -> None:
    jobs = [(random_prompt(length, 5), seeded(length)) for length in (3, 20, 40, 70)]
    company = [(random_prompt(n, 6), greedy(25)) for n in (60, 11, 33)]
    alone = driver.run_alone(*jobs)
    assert driver.run(*jobs) == alone
    before = driver.num_preempted
    mixed = driver.run(*company[:2], *jobs[::-1], *company[2:], *jobs)
    assert mixed[2:6][::-1] == alone
    assert mixed[7:] == alone
    assert driver.num_preempted > before


def test_seeds_and_their_absence(driver: Driver) -> None:
    prompt = random_prompt(12)
    fresh = SamplingParams(max_tokens=20, temperature=1.2, ignore_eos=True)
    outputs = driver.run(*[(prompt, p) for p in (seeded(1), seeded(2), seeded(1), fresh, fresh)])
    assert outputs[0] == outputs[2]
    assert len({tuple(tokens) for tokens in outputs}) == 4


def test_random_seed_decides_the_seeds_of_requests_without_one(
    model: TinyModel, make_driver: Callable[..., Driver]
) -> None:
    job = (random_prompt(12), SamplingParams(max_tokens=12, temperature=1.5, ignore_eos=True))
    first, second, other = (
        make_driver(model, random_seed=seed).run(job, job) for seed in (7, 7, 8)
    )
    assert first == second
    assert len({tuple(tokens) for tokens in first + other}) == 4
