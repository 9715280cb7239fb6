"""The gated product: its specification, and the Hopper kernel without a Hopper.

On a machine with one, JAXSERVE_TEST_DEVICE=gpu runs it on the card as well.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import NoImplementation
from pallas_kernels.gated_matmul import gated_matmul, hopper, reference
from pallas_kernels.gated_matmul.arg_specs import ARG_SPECS, GPU_SPECS, ArgSpec
from pallas_kernels.grouped_matmul.arg_specs import gated

from .cuda_lowering import A100, H100, lowered_for_cuda
from .gpu_interpreter import InterpretGPUParams

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-3}  # of the norm of the result
SPEC = ArgSpec("panels", 384, 128, 256)


def difference(spec: ArgSpec, arguments: tuple[jax.Array, jax.Array], out: jax.Array) -> float:
    """Norm of the error relative to the norm of the result, beside a product in float64."""
    assert out.shape == (spec.rows, spec.width)
    assert out.dtype == spec.dtype
    x, w = (np.asarray(each, np.float64) for each in arguments)
    halves = np.split((x @ w).astype(np.float32), 2, axis=1)
    wanted = np.asarray(spec.combine(*map(jnp.asarray, halves)), np.float64)
    return float(np.linalg.norm(np.asarray(out, np.float64) - wanted) / np.linalg.norm(wanted))


def interpreted(spec: ArgSpec, seed: int = 0, **tiling: int) -> float:
    """Error of the kernel in the interpreter."""
    call = partial(
        hopper.gated_matmul,
        combine=spec.combine,
        device_kind=H100,
        tiling=hopper.Tiling(**{"programs": 2, **tiling}),
        interpret=InterpretGPUParams(),
    )
    arguments = spec.arguments(seed)
    return difference(spec, arguments, jax.jit(call)(*arguments))


def lowered(spec: ArgSpec, device_kind: str | None = H100, **options) -> str:
    call = partial(gated_matmul, combine=spec.combine, device_kind=device_kind, **options)
    return lowered_for_cuda(call, *spec.shapes())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rows", [1, 5, 130])
def test_it_is_the_product_with_its_halves_combined(dtype: str, rows: int) -> None:
    spec = ArgSpec("", rows, 48, 40, dtype)
    arguments = spec.arguments()
    out = jax.jit(partial(gated_matmul, combine=spec.combine))(*arguments)
    assert difference(spec, arguments, out) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("x", "w", "found"),
    [
        ((2, 3), (4, 6), r"\(2, 3\) and \(4, 6\)"),
        ((2, 3), (3, 5), r"even N"),
        ((3,), (3, 4), r"x \[T,K\]"),
    ],
)
def test_shapes_that_do_not_fit_are_named(x, w, found) -> None:
    with pytest.raises(ValueError, match=found):
        gated_matmul(jnp.zeros(x), jnp.zeros(w), combine=gated)


def test_dtypes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="float32 and w bfloat16"):
        gated_matmul(jnp.zeros((2, 3)), jnp.zeros((3, 4), jnp.bfloat16), combine=gated)
    with pytest.raises(ValueError, match="int32"):
        gated_matmul(jnp.zeros((2, 3), jnp.int32), jnp.zeros((3, 4), jnp.int32), combine=gated)


@pytest.mark.parametrize("spec", ARG_SPECS, ids=lambda spec: spec.name)
def test_the_kernel_is_the_product(spec: ArgSpec) -> None:
    assert interpreted(spec) < TOLERANCE[spec.dtype]


@pytest.mark.parametrize(
    "tiling",
    [
        {"programs": 1, "stages": 1, "panel": 2},
        {"programs": 3, "stages": 3, "columns": 64, "panel": 1},
    ],
    ids=str,
)
def test_the_kernel_in_any_tiling(tiling: dict[str, int]) -> None:
    assert interpreted(SPEC, seed=1, **tiling) < TOLERANCE["bfloat16"]


@pytest.mark.parametrize("spec", [*ARG_SPECS, *GPU_SPECS], ids=lambda spec: spec.name)
def test_hopper_gpus_get_the_kernel(spec: ArgSpec) -> None:
    text = lowered(spec)
    assert text.count("mosaic_gpu") >= 1
    assert "dot_general" not in text


def test_other_gpus_do_not() -> None:
    for device_kind in (A100, None):
        text = lowered(ARG_SPECS[0], device_kind)
        assert "mosaic_gpu" not in text
        assert "dot_general" in text


@pytest.mark.parametrize("device_kind", [None, "cpu", "TPU v5 lite", A100])
def test_the_kernel_is_not_even_imported_for_other_devices(
    device_kind: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(hopper, "gated_matmul")
    call = partial(gated_matmul, combine=gated, device_kind=device_kind)
    jax.jit(call).trace(*ARG_SPECS[0].shapes())
    with pytest.raises(AttributeError):
        jax.jit(partial(call, device_kind=H100)).trace(*ARG_SPECS[0].shapes())


@pytest.mark.parametrize("rows", [1, 64, 129, 320])
def test_parts_of_tiles_are_left_to_xla(rows: int) -> None:
    assert "mosaic_gpu" not in lowered(ArgSpec("", rows, 4096, 14336))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rows": 100}, "100 rows, no multiple of 128"),
        ({"inner": 96}, "96 columns of x"),
        ({"width": 192}, "halves of 192 columns, no multiple of 128"),
        ({"dtype": "float32"}, "dtype float32"),
        ({"combine": lambda a, b: jnp.sin(a) * b}, "functions with sin"),
        ({"combine": lambda a, b: jax.nn.relu(a) * b}, "functions with custom_jvp_call"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_it_says_what_it_does_not_do(changes: dict, reason: str) -> None:
    spec = ArgSpec(
        **{"name": "", "rows": 128, "inner": 64, "width": 128, "combine": gated, **changes}
    )
    with pytest.raises(NoImplementation) as refusal:
        lowered(spec, implementation="hopper")
    assert reason in str(refusal.value.exceptions[0])


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [*ARG_SPECS, *GPU_SPECS], ids=lambda spec: spec.name)
def test_on_the_card_it_is_what_xla_makes(spec: ArgSpec) -> None:
    kind = jax.devices()[0].device_kind
    arguments = spec.arguments(seed=7)
    call = partial(hopper.gated_matmul, combine=spec.combine, device_kind=kind)
    out = jax.jit(call)(*arguments).astype(jnp.float32)
    plain = jax.jit(partial(reference.gated_matmul, combine=spec.combine))
    wanted = plain(*arguments).astype(jnp.float32)
    assert jnp.linalg.norm(out - wanted) < TOLERANCE[spec.dtype] * jnp.linalg.norm(wanted)
