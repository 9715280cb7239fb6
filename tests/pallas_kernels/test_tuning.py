"""Tuned block sizes: found by device and shape, kept as data; and what times the candidates."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import gpu_timing, tuning
from pallas_kernels.gated_matmul import arg_specs as gated_arg_specs
from pallas_kernels.gated_matmul import bench as gated_bench
from pallas_kernels.gpu_timing import compile_timer
from pallas_kernels.grouped_matmul import arg_specs
from pallas_kernels.grouped_matmul import bench as grouped_bench
from pallas_kernels.grouped_matmul import gpu as grouped_matmul
from pallas_kernels.ragged_paged_attention import gpu, gpu_bench, hopper, hopper_decode
from pallas_kernels.tune import best_of

TAKEN = {
    gpu.DECODE: gpu.Tiling,
    gpu.PREFILL: gpu.Tiling,
    gpu.HOPPER_DECODE: hopper_decode.DecodeConfig,
    gpu.HOPPER_PREFILL: hopper.PrefillConfig,
    grouped_matmul.OP: grouped_matmul.Tiling,
}
LLAMA = gpu.Problem(32, 8, 128, 128, 16, False, 1.0, None, None, None, False, False, False)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning._entries.cache_clear()
    yield tmp_path
    tuning._entries.cache_clear()


def test_the_longest_matching_device_name_counts(folder: Path) -> None:
    tuning.write("nvidia_h100", "op", {"n=1": {"parameters": {"a": 1}}})
    tuning.write("nvidia_h100_nvl", "op", {"n=1": {"parameters": {"a": 2}}})
    assert tuning.tuned("NVIDIA H100 80GB HBM3", "op", "n=1") == {"a": 1}
    assert tuning.tuned("NVIDIA H100 NVL", "op", "n=1") == {"a": 2}
    for device, op, key in (
        ("NVIDIA A100", "op", "n=1"),
        ("NVIDIA H100", "other", "n=1"),
        ("NVIDIA H100", "op", "n=2"),
        (None, "op", "n=1"),
    ):
        assert tuning.tuned(device, op, key) is None


def test_writing_keeps_other_shapes(folder: Path) -> None:
    tuning.write("card", "op", {"n=1": {"parameters": {"a": 1}}})
    tuning.write("card", "op", {"n=2": {"parameters": {"a": 2}}})
    assert tuning.tuned("card", "op", "n=1") == {"a": 1}
    assert tuning.tuned("card", "op", "n=2") == {"a": 2}


def test_files_in_the_package_hold_what_the_kernels_take() -> None:
    files = list(tuning.FOLDER.glob("*.json"))
    assert files
    for path in files:
        for op, entries in json.loads(path.read_text()).items():
            for entry in entries.values():
                assert entry["measured"]
                TAKEN[op](**entry["parameters"])


def test_a_tuned_shape_gets_its_sizes_and_any_other_the_default() -> None:
    tuned = gpu.decode_tiling(LLAMA, "NVIDIA H100 80GB HBM3")
    entries = json.loads((tuning.FOLDER / "nvidia_h100.json").read_text())[gpu.DECODE]
    assert tuned == gpu.Tiling(**entries[gpu.tuning_key(LLAMA)]["parameters"])
    other = replace(LLAMA, head_dim=96, v_head_dim=96)
    assert gpu.decode_tiling(other, "NVIDIA H100 80GB HBM3") == gpu.decode_tiling(other)


@pytest.mark.parametrize(
    ("device_kind", "count"),
    [
        ("NVIDIA H100 80GB HBM3", 132),
        ("NVIDIA H100 PCIe", 114),
        ("NVIDIA H200", 132),
        ("NVIDIA H20", 78),
        ("NVIDIA GH200 480GB", 132),
    ],
)
def test_a_program_for_every_multiprocessor(device_kind: str, count: int) -> None:
    config = gpu.hopper_config(LLAMA, device_kind)
    assert config is not None and config.num_programs == count


def test_the_best_sizes_are_best_over_all_cases() -> None:
    times = {"short": {"a": 1.0, "b": 1.1, "c": 0.9}, "long": {"a": 10.0, "b": 8.0}}
    assert best_of(times) == "b"


def test_keys_of_cases_and_of_kernels_agree() -> None:
    case = gpu_bench.CASES[0]
    assert case.key() == gpu.tuning_key(LLAMA)


def test_counted_work_is_that_of_the_published_figures() -> None:
    by_name = {case.name: case for case in gpu_bench.CASES}
    assert by_name["decode_64x1024"].kv_bytes == 64 * 1024 * 8 * 128 * 2 * 2
    assert by_name["prefill_1x8192"].flops == 2 * 8192**2 * 32 * 128


def test_rows_of_many_lengths_count_what_they_hold() -> None:
    case = gpu_bench.Case("x", rows=5, new=1, kv=50, num_kv_heads=2, head_dim=16, shortest=10)
    kv_lens, page_table, _, _ = case.metadata()
    assert 10 <= kv_lens.min() < kv_lens.max() <= 50
    assert page_table.shape == (5, 4)
    assert case.kv_bytes == int(kv_lens.sum()) * 2 * 2 * 16 * 2
    assert case.flops == 4 * int(kv_lens.sum()) * 32 * 16


def test_a_record_has_rates_and_shares_of_what_the_card_reaches() -> None:
    card = gpu_timing.Card("NVIDIA H100", bytes_per_s=2.5e12, flops_per_s=6e14)
    record = card.record({"op": "x"}, 1e-4, num_bytes=200_000_000, flops=30_000_000_000)
    assert record.pop("jax") == jax.__version__
    assert record == {
        "op": "x",
        "us": 100.0,
        "tb_per_s": 2.0,
        "share_of_copy": 0.8,
        "tflop_per_s": 300.0,
        "share_of_matmul": 0.5,
        "device": "NVIDIA H100",
    }


def test_benches_of_gpus_yield_a_record_for_every_case(monkeypatch: pytest.MonkeyPatch) -> None:
    card = gpu_timing.Card("NVIDIA H100", bytes_per_s=2.5e12, flops_per_s=6e14)
    monkeypatch.setattr(gpu_timing.Card, "measured", lambda: card)
    gated = gated_arg_specs.ArgSpec("small", 4, 16, 8)
    grouped = arg_specs.ArgSpec("small", 8, 2, 16, 8, (4, 4), "bfloat16")
    monkeypatch.setattr(gated_bench, "GPU_SPECS", (gated,))
    monkeypatch.setattr(grouped_bench, "GPU_SPECS", (grouped,))
    found = [
        *gated_bench.records("", ("xla",)),
        *grouped_bench.gpu_records("", ("ragged_dot",)),
    ]
    assert [(each["op"], each["case"]) for each in found] == [
        ("gated_matmul", "small"),
        ("grouped_matmul", "small"),
    ]
    assert all(each["device"] == card.kind for each in found)


def test_cases_run_as_they_are_timed() -> None:
    for name in ("decode_1x1024", "prefill_1x2048"):
        case = next(case for case in gpu_bench.CASES if case.name == name)
        small = replace(case, new=min(case.new, 24), kv=24, num_heads=4, num_kv_heads=2)
        tiling = gpu.Tiling(16, 16, 4, 2, programs=4)
        gpu_bench.case_timer(
            replace(small, head_dim=16), device_kind=None, sizes=tiling, interpret=True
        )()


def test_the_time_of_a_call_is_a_share_of_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_program(run):
        assert run().shape == (3,)
        return 6.0

    def make():
        return [jnp.ones((8, 8))] * 2, (jnp.eye(8),)

    monkeypatch.setattr(gpu_timing, "seconds_per_run", of_program)
    assert compile_timer(lambda x, y: x @ y, make, calls=3)() == 2.0


def test_runs_are_timed_with_what_they_wait_for() -> None:
    assert gpu_timing.seconds_per_run(lambda: time.sleep(0.01)) >= 0.01


@pytest.mark.parametrize("module", ["bench", "tune"])
def test_commands_explain_themselves(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"pallas_kernels.{module}", "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(tuning.__file__).parents[1],
    )
    assert f"python -m pallas_kernels.{module}" in done.stdout
