"""DeepSeek checkpoints as published: 8-bit floats with a scale per block, and an extra layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from converters.checkpoint import open_checkpoint
from converters.convert import convert
from converters.hf import write_hf
from converters.plan import plan_checkpoint, stored_dtype
from model_defs.hf_config import UnsupportedConfig
from model_defs.registry import get_family
from model_defs.sharding import ShardingRules, make_abstract_mesh
from model_defs.weights import Expr, Scaled, Source, WeightPlanError

from . import harness, hf_reference

BLOCK = (16, 24)  # not a divisor of every size, as 128 is not of V3's
EXTRA = "model.layers.3"
PROMPTS = [[5, 9, 200, 31, 7], [3, 4]]
Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Tensors]:
    fields = get_family("DeepseekV3ForCausalLM").tiny[0]
    model = hf_reference.make_tiny("DeepseekV3ForCausalLM", fields)
    return hf_reference.save(model, tmp_path_factory.mktemp("deepseek_v3"))


def in_blocks(scale: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    for axis, size in enumerate(BLOCK):
        scale = np.repeat(scale, size, axis)
    return scale[: shape[0], : shape[1]]


def quantised(config: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors, Tensors]:
    """The checkpoint in 8-bit floats, and what its weights then are."""
    stored, full = {}, {}
    for name, array in tensors.items():
        if "_proj" not in name or not name.endswith(".weight"):
            stored[name] = full[name] = array
            continue
        counts = [-(-n // b) for n, b in zip(array.shape, BLOCK, strict=True)]
        padded = np.zeros([c * b for c, b in zip(counts, BLOCK, strict=True)], np.float32)
        padded[: array.shape[0], : array.shape[1]] = np.abs(array)
        tiles = padded.reshape(counts[0], BLOCK[0], counts[1], BLOCK[1])
        scale = tiles.max((1, 3)) / 448
        spread = in_blocks(scale, array.shape)
        stored[name] = (array / spread).astype(ml_dtypes.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale
        full[name] = stored[name].astype(np.float32) * spread
    how = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(BLOCK),
    }
    return {**config, "quantization_config": how}, stored, full


def test_blocks_are_scaled_and_the_extra_layer_is_left_out(plain, tmp_path: Path) -> None:
    config, tensors = plain
    config, stored, full = quantised(config, tensors)
    first = [name for name in stored if name.startswith("model.layers.2.")]
    extra = {name.replace("model.layers.2", EXTRA): stored[name] for name in first}
    extra[f"{EXTRA}.eh_proj.weight"] = np.ones((4, 8), np.float32)
    write_hf(tmp_path / "fp8", config, {**stored, **extra}.items())
    checkpoint = open_checkpoint(tmp_path / "fp8")
    assert str(checkpoint.headers["model.layers.0.self_attn.o_proj.weight"].dtype) == (
        "float8_e4m3fn"
    )
    made = plan_checkpoint(checkpoint, ShardingRules(make_abstract_mesh(1, 1)))
    assert made.weights.dropped == tuple(sorted(extra))

    read = {name: checkpoint.read(name) for name in checkpoint.headers}
    ours = harness.full_logits(harness.load(config, read), PROMPTS)
    wanted = harness.full_logits(harness.load(plain[0], full), PROMPTS)
    for a, b in zip(ours, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


def test_conversion_keeps_the_full_weights(plain, tmp_path: Path) -> None:
    config, stored, full = quantised(*plain)
    write_hf(tmp_path / "fp8", config, stored.items())
    convert(tmp_path / "fp8", tmp_path / "orbax", "orbax")
    converted = open_checkpoint(tmp_path / "orbax")
    plan_checkpoint(converted, ShardingRules(make_abstract_mesh(1, 1)))
    again = converted.read("decoder.layers.0.mixer.o_proj.weight")
    np.testing.assert_array_equal(again, full["model.layers.0.self_attn.o_proj.weight"])


def test_eight_bit_floats_are_not_a_dtype_to_compute_in(plain, tmp_path: Path) -> None:
    config, stored, _ = quantised(*plain)
    stored = {n: a.astype(ml_dtypes.bfloat16) if a.ndim == 1 else a for n, a in stored.items()}
    stored["model.embed_tokens.weight"] = stored["model.embed_tokens.weight"].astype(np.float16)
    stored["lm_head.weight"] = stored["lm_head.weight"].astype(np.float16)
    write_hf(tmp_path / "fp8", config, stored.items())
    assert stored_dtype(open_checkpoint(tmp_path / "fp8")) == np.float16


def test_any_part_of_a_scaled_matrix_can_be_read() -> None:
    rng = np.random.default_rng(0)
    weight = rng.integers(-9, 9, (37, 50)).astype(ml_dtypes.float8_e4m3fn)
    arrays = {"x.weight": weight, "x.weight_scale_inv": rng.random((3, 3)).astype(np.float32)}
    headers: dict[str, Expr] = {n: Source(n, a.shape, str(a.dtype)) for n, a in arrays.items()}
    (expr,) = Scaled("weight_scale_inv", BLOCK).forward(headers).values()
    full = weight.astype(np.float32) * in_blocks(arrays["x.weight_scale_inv"], weight.shape)
    for box in (
        (slice(0, 37), slice(0, 50)),
        (slice(15, 33), slice(47, 50)),
        (slice(36, 37), slice(23, 25)),
        (slice(4, 4), slice(0, 9)),
    ):
        part = expr.read(box, lambda name, index: arrays[name][index])
        np.testing.assert_array_equal(part, full[box])
    assert set(expr.sources()) == set(arrays)


def test_scales_that_do_not_fit_are_named(plain) -> None:
    config, stored, _ = quantised(*plain)
    name = "model.layers.0.self_attn.o_proj.weight"
    lost = {n: a for n, a in stored.items() if n != f"{name}_scale_inv"}
    with pytest.raises(WeightPlanError, match=rf"{name} is stored in float8_e4m3fn, but there"):
        harness.load(config, lost)
    wrong = {**stored, f"{name}_scale_inv": np.ones((1, 1), np.float32)}
    with pytest.raises(WeightPlanError, match=rf"{name} is \[64, 48\] and its scales \[1, 1\]"):
        harness.load(config, wrong)


def test_other_quantisations_are_refused(plain) -> None:
    config = {**plain[0], "quantization_config": {"quant_method": "awq"}}
    with pytest.raises(UnsupportedConfig, match=r"'quantization_config.quant_method' is 'awq'"):
        get_family("DeepseekV3ForCausalLM").spec(config)
