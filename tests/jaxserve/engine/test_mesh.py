"""The same tokens on every mesh of virtual devices."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .conftest import ONE_BUCKET, Driver, TinyModel, greedy, random_prompt

JOBS = [(random_prompt(length, 3), greedy(10)) for length in (1, 5, 17, 33, 60, 70, 9)]
MESHES = [(1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (2, 2)]


@pytest.fixture(scope="module")
def expected(model: TinyModel, odd_model: TinyModel) -> dict[str, list[list[int]]]:
    return {
        name: [tiny.greedy(prompt, 10) for prompt, _ in JOBS]
        for name, tiny in (("model", model), ("odd_model", odd_model))
    }


@pytest.mark.parametrize(("dp_size", "tp_size"), MESHES, ids=lambda n: str(n))
@pytest.mark.parametrize("name", ["model", "odd_model"])
def test_every_mesh_gives_the_same_greedy_tokens(
    request: pytest.FixtureRequest,
    make_driver: Callable[..., Driver],
    expected: dict[str, list[list[int]]],
    name: str,
    dp_size: int,
    tp_size: int,
) -> None:
    driver = make_driver(
        request.getfixturevalue(name), **ONE_BUCKET, dp_size=dp_size, tp_size=tp_size
    )
    assert driver.run(*JOBS) == expected[name]
    info = driver.engine.model_info
    assert (info.dp_size, info.tp_size) == (dp_size, tp_size)
    assert driver.engine.scheduler.stats.num_pages == dp_size * info.num_pages


def test_all_buckets_work_on_two_ranks(
    model: TinyModel, make_driver: Callable[..., Driver]
) -> None:
    jobs = [(random_prompt(length, 4), greedy(30)) for length in (80, 70, 60, 50, 40, 30, 20, 10)]
    driver = make_driver(
        model, dp_size=2, max_running_requests=2, max_total_tokens=128, chunked_prefill_size=16
    )
    driver.engine.wait_until_warm()
    assert driver.run(*jobs) == [model.greedy(prompt, 30) for prompt, _ in jobs]
    assert driver.num_preempted > 0
    assert driver.run(*jobs[3:]) == driver.run_alone(*jobs[3:])
    assert set(driver.buckets_used) == set(driver.engine.runner.buckets)
