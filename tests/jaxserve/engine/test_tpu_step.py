"""The engine's own step of Llama-3.1-8B, in its real sizes, compiled for TPUs that are not here."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax
import pytest

from jaxserve.engine import roofline
from jaxserve.engine.runner import Runner
from jaxserve.scheduler.buckets import Bucket
from pallas_kernels import tpu_aot

CONFIG = Path(__file__).parents[2] / "data/configs/meta-llama--Llama-3.1-8B.json"
LAYERS, TP_SIZE, ROWS, CONTEXT = 32, 4, 64, 8192
DECODE, MIXED = Bucket(ROWS, ROWS), Bucket(2048, ROWS)
NUM_PAGES = {"v5e": 2300, "v6e": 5500}  # of 128 tokens, which leave little of the memory free

CASES = [
    pytest.param(("v5e", LAYERS, DECODE)),
    pytest.param(("v5e", 2, MIXED)),
    pytest.param(("v6e", 2, DECODE)),
    pytest.param(("v6e", 2, MIXED)),
    pytest.param(("v6e", LAYERS, DECODE), marks=pytest.mark.slow),
]
Step = tuple[Runner, jax.stages.Compiled]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "{}-{}-{}".format(*case))
def case(request: pytest.FixtureRequest) -> tuple[str, int, Bucket]:
    return request.param


@pytest.fixture(scope="module")
def step(case: tuple[str, int, Bucket]) -> Step:
    chip, layers, bucket = case
    try:
        devices = tpu_aot.topology_devices(tpu_aot.CHIPS[chip].topology)
    except tpu_aot.NoTopology as reason:
        pytest.skip(str(reason))
    config = json.loads(CONFIG.read_text("utf-8")) | {"num_hidden_layers": layers}
    runner = roofline.topology_runner(
        config, devices, TP_SIZE, max_rows=ROWS, max_model_len=CONTEXT
    )
    return runner, roofline.compile_step(runner, bucket, NUM_PAGES[chip])


def test_the_step_fits_the_chip(case, step: Step) -> None:
    (chip, _, bucket), (runner, compiled) = case, step
    counts = roofline.count(runner, compiled, bucket, roofline.batch_rows(bucket, 1024))
    assert counts.held_bytes < tpu_aot.CHIPS[chip].hbm_bytes


def test_every_layer_runs_the_kernel_on_its_cache_in_place(case, step: Step) -> None:
    (chip, layers, _), (runner, compiled) = case, step
    text = compiled.as_text()
    assert tpu_aot.kernel_calls(text, "ragged_paged_attention") == layers
    local_cache = (NUM_PAGES[chip], 8 // TP_SIZE, 128, 256)
    assert tpu_aot.arrays_made(text, local_cache) == []
    cache_bytes = NUM_PAGES[chip] * runner.page_bytes
    state = jax.tree.leaves(runner.state_structs(runner.max_rows))
    # A TPU keeps whole rows of 128 lanes.
    lanes = [math.prod(each.shape[:-1]) * -(-each.shape[-1] // 128) * 128 for each in state]
    donated = cache_bytes + sum(4 * count for count in lanes)
    assert 0 <= compiled.memory_analysis().alias_size_in_bytes - donated < 4096


def test_two_all_reduces_a_layer_and_no_weight_is_gathered(case, step: Step) -> None:
    (_, layers, bucket), (_, compiled) = case, step
    found = tpu_aot.collectives(compiled.as_text())
    reduces = [each for each in found if each.op.startswith("all-reduce")]
    # After attention and after the MLP of each layer; one more adds up the split embedding table.
    assert len(reduces) == 2 * layers + 1
    hidden = ("bf16", (bucket.tokens, 4096))
    assert all(set(each.shapes) == {hidden} for each in reduces)
    # The logits of one token a row are put together for sampling; nothing else is gathered.
    (gather,) = [each for each in found if each not in reduces]
    assert gather.op.startswith("all-gather")
    assert max(gather.shapes)[1] in [(TP_SIZE, 128256 // TP_SIZE, ROWS), (ROWS, 128256)]


def test_products_are_those_of_the_model(case, step: Step) -> None:
    (_, layers, bucket), (runner, compiled) = case, step
    layer = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336
    flops = 2 * (bucket.tokens * layers * layer + ROWS * 4096 * 128256) // TP_SIZE
    counts = roofline.count(runner, compiled, bucket, roofline.batch_rows(bucket, 1024))
    assert counts.matmul_flops == flops
    embedding_rows = 2 * 4096 * bucket.tokens
    norms = 2 * 4096 * (2 * layers + 1)
    weights = 2 * (layers * layer + 4096 * 128256) // TP_SIZE
    assert counts.weight_bytes == weights + norms + embedding_rows


def test_rows_fill_a_bucket() -> None:
    assert roofline.batch_rows(Bucket(4, 4), 9) == [(1, 9)] * 4
    assert roofline.batch_rows(Bucket(32, 4), 9) == [(1, 9)] * 3 + [(29, 29)]
