"""Compiled steps on disk: found again, never stale, and nothing lost when they are damaged."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

import jaxserve.engine.step_store as store_module
from jaxserve.engine.runner import Runner
from jaxserve.engine.step_store import StepStore, source_digest, step_key
from jaxserve.scheduler.buckets import make_buckets

from .conftest import Driver, TinyModel, greedy, random_prompt

MakeDriver = Callable[..., Driver]
DEVICES = jax.devices()[:1]


@pytest.fixture(autouse=True)
def own_cache() -> Any:
    """Give JAX its shared compile cache back: these tests name folders of their own."""
    before = {
        name: jax.config.values[name]
        for name in (
            "jax_compilation_cache_dir",
            "jax_compilation_cache_max_size",
            "jax_persistent_cache_min_compile_time_secs",
            "jax_persistent_cache_min_entry_size_bytes",
        )
    }
    store_module.source_digest.cache_clear()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()


def started(make_driver: MakeDriver, model: TinyModel, folder: Path, **config: Any) -> Driver:
    driver = make_driver(model, compile_cache_dir=str(folder), **config)
    driver.engine.wait_until_warm()
    return driver


def stored(folder: Path) -> list[Path]:
    return sorted((folder / "steps").glob("*.step"))


def refuse(*_: Any) -> Any:
    raise AssertionError("a step was traced")


@pytest.fixture
def filled(
    tmp_path: Path, model: TinyModel, make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A cache folder after one start."""
    monkeypatch.setattr(store_module, "IMPORTED_AT_S", float("inf"))  # others may edit meanwhile
    started(make_driver, model, tmp_path)
    assert len(stored(tmp_path)) == len(make_buckets(32, 4))
    return tmp_path


def test_a_second_start_traces_nothing_and_gives_the_same_tokens(
    filled: Path, model: TinyModel, make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Runner, "lower", refuse)
    driver = started(make_driver, model, filled)
    jobs = [(random_prompt(n, n), greedy(6)) for n in (1, 17, 40)]
    expected = [model.greedy(prompt, 6) for prompt, _ in jobs]
    assert driver.run(*jobs) == expected
    assert driver.run_alone(*jobs) == expected
    assert driver.engine.compiles.count == 0


@pytest.mark.parametrize("damage", ["cut", "flipped", "other"])
def test_damaged_files_are_compiled_again(
    filled: Path, model: TinyModel, make_driver: MakeDriver, damage: str
) -> None:
    for path in stored(filled):
        data = bytearray(path.read_bytes())
        if damage == "cut":
            del data[len(data) // 2 :]
        elif damage == "flipped":
            data[len(data) // 2] ^= 1
        else:
            data = bytearray(store_module._pack(b"not an executable"))
        path.write_bytes(data)
    driver = started(make_driver, model, filled)
    prompt = random_prompt(40)
    assert driver.run((prompt, greedy(6))) == [model.greedy(prompt, 6)]
    assert not stored(filled)  # JAX's cache gave them, and they cannot be serialized again


def test_steps_from_the_cache_of_jax_are_not_stored(
    filled: Path, model: TinyModel, make_driver: MakeDriver
) -> None:
    for path in stored(filled):
        path.unlink()
    for _ in range(2):
        driver = started(make_driver, model, filled)
        prompt = random_prompt(40)
        assert driver.run((prompt, greedy(6))) == [model.greedy(prompt, 6)]
        assert not stored(filled)


def test_another_pool_or_dtype_is_another_step(
    filled: Path, model: TinyModel, make_driver: MakeDriver
) -> None:
    num_buckets = len(make_buckets(32, 4))
    started(make_driver, model, filled, max_total_tokens=33 * 8)
    assert len(stored(filled)) == 2 * num_buckets
    started(make_driver, model, filled, dtype="bfloat16")
    assert len(stored(filled)) == 3 * num_buckets


def test_the_key_follows_everything_a_step_is_made_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "IMPORTED_AT_S", float("inf"))
    key = step_key(["spec"], DEVICES)
    assert key is not None and key == step_key(["spec"], DEVICES)
    assert key != step_key(["other"], DEVICES)
    assert key != step_key(["spec"], jax.devices()[:2])
    assert step_key([object()], DEVICES) is None
    with monkeypatch.context() as changed:
        changed.setenv("XLA_FLAGS", "--xla_some_flag")
        assert key != step_key(["spec"], DEVICES)
    before = jax.config.jax_default_matmul_precision
    jax.config.update("jax_default_matmul_precision", "float32")
    try:
        assert key != step_key(["spec"], DEVICES)
    finally:
        jax.config.update("jax_default_matmul_precision", before)
    for name, value in (("jaxlib", "__version__"), ("jax", "__version__"), ("np", "__version__")):
        with monkeypatch.context() as changed:
            changed.setattr(getattr(store_module, name), value, "0.0.0")
            assert key != step_key(["spec"], DEVICES)
    with monkeypatch.context() as changed:
        changed.setattr(store_module, "_cpu", lambda: ["flags: fewer"])
        assert key != step_key(["spec"], DEVICES)
    with monkeypatch.context() as changed:
        changed.setattr(store_module, "source_digest", lambda: "other code")
        assert key != step_key(["spec"], DEVICES)
    assert key == step_key(["spec"], DEVICES)


def test_source_newer_than_the_process_is_trusted_by_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store_module, "IMPORTED_AT_S", 0.0)
    assert source_digest() is None
    assert step_key(["spec"], DEVICES) is None


def test_a_folder_that_others_can_write_to_is_not_used(
    filled: Path, model: TinyModel, make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = filled / "steps"
    for path in stored(filled):
        os.utime(path, (1, 1))
    folder.chmod(0o777)
    started(make_driver, model, filled)
    assert {path.stat().st_mtime for path in stored(filled)} == {1.0}  # none was touched


def test_the_oldest_steps_go_when_the_folder_is_full(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    compiled = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((4,), "float32")).compile()
    store = StepStore(tmp_path, max_bytes=1)
    store.save("a", compiled)
    assert not list(tmp_path.glob("*.step"))
    store = StepStore(tmp_path, max_bytes=10**9)
    store.save("a", compiled)
    os.utime(tmp_path / "a.step", (1, 1))
    size = (tmp_path / "a.step").stat().st_size
    StepStore(tmp_path, max_bytes=int(1.5 * size)).save("b", compiled)
    assert [path.name for path in tmp_path.glob("*.step")] == ["b.step"]
