"""Feed known texts through the engine's forward pass, looking at every position.

Scheduler, packing, page tables, model code and kernels are those that serve; only sampling is left
out, because the next token is known. The caches start as NaN: reading a place that no token of the
row was written to cannot go unnoticed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.engine.kv_cache import cache_structs
from jaxserve.engine.packing import SlotColumns, fill_rank
from jaxserve.engine.runner import Runner
from jaxserve.engine.step import StepLayout, forward_layers
from jaxserve.request import Request, SamplingParams
from jaxserve.scheduler.buckets import Bucket
from jaxserve.scheduler.scheduler import Batch, Scheduler


@dataclass(frozen=True, eq=False)
class Piece:
    """What one step computed for `n` tokens of a prompt, from position `start` on.

    Attributes:
        logits: f32[n, V]; of a model that reads texts, scores or hidden states.
        layers: per layer f32[n, D].
    """

    prompt: int
    start: int
    logits: np.ndarray
    layers: list[np.ndarray]


def replay(
    runner: Runner, prompts: Sequence[Sequence[int]], bucket: Bucket, *, one_by_one: bool = False
) -> Iterator[list[Piece]]:
    """Compute every token of every prompt in steps of `bucket`; yields the pieces of each step.

    Args:
        one_by_one: the prompts arrive as generated tokens do, one in a step, instead of at once.
    """
    model, layout = runner.model, runner.layout(bucket)
    longest = max(map(len, prompts))
    num_pages = bucket.rows * (-(-longest // runner.page_size) + 1)
    scheduler = Scheduler(
        num_pages=num_pages,
        page_size=runner.page_size,
        max_rows=bucket.rows,
        max_tokens_per_step=bucket.tokens,
        max_model_len=longest + 1,
        num_ranks=runner.num_ranks,
        buckets=(bucket,),
    )
    for index, prompt in enumerate(prompts):
        given = list(prompt[:1] if one_by_one else prompt)
        # One token more than the text has, so that its last token is computed too.
        sampling = SamplingParams(temperature=0.0, max_tokens=len(prompt) - len(given) + 1)
        scheduler.add(Request(str(index), given, len(given), sampling))
    structs = cache_structs(model.module.cache_specs, model.rules, num_pages, runner.page_size)
    caches = tuple(jnp.full(s.shape, jnp.nan, s.dtype, device=s.sharding) for s in structs)
    state_structs = runner.state_structs(bucket.rows)
    state = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, device=s.sharding), state_structs)
    everywhere, by_rank = model.rules.sharding(), model.rules.sharding("rows", None)
    shardings = jax.tree.map(lambda s: s.sharding, (state_structs, structs))
    forward = jax.jit(
        partial(forward_layers, model.merge, layout, model.rules),
        donate_argnums=(1, 2),
        out_shardings=(everywhere, everywhere, *shardings),
    )
    columns = [SlotColumns(bucket.rows) for _ in range(runner.num_ranks)]
    while (batch := scheduler.schedule()) is not None:
        packed = jax.device_put(_pack(layout, batch, columns, prompts), by_rank)
        layers, logits, state, caches = forward(runner.params, caches, state, packed)
        width = model.spec.vocab if model.spec.task == "generate" else None
        yield _pieces(batch, layers, logits, width)
        scheduler.update(batch, _next_tokens(batch, prompts))


def _pack(
    layout: StepLayout,
    batch: Batch,
    columns: Sequence[SlotColumns],
    prompts: Sequence[Sequence[int]],
) -> np.ndarray:
    packed = np.zeros((len(batch.ranks), layout.size), np.int32)
    for vector, rows, of_rank in zip(packed, batch.ranks, columns, strict=True):
        fill_rank(layout, vector, rows, of_rank)
        # The reference computes the text at once, as one prompt; ropes may depend on its length.
        lengths = [len(prompts[int(row.request.id)]) for row in rows]
        layout.views(vector)["prompt_lens"][: len(rows)] = lengths
    return packed


def _pieces(
    batch: Batch, layers: Sequence[jax.Array], logits: jax.Array, width: int | None
) -> list[Piece]:
    host_logits = np.asarray(logits)
    host_layers = [np.asarray(layer, np.float32) for layer in layers]
    pieces = []
    for rank, rows in enumerate(batch.ranks):
        at = rank * batch.bucket.tokens
        for row in rows:
            part = slice(at, at + row.num_new)
            pieces.append(
                Piece(
                    prompt=int(row.request.id),
                    start=row.start,
                    logits=host_logits[part, :width],
                    layers=[layer[part] for layer in host_layers],
                )
            )
            at += row.num_new
    return pieces


def _next_tokens(batch: Batch, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The token that follows each row in its text; 0 after the last."""
    return [
        [(*prompts[int(row.request.id)], 0)[row.start + row.num_new] for row in rows]
        for rows in batch.ranks
    ]
