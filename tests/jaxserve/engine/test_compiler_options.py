"""XLA's options for a step."""

import pytest

from jaxserve.engine.runner import CUBLAS_TOKENS, compiler_options
from jaxserve.scheduler.buckets import Bucket


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_only_gpus_need_options(platform: str) -> None:
    assert compiler_options(platform, Bucket(8192, 64)) is None


def test_large_products_on_gpus_are_left_to_cublas() -> None:
    small, large = (
        compiler_options("gpu", Bucket(tokens, 64)) for tokens in (CUBLAS_TOKENS - 1, 8192)
    )
    assert small is not None and small["xla_gpu_enable_triton_gemm"]
    assert large is not None and not large["xla_gpu_enable_triton_gemm"]


def test_branches_and_loops_of_a_step_stay_in_its_graph() -> None:
    options = compiler_options("gpu", Bucket(64, 64))
    assert options is not None
    assert {"CONDITIONAL", "WHILE"} <= set(str(options["xla_gpu_enable_command_buffer"]).split(","))
