"""The fused linear layer: projections side by side, sharded, padded, biased."""

from __future__ import annotations

import numpy as np
import pytest

from model_defs.layers.linear import Linear, Weight, gather
from model_defs.sharding import Axis

from ..harness import context
from .fill import built

EMBED, FFN, VOCAB = Axis("embed", 6), Axis("ffn", 10), Axis("vocab", 9)


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_projections_of_one_input_come_out_separately(tp_size: int) -> None:
    out = {"a": (FFN,), "b": (Axis("ffn", 7),)}
    layer, w = built(lambda ctx: Linear(ctx, out, (EMBED,), bias=("a", "b")), tp_size=tp_size)
    x = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    for name, y in zip(out, layer(x), strict=True):
        expected = x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
        size = expected.shape[1]
        np.testing.assert_allclose(y[:, :size], expected, atol=1e-5)
        assert not np.any(y[:, size:])  # padding is zero
        assert y.shape[1] % tp_size == 0


@pytest.mark.parametrize("tp_size", [1, 4])
def test_a_split_input_gives_the_whole_output(tp_size: int) -> None:
    layer, w = built(lambda ctx: Linear(ctx, {"a": (EMBED,)}, (FFN,)), tp_size=tp_size)
    x = np.random.default_rng(0).normal(size=(3, 10)).astype(np.float32)
    padded = np.pad(x, ((0, 0), (0, layer.weight.shape[0] - 10)), constant_values=5.0)
    np.testing.assert_allclose(layer(padded)[0], x @ w["a.weight"].T, atol=1e-5)


def test_several_output_axes_are_unfolded() -> None:
    axes = (Axis("q_heads", 3), Axis("head_dim", 4))
    layer, w = built(lambda ctx: Linear(ctx, {"q": axes}, (EMBED,)))
    x = np.random.default_rng(0).normal(size=(2, 6)).astype(np.float32)
    (y,) = layer(x)
    assert y.shape == (2, 3, 4)
    np.testing.assert_allclose(y.reshape(2, 12), x @ w["q.weight"].T, atol=1e-5)


def test_projections_split_differently_do_not_fuse() -> None:
    with pytest.raises(ValueError, match="split over"):
        Linear(context(1, 2), {"a": (FFN,), "b": (EMBED,)}, (EMBED,))


def test_bias_on_some_of_the_projections_is_refused() -> None:
    with pytest.raises(ValueError, match="bias"):
        Linear(context(), {"a": (FFN,), "b": (FFN,)}, (EMBED,), bias=("a",))


def test_gather_reads_the_smallest_box_and_pads_with_zeros() -> None:
    stored = np.arange(40.0).reshape(10, 4)
    boxes = []

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        boxes.append(index)
        return stored[index]

    maps = [np.array([5, 3, -1, 5]), np.array([1, 2])]
    block = gather(Weight("w", ((Axis("embed", 10),), (Axis("embed", 4),))), maps, read)
    assert boxes == [(slice(3, 6), slice(1, 3))]
    np.testing.assert_array_equal(block, [[21, 22], [13, 14], [0, 0], [21, 22]])
    np.testing.assert_array_equal(stored, np.arange(40.0).reshape(10, 4))
