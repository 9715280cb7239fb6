"""The one function that is jitted: forward, pick, sample, for one bucket.

What the host knows about a step travels as one int32 array per rank (`StepLayout`); everything
that follows from it (positions, token rows, which logits to take) is computed on the device. The
token a row sampled in the step before is read from a device array, so the host can prepare a step
before it has seen the results of the one that runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.sampling import NUM_COLUMNS, sample, unpack
from jaxserve.scheduler.buckets import Bucket
from model_defs.decoder import Decoder
from model_defs.interface import AttentionMetadata, Caches, ForwardBatch
from model_defs.sharding import ShardingRules


@dataclass(frozen=True)
class StepLayout:
    """Where each field lies in a rank's int32 vector.

        tokens[T] | kv_lens[R] | prompt_lens[R] | slots[R] | flags[R] | query_starts[R+1]
        | distribution[3] | sampling[C*R] | page_table[R*P]

    flags: bit 0, the row's input token is on the device; bit 1, the row samples.
    """

    bucket: Bucket
    pages_per_row: int

    def fields(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        t, r = self.bucket.tokens, self.bucket.rows
        return (
            ("tokens", (t,)),
            ("kv_lens", (r,)),
            ("prompt_lens", (r,)),
            ("slots", (r,)),
            ("flags", (r,)),
            ("query_starts", (r + 1,)),
            ("distribution", (3,)),
            ("sampling", (NUM_COLUMNS, r)),
            ("page_table", (r, self.pages_per_row)),
        )

    @property
    def size(self) -> int:
        return sum(int(np.prod(shape)) for _, shape in self.fields())

    def views(self, vector):
        """Views of a vector (numpy or traced) by field name."""
        views, start = {}, 0
        for name, shape in self.fields():
            stop = start + int(np.prod(shape))
            views[name] = vector[start:stop].reshape(shape)
            start = stop
        return views


ON_DEVICE, SAMPLES = 1, 2


def _rank_inputs(layout: StepLayout, vector, last_tokens):
    """One rank's vector -> (ForwardBatch, sampling columns, slots to write)."""
    f = layout.views(vector)
    t, r = layout.bucket.tokens, layout.bucket.rows
    starts = f["query_starts"]
    index = jnp.arange(t, dtype=jnp.int32)
    row = jnp.searchsorted(starts[1:], index, side="right", method="compare_all")
    row = jnp.minimum(row, r - 1).astype(jnp.int32)
    live = index < starts[f["distribution"][2]]
    positions = jnp.where(live, f["kv_lens"][row] - starts[row + 1] + index, 0)
    pending = (f["flags"] & ON_DEVICE)[row] != 0
    tokens = jnp.where(pending & live, last_tokens[f["slots"][row]], f["tokens"])
    batch = ForwardBatch(
        tokens=tokens,
        positions=positions,
        prompt_lens=f["prompt_lens"][row],
        attention=AttentionMetadata(f["kv_lens"], f["page_table"], starts, f["distribution"]),
        sample_at=jnp.maximum(starts[1:] - 1, 0),
    )
    slots = jnp.where(f["flags"] & SAMPLES != 0, f["slots"], last_tokens.shape[0])
    return batch, f["sampling"], slots


def step_inputs(layout: StepLayout, rules: ShardingRules, packed, last_tokens):
    """All ranks' vectors `i32[ranks, n]` -> one batch whose arrays are the ranks' concatenated."""
    if packed.shape[0] == 1:
        return _rank_inputs(layout, packed[0], last_tokens[0])
    batch, sampling, slots = jax.vmap(partial(_rank_inputs, layout))(packed, last_tokens)
    batch = jax.tree.map(
        lambda x: rules.constrain(x.reshape(-1, *x.shape[2:]), "rows", *(None,) * (x.ndim - 2)),
        batch,
    )
    return batch, sampling.transpose(1, 0, 2).reshape(NUM_COLUMNS, -1), slots


def forward_and_sample(
    merge: Callable[[tuple[jax.Array, ...]], Decoder],
    layout: StepLayout,
    rules: ShardingRules,
    params: tuple[jax.Array, ...],
    caches: Caches,
    last_tokens: jax.Array,
    packed: jax.Array,
) -> tuple[jax.Array, jax.Array, Caches]:
    """Run one step.

    Args:
        caches, last_tokens: donated. last_tokens: i32[ranks, slots].
        packed: i32[ranks, layout.size].

    Returns:
        i32[ranks, R] sampled tokens (meaningless in rows that do not sample), the new
        last_tokens, the new caches.
    """
    model = merge(params)
    ranks, rows = packed.shape[0], layout.bucket.rows
    batch, sampling, slots = step_inputs(layout, rules, packed, last_tokens)
    hidden, caches = model(batch, caches)
    logits = model.logits(model.pick(hidden, batch))
    logits = rules.constrain(logits.astype(jnp.float32), "rows", None)
    sampled = sample(logits, unpack(sampling)).reshape(ranks, rows)
    if ranks == 1:
        last_tokens = last_tokens.at[0, slots].set(sampled[0], mode="drop")
    else:
        write = jax.vmap(lambda last, at, new: last.at[at].set(new, mode="drop"))
        last_tokens = write(last_tokens, slots, sampled)
    return sampled, last_tokens, caches


def forward_and_read(
    merge: Callable[[tuple[jax.Array, ...]], Decoder],
    layout: StepLayout,
    rules: ShardingRules,
    params: tuple[jax.Array, ...],
    caches: Caches,
    last_tokens: jax.Array,
    packed: jax.Array,
) -> tuple[jax.Array, jax.Array, Caches]:
    """Run one step of a model that reads texts and writes none.

    Args:
        as of `forward_and_sample`.

    Returns:
        f32[ranks, R, O], what the step adds to each row's result (see `Decoder.read`), last_tokens
        as they were, the new caches.
    """
    model = merge(params)
    batch, _, _ = step_inputs(layout, rules, packed, last_tokens)
    hidden, caches = model(batch, caches)
    values = rules.constrain(model.read(hidden, batch), "rows", None)
    return values.reshape(packed.shape[0], layout.bucket.rows, -1), last_tokens, caches


def forward_layers(
    merge: Callable[[tuple[jax.Array, ...]], Decoder],
    layout: StepLayout,
    rules: ShardingRules,
    params: tuple[jax.Array, ...],
    caches: Caches,
    packed: jax.Array,
) -> tuple[tuple[jax.Array, ...], jax.Array, Caches]:
    """The same forward pass, showing its inside: every layer's and every token's output.

    Returns:
        per layer `[T, D]` of the residual stream; logits `f32[T, V]` (scores or hidden states where
        the model is for these); the new caches.
    """
    model = merge(params)
    last_tokens = jnp.zeros((packed.shape[0], 1), jnp.int32)
    batch, _, _ = step_inputs(layout, rules, packed, last_tokens)
    outputs = tuple(model.layer_outputs(batch, caches))
    hidden = model.norm(outputs[-1][0])
    return (
        tuple(x for x, _ in outputs),
        model.outputs(hidden).astype(jnp.float32),
        tuple(cache for _, cache in outputs),
    )
