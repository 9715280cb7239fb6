"""The one function that is jitted: forward, pick, sample, for one bucket.

What the host knows about a step travels as one int32 array per rank (`StepLayout`); everything
that follows from it (positions, token rows, which logits to take) is computed on the device. What a
row keeps from step to step stays there (`RowState`): the token it sampled, so that the host can
prepare a step before it has seen the results of the one that runs, and its page table, so that a
step carries only the pages it writes to and not every page of every row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import jax
import jax.numpy as jnp

from jaxserve.sampling import NUM_COLUMNS, sample, unpack
from jaxserve.scheduler.buckets import Bucket
from model_defs.decoder import Decoder
from model_defs.interface import AttentionMetadata, Caches, ForwardBatch
from model_defs.sharding import ShardingRules


@partial(
    jax.tree_util.register_dataclass, data_fields=["last_tokens", "page_table"], meta_fields=[]
)
@dataclass(frozen=True)
class RowState:
    """What the device keeps of each row slot between steps; a request keeps its slot as it runs.

    last_tokens: i32[ranks, slots], what the row sampled last.
    page_table: i32[ranks, slots, P], the pages of the tokens computed so far.
    """

    last_tokens: jax.Array
    page_table: jax.Array


@dataclass(frozen=True)
class StepLayout:
    """Where each field lies in a rank's int32 vector.

        tokens[T] | kv_lens[R] | prompt_lens[R] | slots[R] | flags[R] | query_starts[R+1]
        | distribution[3] | sampling[C*R] | new_pages[N]

    flags: bit 0, the row's input token is on the device; bit 1, the row samples.
    new_pages: row after row, the pages that this step's tokens of the row are written to.
    """

    bucket: Bucket
    page_size: int

    @cached_property
    def max_new_pages(self) -> int:
        """Most pages a step can write to: a token is in one, a row of q in q // page_size + 2."""
        t, r = self.bucket.tokens, self.bucket.rows
        return min(t, 2 * r + t // self.page_size)

    @cached_property
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
            ("new_pages", (self.max_new_pages,)),
        )

    @cached_property
    def _places(self) -> tuple[tuple[str, slice, tuple[int, ...]], ...]:
        places, start = [], 0
        for name, shape in self.fields:
            stop = start + math.prod(shape)
            places.append((name, slice(start, stop), shape))
            start = stop
        return tuple(places)

    @cached_property
    def size(self) -> int:
        return self._places[-1][1].stop

    def views(self, vector):
        """Views of a vector (numpy or traced) by field name."""
        return {name: vector[place].reshape(shape) for name, place, shape in self._places}


ON_DEVICE, SAMPLES = 1, 2


def _rank_inputs(layout: StepLayout, vector, state: RowState):
    """One rank's vector -> (ForwardBatch, sampling columns, slots to write, page table)."""
    f = layout.views(vector)
    t, r = layout.bucket.tokens, layout.bucket.rows
    last_tokens = state.last_tokens
    starts = f["query_starts"]
    index = jnp.arange(t, dtype=jnp.int32)
    row = jnp.searchsorted(starts[1:], index, side="right", method="compare_all")
    row = jnp.minimum(row, r - 1).astype(jnp.int32)
    live = index < starts[f["distribution"][2]]
    positions = jnp.where(live, f["kv_lens"][row] - starts[row + 1] + index, 0)
    pending = (f["flags"] & ON_DEVICE)[row] != 0
    tokens = jnp.where(pending & live, last_tokens[f["slots"][row]], f["tokens"])
    page_table = _with_new_pages(layout, f, state.page_table)
    batch = ForwardBatch(
        tokens=tokens,
        positions=positions,
        prompt_lens=jnp.where(live, f["prompt_lens"][row], 0),
        attention=AttentionMetadata(
            f["kv_lens"],
            page_table[f["slots"]],
            starts,
            f["distribution"],
            decode_only=layout.bucket.decode_only,
        ),
        sample_at=jnp.maximum(starts[1:] - 1, 0),
    )
    slots = jnp.where(f["flags"] & SAMPLES != 0, f["slots"], last_tokens.shape[0])
    return batch, f["sampling"], slots, page_table


def _with_new_pages(layout: StepLayout, fields, page_table):
    """The slots' page table `i32[slots, P]` with this step's pages in their places."""
    queries = fields["query_starts"][1:] - fields["query_starts"][:-1]
    last = (fields["kv_lens"] - 1) // layout.page_size
    first = (fields["kv_lens"] - queries) // layout.page_size
    ends = jnp.cumsum(jnp.where(queries > 0, last - first + 1, 0))
    index = jnp.arange(layout.max_new_pages, dtype=jnp.int32)
    row = jnp.searchsorted(ends, index, side="right", method="compare_all")
    row = jnp.minimum(row, layout.bucket.rows - 1)
    slot = jnp.where(index < ends[-1], fields["slots"][row], page_table.shape[0])
    column = last[row] + 1 - (ends[row] - index)
    return page_table.at[slot, column].set(fields["new_pages"], mode="drop")


def step_inputs(layout: StepLayout, rules: ShardingRules, packed, state: RowState):
    """All ranks' vectors `i32[ranks, n]` -> one batch whose arrays are the ranks' concatenated.

    Also: sampling columns, the slots whose rows sample, the state with the new page tables.
    """
    if packed.shape[0] == 1:
        of_rank = jax.tree.map(lambda x: x[0], state)
        batch, sampling, slots, page_table = _rank_inputs(layout, packed[0], of_rank)
        return batch, sampling, slots, RowState(state.last_tokens, page_table[None])
    batch, sampling, slots, page_table = jax.vmap(partial(_rank_inputs, layout))(packed, state)
    batch = jax.tree.map(
        lambda x: rules.constrain(x.reshape(-1, *x.shape[2:]), "rows", *(None,) * (x.ndim - 2)),
        batch,
    )
    sampling = sampling.transpose(1, 0, 2).reshape(NUM_COLUMNS, -1)
    return batch, sampling, slots, RowState(state.last_tokens, page_table)


def forward_and_sample(
    merge: Callable[[tuple[jax.Array, ...]], Decoder],
    layout: StepLayout,
    rules: ShardingRules,
    params: tuple[jax.Array, ...],
    caches: Caches,
    state: RowState,
    packed: jax.Array,
) -> tuple[jax.Array, RowState, Caches]:
    """Run one step.

    Args:
        caches, state: donated.
        packed: i32[ranks, layout.size].

    Returns:
        i32[ranks, R] sampled tokens (meaningless in rows that do not sample), the new state, the
        new caches.
    """
    model = merge(params)
    ranks, rows = packed.shape[0], layout.bucket.rows
    batch, sampling, slots, state = step_inputs(layout, rules, packed, state)
    hidden, caches = model(batch, caches)
    logits = model.logits(model.pick(hidden, batch))
    logits = rules.constrain(logits.astype(jnp.float32), "rows", None)
    sampled = sample(logits, unpack(sampling)).reshape(ranks, rows)
    if ranks == 1:
        last_tokens = state.last_tokens.at[0, slots].set(sampled[0], mode="drop")
    else:
        write = jax.vmap(lambda last, at, new: last.at[at].set(new, mode="drop"))
        last_tokens = write(state.last_tokens, slots, sampled)
    return sampled, RowState(last_tokens, state.page_table), caches


def forward_and_read(
    merge: Callable[[tuple[jax.Array, ...]], Decoder],
    layout: StepLayout,
    rules: ShardingRules,
    params: tuple[jax.Array, ...],
    caches: Caches,
    state: RowState,
    packed: jax.Array,
) -> tuple[jax.Array, RowState, Caches]:
    """Run one step of a model that reads texts and writes none.

    Args:
        as of `forward_and_sample`.

    Returns:
        f32[ranks, R, O], what the step adds to each row's result (see `Decoder.read`), the new
        state, the new caches.
    """
    model = merge(params)
    batch, _, _, state = step_inputs(layout, rules, packed, state)
    hidden, caches = model(batch, caches)
    values = rules.constrain(model.read(hidden, batch), "rows", None)
    return values.reshape(packed.shape[0], layout.bucket.rows, -1), state, caches


def forward_layers(
    merge: Callable[[tuple[jax.Array, ...]], Decoder],
    layout: StepLayout,
    rules: ShardingRules,
    params: tuple[jax.Array, ...],
    caches: Caches,
    state: RowState,
    packed: jax.Array,
) -> tuple[tuple[jax.Array, ...], jax.Array, RowState, Caches]:
    """The same forward pass, showing its inside: every layer's and every token's output.

    Returns:
        per layer `[T, D]` of the residual stream; logits `f32[T, V]` (scores or hidden states where
        the model is for these); the new state; the new caches.
    """
    model = merge(params)
    batch, _, _, state = step_inputs(layout, rules, packed, state)
    outputs = tuple(model.layer_outputs(batch, caches))
    hidden = model.norm(outputs[-1][0])
    return (
        tuple(x for x, _ in outputs),
        model.outputs(hidden).astype(jnp.float32),
        state,
        tuple(cache for _, cache in outputs),
    )
