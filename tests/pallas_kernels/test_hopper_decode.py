"""The Hopper decode kernel without a Hopper: lowering, refusals, and numbers when interpreted.

On a machine with one, JAXSERVE_TEST_DEVICE=gpu runs it on the card as well.
"""

import itertools
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.ragged_paged_attention import gpu, gpu_bench, hopper_decode
from pallas_kernels.ragged_paged_attention.arg_specs import ARG_SPECS, WIDTHS, ArgSpec
from pallas_kernels.ragged_paged_attention.hopper_decode import DecodeConfig

from .cuda_lowering import H100, lowered_for_cuda
from .gpu_interpreter import InterpretGPUParams
from .test_gpu_attention import TOLERANCE, relative_error


def singles(spec: ArgSpec) -> ArgSpec:
    """A spec's rows of one token, in 16 bits.

    The tokens of padding keep the copy of the last queries within the array. On a card, what lies
    past its end reads as zeros; the interpreter raises.
    """
    rows = tuple(row for row in spec.rows if row[0] == 1)
    dtype = "bfloat16" if spec.dtype == "float32" else spec.dtype
    return replace(spec, rows=rows, tokens=-(-len(rows) // 8) * 8 + 8, dtype=dtype)


def is_taken(spec: ArgSpec) -> bool:
    return (
        spec.rows[:1] != ()
        and spec.rows[0][0] == 1
        and spec.head_dim == spec.v_head_dim
        and spec.head_dim in (64, 128, 192, 256)
        and not (spec.alibi or spec.block_sparse or spec.shared_kv)
    )


TAKEN = [singles(spec) for spec in (*ARG_SPECS, *WIDTHS) if is_taken(spec)]
ROWS = ((1, 37), (1, 64), (1, 1), (1, 300), (1, 129))
SPEC = ArgSpec("ragged", ROWS, 6, 8, 8, 2, 64, 64, page_size=16, dtype="bfloat16")
LLAMA = ArgSpec("llama", (), 64, 64, 32, 8, 128, 128, page_size=16, dtype="bfloat16")


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = partial(hopper_decode.decode, interpret=InterpretGPUParams())
    monkeypatch.setattr(hopper_decode, "decode", decode)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("spec", TAKEN, ids=lambda spec: spec.name)
def test_the_kernel_equals_the_reference(spec):
    config = DecodeConfig(programs=16)
    error = relative_error(spec, seed=5, decode=config, decode_only=True)
    assert error < TOLERANCE[spec.dtype]


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (DecodeConfig(stages=1, programs=1), {}),
        (DecodeConfig(stages=3, programs=6), {"window": 100}),
        (DecodeConfig(programs=1000), {"window": 65}),
        (DecodeConfig(keys=128, programs=1), {"softcap": 30.0, "page_size": 32}),
        (DecodeConfig(keys=192, programs=8), {"page_size": 64, "dtype": "float16"}),
        (DecodeConfig(keys=256, stages=1, programs=2), {"page_size": 128}),
        (DecodeConfig(), {"page_size": 256, "window": 1}),
        (DecodeConfig(), {"num_heads": 2}),
        (DecodeConfig(), {"num_heads": 10}),
        (DecodeConfig(), {"num_heads": 24}),
        (DecodeConfig(), {"num_heads": 32}),
        (DecodeConfig(), {"num_heads": 64, "num_kv_heads": 1}),
    ],
    ids=str,
)
def test_every_config_equals_the_reference(config, changes):
    spec = replace(SPEC, tokens=16, **changes)
    error = relative_error(spec, seed=6, decode=config, decode_only=True)
    assert error < TOLERANCE[spec.dtype]


@pytest.mark.usefixtures("interpreted")
def test_rows_of_several_tokens_stay_what_they_are():
    spec = next(spec for spec in ARG_SPECS if spec.name == "llama3_8b_tp4-mixed")
    assert relative_error(spec, seed=8, decode=DecodeConfig()) < TOLERANCE[spec.dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("spec", TAKEN, ids=lambda spec: spec.name)
@pytest.mark.parametrize("full", [False, True])
def test_the_kernel_on_the_card_equals_the_reference(spec, full):
    if full:  # The last queries are copied from past the end of the array.
        spec = replace(spec, rows=(spec.rows * 8)[:8], tokens=8)
        spec = replace(spec, row_slots=max(8, spec.row_slots))
    default = hopper_decode.default_config(spec.head_dim, spec.num_heads // spec.num_kv_heads)
    for config in (default, replace(default, stages=1, programs=16)):
        error = relative_error(spec, seed=7, interpret=False, decode=config, decode_only=True)
        assert error < TOLERANCE[spec.dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [((1, 1024),), ((1, 4096),) * 64, ((1, 20_000), (1, 3))])
def test_long_rows_on_the_card_equal_the_reference(rows):
    spec = replace(LLAMA, rows=rows, tokens=len(rows), row_slots=len(rows))
    for config in (None, DecodeConfig(keys=128), DecodeConfig(stages=3, programs=100)):
        config = config or hopper_decode.default_config(spec.head_dim, 4)
        error = relative_error(spec, seed=9, interpret=False, decode=config, decode_only=True)
        assert error < TOLERANCE[spec.dtype]


def lowered(spec: ArgSpec, **options) -> str:
    """The program of a whole attention call, for CUDA."""
    pages, rows, i32 = 512, spec.row_slots, jnp.int32
    cache = (pages, spec.num_kv_heads, spec.page_size, 2 * spec.head_dim)
    shapes = (
        jax.ShapeDtypeStruct((spec.tokens, spec.num_heads, spec.head_dim), spec.dtype),
        jax.ShapeDtypeStruct(cache, spec.dtype),
        jax.ShapeDtypeStruct((rows,), i32),
        jax.ShapeDtypeStruct((rows, pages), i32),
        jax.ShapeDtypeStruct((rows + 1,), i32),
        jax.ShapeDtypeStruct((3,), i32),
    )
    group = spec.num_heads // spec.num_kv_heads
    call = partial(
        gpu.attend,
        **{
            "shared_kv": False,
            "scale": spec.head_dim**-0.5,
            "window": spec.window,
            "softcap": spec.softcap,
            "v_head_dim": spec.v_head_dim,
            "decode_only": True,
            "decode": hopper_decode.default_config(spec.head_dim, group),
            **options,
        },
    )
    return lowered_for_cuda(call, *shapes)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (1000, 50.0)])
@pytest.mark.parametrize("page_size", [16, 32, 64, 256])
def test_the_kernel_lowers_for_cuda(page_size, window, softcap):
    spec = replace(LLAMA, page_size=page_size, softcap=softcap, window=window)
    assert "mosaic_gpu" in lowered(spec)


@pytest.mark.parametrize(
    ("head_dim", "num_heads", "num_kv_heads", "dtype"),
    [
        (64, 14, 2, "float16"),
        (128, 40, 8, "bfloat16"),
        (128, 64, 1, "bfloat16"),
        (192, 16, 16, "bfloat16"),
        (256, 8, 4, "bfloat16"),
    ],
)
def test_every_head_dim_lowers_for_cuda(head_dim, num_heads, num_kv_heads, dtype):
    spec = replace(
        LLAMA,
        head_dim=head_dim,
        v_head_dim=head_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        dtype=dtype,
    )
    assert "mosaic_gpu" in lowered(spec)


def test_the_kernel_is_chosen_by_its_config_only():
    assert "mosaic_gpu" not in lowered(LLAMA, decode=None, device_kind=H100)


@settings(max_examples=60, deadline=None)
@given(
    lens=st.lists(st.integers(1, 700), min_size=1, max_size=6),
    pieces=st.integers(1, 9),
    window=st.none() | st.integers(1, 300),
)
def test_pieces_are_of_equal_length_and_hold_every_key_once(lens, pieces, window):
    keys, idle = 64, [5, 9]  # rows that have no single token
    config = DecodeConfig(keys=keys, programs=2 * pieces)
    items = hopper_decode.make_items(
        jnp.asarray(lens + idle, jnp.int32),
        jnp.asarray([len(lens)] * 3, jnp.int32),
        num_kv_heads=2,
        window=window,
        config=config,
    )
    fields, firsts, spans = map(np.asarray, items)
    assert firsts[0] == 0
    starts = [0 if window is None else max(0, n - window) // keys * keys for n in lens]
    blocks = [-(-(n - start) // keys) for n, start in zip(lens, starts, strict=True)]
    for first, last in itertools.pairwise(firsts):
        lengths = [-(-(stop - start) // keys) for _, start, stop, _ in fields[first:last]]
        assert all(length > 0 for length in lengths)
        assert sum(lengths) <= -(-sum(blocks) // pieces)
    number = 0
    for row, (length, start) in enumerate(zip(lens, starts, strict=True)):
        assert spans[row, 0] == number
        for _ in range(spans[row, 1]):
            assert fields[number].tolist() == [row, start, fields[number, 2], length]
            start, number = fields[number, 2], number + 1
        assert start == length
    assert (spans[len(lens) :, 1] == 0).all()
    assert firsts[-1] == number


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float32"}, "dtype float32"),
        ({"head_dim": 80, "v_head_dim": 80}, "head_dim 80"),
        ({"page_size": 48}, "page size 48"),
        ({"num_heads": 128, "num_kv_heads": 1}, "128 query heads per kv head"),
        ({"num_heads": 63, "num_kv_heads": 1}, "63 query heads per kv head"),
        ({"num_heads": 4, "num_kv_heads": 1, "tokens": 1}, "4 queries"),
        ({"num_heads": 14, "num_kv_heads": 2, "tokens": 5}, "70 queries"),
    ],
)
def test_what_the_kernel_does_not_do_is_refused(changes, reason):
    with pytest.raises(NotImplementedError, match=reason):
        lowered(replace(LLAMA, **changes))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (DecodeConfig(keys=96), "96 keys"),
        (DecodeConfig(stages=7), "bytes of shared memory"),
    ],
)
def test_configs_that_do_not_fit_are_refused(config, reason):
    with pytest.raises(NotImplementedError, match=reason):
        lowered(LLAMA, decode=config)


def test_candidates_fit_the_cases_they_are_timed_on():
    for case in filter(lambda case: case.is_decode, gpu_bench.CASES):
        spec = replace(LLAMA, num_heads=case.num_heads, page_size=case.page_size)
        for config in gpu_bench.candidates(case, H100)[gpu.HOPPER_DECODE]:
            assert "mosaic_gpu" in lowered(spec, decode=config)


def test_operations_it_has_not_are_refused():
    with pytest.raises(NotImplementedError, match="ALiBi"):
        lowered(LLAMA, alibi_slopes=jnp.ones(LLAMA.num_heads))
