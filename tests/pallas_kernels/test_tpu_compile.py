"""The TPU kernel compiled for real chips that are not here, and reading compiled text."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from pallas_kernels import tpu_aot
from pallas_kernels.ragged_paged_attention import (
    BlockSparse,
    cache_shape,
    default_page_size,
    ragged_paged_attention,
)

NUM_PAGES = 512
TOKENS_OF_A_ROW = 8192
# name: tokens, rows, query heads, kv heads, head_dim, v_head_dim, and what differs from the rest.
CASES = {
    "llama3_8b_tp4-decode": (64, 64, 8, 2, 128, 128, {}),
    "llama3_8b_tp4-mixed": (2048, 64, 8, 2, 128, 128, {}),
    "deepseek_v3_tp8-mixed": (512, 32, 16, 1, 576, 512, {"shared_kv": True}),
    "gemma2_9b_tp8-mixed": (512, 64, 2, 1, 256, 256, {"window": 4096, "softcap": 50.0}),
    "alibi_dim80_page16": (128, 16, 8, 8, 80, 80, {"alibi": True, "page_size": 16}),
    "group3_dim64_float32": (128, 16, 9, 3, 64, 64, {"dtype": "float32", "page_size": 64}),
    "many_kv_heads_dim96": (8, 8, 32, 32, 96, 96, {}),
}


@pytest.fixture(scope="module", params=sorted(tpu_aot.CHIPS))
def device(request: pytest.FixtureRequest):
    return first_device(request.param)


def first_device(chip: str):
    try:
        return tpu_aot.topology_devices(tpu_aot.CHIPS[chip].topology)[0]
    except tpu_aot.NoTopology as reason:
        pytest.skip(str(reason))


def lower(
    device,
    tokens: int,
    rows: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    v_head_dim: int,
    *,
    page_size: int | None = None,
    dtype: str = "bfloat16",
    shared_kv: bool = False,
    alibi: bool = False,
    block_sparse: BlockSparse | None = None,
    **options,
):
    """Lower one call for `device`; returns it and the cache's shape and dtype."""
    page_size = page_size or default_page_size("tpu")
    array = partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
    shape = cache_shape(
        NUM_PAGES,
        page_size,
        kv_heads,
        head_dim,
        v_head_dim,
        dtype,
        shared_kv=shared_kv,
        platform="tpu",
    )
    cache = array(shape, jnp.dtype(dtype))
    arrays = (
        array((tokens, heads, head_dim), dtype),
        array((tokens, kv_heads, head_dim), dtype),
        None if shared_kv else array((tokens, kv_heads, v_head_dim), dtype),
        cache,
        array((rows,), jnp.int32),
        array((rows, TOKENS_OF_A_ROW // page_size), jnp.int32),
        array((rows + 1,), jnp.int32),
        array((3,), jnp.int32),
    )
    if alibi:
        options["alibi_slopes"] = np.ones(heads, np.float32)
    if block_sparse is not None:
        options |= {"block_sparse": block_sparse, "block_offsets": np.zeros(heads, np.int32)}

    def call(*arrays):
        return ragged_paged_attention(
            *arrays, scale=head_dim**-0.5, v_head_dim=v_head_dim, **options
        )

    return jax.jit(call, donate_argnums=3).lower(*arrays), cache


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_compiles_and_updates_a_donated_cache_in_place(device, case):
    *sizes, options = CASES[case]
    lowered, cache = lower(device, *sizes, **options)
    compiled = lowered.compile()
    text = compiled.as_text()
    assert tpu_aot.kernel_calls(text, "ragged_paged_attention") == 1
    assert tpu_aot.arrays_made(text, cache.shape) == []
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == cache.size * cache.dtype.itemsize
    assert memory.temp_size_in_bytes < memory.alias_size_in_bytes


@pytest.mark.parametrize(
    "refused", [{"dtype": "float16"}, {"block_sparse": BlockSparse(64, 16, 8)}]
)
def test_what_the_kernel_refuses_is_left_to_xla(refused):
    lowered, _ = lower(first_device("v6e"), 64, 8, 8, 2, 128, 128, **refused)
    text = lowered.as_text()
    assert "tpu_custom_call" not in text
    assert "while" in text


def test_flops_and_collectives_are_read_from_compiled_text():
    try:
        devices = tpu_aot.topology_devices(tpu_aot.CHIPS["v5e"].topology)
    except tpu_aot.NoTopology as reason:
        pytest.skip(str(reason))
    mesh = jax.sharding.Mesh(np.array(devices), ("x",))

    def array(*shape_and_spec):
        shape, spec = shape_and_spec
        sharding = jax.sharding.NamedSharding(mesh, jax.P(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

    compiled = (
        jax.jit(
            lambda x, up, down: jax.nn.silu(x @ up) @ down, out_shardings=array((), ()).sharding
        )
        .lower(
            array((256, 512), ()), array((512, 1024), (None, "x")), array((1024, 512), ("x", None))
        )
        .compile()
    )
    text = compiled.as_text()
    assert tpu_aot.matmul_flops(text) == 2 * 2 * 256 * 512 * 1024 // 4
    (reduce,) = tpu_aot.collectives(text)
    assert reduce.op.removesuffix("-start") == "all-reduce"
    assert reduce.num_bytes in (256 * 512 * 2, 256 * 512 * 4)


def test_an_unknown_topology_is_named():
    first_device("v5e")
    with pytest.raises(tpu_aot.NoTopology, match=r"cannot compile for v99:2x2: .*pip install"):
        tpu_aot.topology_devices("v99:2x2")
