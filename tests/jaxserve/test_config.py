"""The configs: what they refuse, which flags they make, what they tell JAX."""

from __future__ import annotations

import argparse
import dataclasses
import stat
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxserve import config as config_module
from jaxserve.config import (
    ConfigError,
    EngineConfig,
    ServerConfig,
    add_flags,
    compile_cache_path,
    configure_jax,
    flag_name,
    from_args,
    user_cache_dir,
)

SGLANG_ENGINE_FLAGS = {
    "--model-path": "somewhere",
    "--tokenizer-path": "elsewhere",
    "--revision": "main",
    "--download-dir": "models",
    "--dtype": "bfloat16",
    "--device": "cpu",
    "--tp-size": 2,
    "--dp-size": 3,
    "--page-size": 16,
    "--mem-fraction-static": 0.8,
    "--max-total-tokens": 4096,
    "--context-length": 2048,
    "--max-running-requests": 8,
    "--chunked-prefill-size": 512,
    "--random-seed": 7,
}


def parse_engine(*arguments: str) -> EngineConfig:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser, EngineConfig)
    return from_args(EngineConfig, parser.parse_args(arguments))


def parse_server(*arguments: str) -> ServerConfig:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser, ServerConfig)
    return from_args(ServerConfig, parser.parse_args(arguments))


@pytest.mark.parametrize(("flag", "value"), SGLANG_ENGINE_FLAGS.items())
def test_sglang_flag_sets_the_field_of_its_name(flag: str, value: object) -> None:
    built = parse_engine("--model-path", "somewhere", flag, str(value))
    assert getattr(built, flag[2:].replace("-", "_")) == value


@pytest.mark.parametrize("flag", ["--tp-size", "--tensor-parallel-size", "--tp"])
def test_every_spelling_of_tp_is_the_same_flag(flag: str) -> None:
    assert parse_engine("--model-path", "m", flag, "4").tp_size == 4


@pytest.mark.parametrize("flag", ["--dp-size", "--data-parallel-size", "--dp"])
def test_every_spelling_of_dp_is_the_same_flag(flag: str) -> None:
    assert parse_engine("--model-path", "m", flag, "4").dp_size == 4


@pytest.mark.parametrize("flag", ["--ep-size", "--expert-parallel-size", "--ep"])
def test_every_spelling_of_ep_is_the_same_flag(flag: str) -> None:
    assert parse_engine("--model-path", "m", "--tp-size", "4", flag, "2").ep_size == 2


def test_switches_are_off_unless_given() -> None:
    assert not parse_engine("--model-path", "m").disable_overlap_schedule
    assert parse_engine("--model-path", "m", "--disable-overlap-schedule").disable_overlap_schedule


def test_server_flags_set_their_fields() -> None:
    built = parse_server(
        *("--host", "0.0.0.0", "--port", "8000", "--api-key", "secret"),
        *("--served-model-name", "mine", "--chat-template", "chat.jinja"),
        *("--log-level", "debug", "--trust-remote-code", "--drain-timeout-s", "1.5"),
    )
    assert built == ServerConfig(
        "0.0.0.0", 8000, "secret", "mine", "chat.jinja", "debug", True, 1.5
    )


@pytest.mark.parametrize("config_class", [EngineConfig, ServerConfig])
def test_flags_without_values_give_the_defaults(config_class: type) -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, config_class)
    required = {
        field.name: "m"
        for field in dataclasses.fields(config_class)
        if field.default is dataclasses.MISSING
    }
    arguments = [text for name in required for text in (flag_name(name), "m")]
    assert from_args(config_class, parser.parse_args(arguments)) == config_class(**required)


@pytest.mark.parametrize("config_class", [EngineConfig, ServerConfig])
def test_every_flag_has_help(config_class: type) -> None:
    assert all(field.metadata["help"] for field in dataclasses.fields(config_class))


def test_absent_model_path_is_named() -> None:
    with pytest.raises(ConfigError, match="--model-path must be given"):
        parse_engine()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model_path", "", "--model-path is empty"),
        ("dtype", "int3", "--dtype is 'int3'; allowed: auto, float32, bfloat16, float16"),
        ("device", "abacus", "--device is 'abacus'; allowed: auto, cpu, tpu, gpu"),
        ("tp_size", 0, "--tp-size is 0; allowed: 1 or more"),
        ("dp_size", -1, "--dp-size is -1"),
        ("ep_size", 0, "--ep-size is 0; allowed: 1 or more"),
        ("ep_size", 2, "--ep-size is 2; allowed: a divisor of --tp-size, which is 1"),
        ("tp_size", 2.0, "--tp-size is 2.0; allowed: a value of type int"),
        ("tp_size", True, "--tp-size is True; allowed: a value of type int"),
        ("tp_size", None, "--tp-size is None; allowed: a value of type int"),
        ("page_size", 0, "--page-size is 0"),
        ("mem_fraction_static", 0.0, "--mem-fraction-static is 0.0; allowed: above 0 and up to 1"),
        ("mem_fraction_static", 1.01, "--mem-fraction-static is 1.01"),
        ("mem_fraction_static", float("nan"), "--mem-fraction-static is nan"),
        ("max_total_tokens", 0, "--max-total-tokens is 0"),
        ("context_length", 0, "--context-length is 0"),
        ("max_running_requests", 0, "--max-running-requests is 0"),
        ("chunked_prefill_size", -1, "--chunked-prefill-size is -1"),
        ("random_seed", -1, "--random-seed is -1"),
        ("random_seed", 2**32, "--random-seed is 4294967296"),
        ("compile_cache_bytes", 0, "--compile-cache-bytes is 0"),
        ("disable_overlap_schedule", "no", "--disable-overlap-schedule is 'no'"),
    ],
)
def test_engine_setting_out_of_range_is_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**{"model_path": "m", field: value})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("port", 0, "--port is 0; allowed: 1 to 65535"),
        ("port", 65536, "--port is 65536"),
        ("drain_timeout_s", -1.0, "--drain-timeout-s is -1.0"),
        ("drain_timeout_s", float("nan"), "--drain-timeout-s is nan"),
        ("log_level", "loud", "--log-level is 'loud'; allowed: debug, info"),
    ],
)
def test_server_setting_out_of_range_is_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ServerConfig(**{field: value})
    assert message in str(caught.value)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(model_path="m", tp_size=0, dtype="int3", mem_fraction_static=2.0)
    assert all(flag in str(caught.value) for flag in ("--tp-size", "--dtype", "--mem-fraction"))


@pytest.mark.parametrize(
    ("given", "meant"), [("half", "float16"), ("float", "float32"), ("auto", "auto")]
)
def test_dtype_aliases_are_resolved(given: str, meant: str) -> None:
    assert EngineConfig(model_path="m", dtype=given).dtype == meant


def test_cuda_is_a_gpu() -> None:
    assert EngineConfig(model_path="m", device="cuda").device == "gpu"


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig(model_path="m").tp_size = 2


# ---- the environment and JAX --------------------------------------------------------------------


def test_xdg_cache_home_moves_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache_dir() == tmp_path / "jaxserve"
    assert compile_cache_path(EngineConfig(model_path="m")) == tmp_path / "jaxserve" / "compile"


def test_cache_is_under_home_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache_dir() == tmp_path / ".cache" / "jaxserve"


def test_compile_cache_can_be_turned_off() -> None:
    assert compile_cache_path(EngineConfig(model_path="m", compile_cache_dir="none")) is None


def test_a_cache_set_through_jax_stays(compile_cache: Path) -> None:
    configure_jax(EngineConfig(model_path="m"))
    assert jax.config.jax_compilation_cache_dir == str(compile_cache)


def test_named_compile_cache_is_used_and_private(compile_cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "compiled"
    try:
        configure_jax(EngineConfig(model_path="m", compile_cache_dir=str(path)))
        jax.jit(lambda x: x * 3 + 41)(1.0).block_until_ready()
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        assert any(entry.name.endswith("-cache") for entry in path.iterdir())
    finally:
        configure_jax(EngineConfig(model_path="m", compile_cache_dir=str(compile_cache)))


def test_too_few_cpu_devices_is_an_error_once_jax_runs() -> None:
    jax.devices()
    with pytest.raises(ConfigError, match="--tp-size times --dp-size is 9, but JAX has already"):
        configure_jax(EngineConfig(model_path="m", device="cpu", tp_size=9))


def test_a_platform_that_is_absent_is_an_error() -> None:
    before = jax.config.jax_platforms
    jax.devices()
    with pytest.raises(ConfigError, match="--device tpu: JAX cannot use it"):
        configure_jax(EngineConfig(model_path="m", device="tpu"))
    assert jax.config.jax_platforms == before


def test_cpu_gets_as_many_devices_as_the_mesh_needs() -> None:
    code = (
        "import jax; from jaxserve.config import EngineConfig, configure_jax; "
        "configure_jax(EngineConfig('m', device='cpu', tp_size=2, dp_size=3)); "
        "print(jax.device_count(), jax.default_backend())"
    )
    environment = {"PATH": "", "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(config_module.__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["6", "cpu"], done.stderr
