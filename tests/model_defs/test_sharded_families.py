"""Every registered architecture, split over a mesh of virtual devices: as on one device."""

from __future__ import annotations

import pytest
from flax import nnx

from model_defs.decoder import placements

from . import harness
from .cases import TOLERANCE, Case, greedy, ragged, worst

MESHES = ((1, 2), (2, 4), (1, 8))  # data-parallel ranks and shards of each


@pytest.mark.parametrize(("dp_size", "tp_size"), MESHES)
def test_sharded_equals_unsharded(case: Case, dp_size: int, tp_size: int) -> None:
    check_mesh(case, harness.load(case.config, case.tensors, dp_size=dp_size, tp_size=tp_size))


def test_experts_over_their_own_mesh_axis_equal_unsharded(case: Case) -> None:
    if not case.has_experts:
        pytest.skip("a model without experts")
    check_mesh(case, harness.load(case.config, case.tensors, tp_size=4, ep_size=2))


def check_mesh(case: Case, model: harness.Model) -> None:
    # Eight partial sums added in another order than one: up to 1.01e-5 was seen, in float32.
    assert worst(ragged(case, model), case.logits) <= TOLERANCE / 5
    if case.spec.task == "generate":
        assert greedy(model, case.prompts) == case.greedy


# Axes of matrices that every device keeps whole, because all of its heads or tokens need them: the
# shared latents of MLA, a router's scores, a text's scores. Small beside the model at real sizes.
WHOLE = {"q_rank", "kv_rank", "router_scores", "gate", "labels", "score_hidden"}


def test_sharding_splits_the_large_parameters(case: Case) -> None:
    model = harness.load(case.config, case.tensors, tp_size=8)
    split, total = 0, 0
    placed = placements(model.module)
    for path, param in nnx.to_flat_state(model.params):
        local = param[...].addressable_shards[0].data.size
        axes = {axis.name for w in placed[path].weights for dim in w.dims for axis in dim}
        if local * 8 != param.size and axes & WHOLE:
            continue
        total += param.size
        split += param.size if local * 8 == param.size else 0
    assert split > 0.98 * total
