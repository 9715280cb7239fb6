"""Memory mappings: counted before a step is compiled, and given back when an engine is closed."""

from __future__ import annotations

import gc
import logging
import mmap
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxserve.engine import mappings
from jaxserve.engine.engine import Engine
from jaxserve.engine.mappings import (
    NEEDED,
    TooManyMappings,
    max_mappings,
    num_mappings,
    require_mappings,
)
from jaxserve.engine.runner import Runner
from jaxserve.scheduler.buckets import Bucket

from .conftest import ONE_BUCKET, Driver, TinyModel, config_of, greedy, random_prompt

MakeDriver = Callable[..., Driver]

pytestmark = pytest.mark.skipif(not mappings.MAPS.exists(), reason="this system counts no mappings")


@pytest.fixture
def set_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that makes the system allow so many mappings."""

    def set_to(limit: int) -> None:
        path = tmp_path / "max_map_count"
        path.write_text(f"{limit}\n", "utf-8")
        monkeypatch.setattr(mappings, "LIMIT", path)

    return set_to


def test_mappings_are_counted() -> None:
    before = num_mappings()
    apart = [mmap.mmap(-1, mmap.PAGESIZE, prot=(1, 3)[i % 2]) for i in range(100)]
    assert before + 50 <= num_mappings() <= before + 150
    del apart


def test_a_step_is_refused_where_its_mappings_could_run_out(set_limit) -> None:
    set_limit(num_mappings() + NEEDED + 1000)
    require_mappings()
    limit = num_mappings() + NEEDED - 1000
    set_limit(limit)
    with pytest.raises(TooManyMappings, match=rf"of the {limit} that .*vm\.max_map_count="):
        require_mappings()


def test_a_system_without_the_limit_refuses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mappings, "LIMIT", tmp_path / "absent")
    assert max_mappings() is None
    require_mappings()


def test_the_first_step_is_refused_by_name(
    model: TinyModel, make_driver: MakeDriver, set_limit
) -> None:
    set_limit(num_mappings() + NEEDED // 2)
    with pytest.raises(TooManyMappings, match="no further step can be compiled"):
        make_driver(model, **ONE_BUCKET)


def test_buckets_beyond_the_limit_are_done_without(
    model: TinyModel,
    make_driver: MakeDriver,
    set_limit,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    compile_now = Runner.compile

    def compile_one(self: Runner, bucket: Bucket, num_pages: int):
        result = compile_now(self, bucket, num_pages)
        set_limit(num_mappings() + NEEDED // 2)
        return result

    monkeypatch.setattr(Runner, "compile", compile_one)
    with caplog.at_level(logging.WARNING):
        driver = make_driver(model)
        driver.engine.wait_until_warm()
    assert "the step for 1x1 decode is left out: no further step" in caplog.text
    assert driver.engine.is_warm
    prompt = random_prompt(40)
    assert driver.run((prompt, greedy(6))) == [model.greedy(prompt, 6)]
    assert len(driver.buckets_used) == 1


def test_a_closed_engine_gives_its_mappings_back(model: TinyModel) -> None:
    def build() -> tuple[int, int]:
        engine = Engine(config_of(model))
        engine.wait_until_warm()
        peak = num_mappings()
        engine.close()
        del engine
        gc.collect()
        return peak, num_mappings()

    _, before = build()
    peak, after = build()
    assert peak - before > 100  # the steps were compiled in between
    assert after - before < (peak - before) // 4
