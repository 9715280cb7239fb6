"""Run a model definition by hand: no engine, no files, only `model_defs` and the paged step.

`load` places a dict of checkpoint tensors on a mesh, `Session` keeps rows in shuffled pages and
computes any mixture of decode rows and prompt chunks, giving the logits of every position.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from model_defs.decoder import DecoderSpec, canonical_shapes, placements
from model_defs.interface import AttentionMetadata, ForwardBatch
from model_defs.layers.linear import BuildContext
from model_defs.registry import family_of
from model_defs.sharding import DATA, ShardingRules, make_mesh
from model_defs.weights import WeightPlan, plan
from pallas_kernels.ragged_paged_attention import cache_axes, cache_shape

from ..quick_compile import quick_jit

Tensors = Mapping[str, np.ndarray]

TOKENS, ROWS, PAGE_SIZE, PAGES_PER_ROW = 128, 4, 4, 32  # of one step, per rank
GARBAGE_PAGES = 5  # pages of each rank that no row owns


@dataclass(frozen=True)
class Model:
    """A model on a mesh, ready for `Session`."""

    spec: DecoderSpec
    module: nnx.Module  # shapes only
    rules: ShardingRules
    plan: WeightPlan
    graphdef: Any
    params: Any

    @property
    def num_ranks(self) -> int:
        return self.rules.shards("rows")


def context(
    dp_size: int = 1, tp_size: int = 1, dtype: Any = np.float32, ep_size: int = 1
) -> BuildContext:
    """Return where to build: a mesh over the first devices, weights and cache in `dtype`."""
    mesh = make_mesh(dp_size, tp_size, jax.devices("cpu"), ep_size=ep_size)
    return BuildContext(ShardingRules(mesh), np.dtype(dtype), np.dtype(dtype))


def headers(tensors: Tensors) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (array.shape, str(array.dtype)) for name, array in tensors.items()}


def load(
    config: Mapping[str, Any],
    tensors: Tensors,
    *,
    dp_size: int = 1,
    tp_size: int = 1,
    ep_size: int = 1,
    dtype: Any = np.float32,
) -> Model:
    """Build the model of a `config.json` and fill it from checkpoint tensors, shard by shard."""
    family = family_of(config)
    spec = family.spec(config)
    ctx = context(dp_size, tp_size, dtype, ep_size)
    module = spec.build(ctx)
    weight_plan = plan(family.rules(config), headers(tensors), canonical_shapes(module))

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        return weight_plan.read(name, index, lambda stored, box: tensors[stored][box])

    placed = placements(module)
    graphdef, params = nnx.split(module)
    flat = [
        (
            path,
            param.replace(
                jax.make_array_from_callback(
                    placed[path].shape,
                    ctx.sharding(placed[path]),
                    partial(placed[path].make, read=read),
                )
            ),
        )
        for path, param in nnx.to_flat_state(params)
    ]
    return Model(spec, module, ctx.rules, weight_plan, graphdef, nnx.from_flat_state(flat))


def refilled(model: Model, config: Mapping[str, Any], tensors: Tensors) -> Model:
    """The same model on one device with other tensors; what was compiled for it is used again."""
    leaves = jax.tree.leaves(load(config, tensors).params)
    params = jax.tree.unflatten(jax.tree.structure(model.params), leaves)
    return replace(model, params=params)


@partial(quick_jit, static_argnums=0, donate_argnums=2)
def _step(graphdef, params, caches, batch: ForwardBatch):
    """Return outputs of every token `[T, V]`, those at `sample_at` `[R, V]` and the new caches."""
    model = nnx.merge(graphdef, params)
    hidden, caches = model(batch, caches)
    head = {"generate": model.logits, "score": model.score, "embed": lambda hidden: hidden}
    head = head[model.spec.task]
    return head(hidden), head(model.pick(hidden, batch)), caches


@dataclass
class _Row:
    rank: int
    pages: np.ndarray
    prompt_len: int
    length: int = 0


@dataclass
class Session:
    """Rows in flight. Unused pages hold NaN; a row's pages lie in random order."""

    model: Model
    seed: int = 0
    rows: dict[int, _Row] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ranks, rules = self.model.num_ranks, self.model.rules
        per_rank = ROWS * PAGES_PER_ROW + GARBAGE_PAGES
        rng = np.random.default_rng(self.seed)
        self._free = [list(rng.permutation(per_rank)) for _ in range(ranks)]
        sharding = rules.sharding(*cache_axes())
        self.caches = tuple(
            jax.device_put(
                np.full(
                    cache_shape(
                        per_rank * ranks,
                        PAGE_SIZE,
                        cache.num_kv_heads,
                        cache.head_dim,
                        cache.v_head_dim,
                        cache.dtype,
                        shared_kv=cache.shared_kv,
                    ),
                    np.nan,
                    cache.dtype,
                ),
                sharding,
            )
            for cache in self.model.module.cache_specs
        )

    def add(self, row: int, prompt_len: int) -> None:
        """Start row number `row`; rows go to the ranks in turn."""
        rank = len(self.rows) % self.model.num_ranks
        pages = np.array([self._free[rank].pop() for _ in range(PAGES_PER_ROW)], np.int32)
        self.rows[row] = _Row(rank, pages, prompt_len)

    def step(self, work: Mapping[int, Sequence[int]]) -> dict[int, np.ndarray]:
        """Compute the next tokens of some rows; returns the logits `[n, V]` of each."""
        ranks = self.model.num_ranks
        # Decode rows first, as the kernel asks.
        order = sorted(work, key=lambda row: len(work[row]) > 1)
        by_rank = [[row for row in order if self.rows[row].rank == rank] for rank in range(ranks)]
        blocks, places = zip(*(self._block(work, rows) for rows in by_rank), strict=True)
        batch = jax.tree.map(lambda *parts: np.concatenate(parts), *blocks)
        sharding = NamedSharding(self.model.rules.mesh, PartitionSpec(DATA))
        logits, sampled, self.caches = _step(
            self.model.graphdef, self.model.params, self.caches, jax.device_put(batch, sharding)
        )
        logits, sampled = self._real(logits), self._real(sampled)
        out = {}
        for rank, rows in enumerate(by_rank):
            for index, row in enumerate(rows):
                start, stop = places[rank][index]
                out[row] = logits[rank * TOKENS + start : rank * TOKENS + stop]
                np.testing.assert_allclose(out[row][-1], sampled[rank * ROWS + index], atol=1e-5)
        return out

    def _real(self, logits: jax.Array) -> np.ndarray:
        """Cut off the places that sharding added to the vocabulary; they are never chosen."""
        on_host = np.asarray(logits)  # first: every operation on a sharded array is compiled
        if self.model.spec.task != "generate":
            return on_host
        vocab = self.model.spec.vocab
        if not np.all(np.isneginf(on_host[:, vocab:])):
            raise AssertionError("a place added to the vocabulary has a score")
        return on_host[:, :vocab]

    def _block(
        self, work: Mapping[int, Sequence[int]], rows: Sequence[int]
    ) -> tuple[ForwardBatch, list[tuple[int, int]]]:
        """One rank's part of the batch, and where each row's tokens lie in it."""
        if len(rows) > ROWS or sum(len(work[row]) for row in rows) > TOKENS:
            raise ValueError(f"the step takes {ROWS} rows and {TOKENS} tokens on each rank")
        tokens, positions, prompt_lens = (np.zeros(TOKENS, np.int32) for _ in range(3))
        kv_lens, sample_at = np.zeros(ROWS, np.int32), np.zeros(ROWS, np.int32)
        page_table = np.zeros((ROWS, PAGES_PER_ROW), np.int32)
        query_starts = np.zeros(ROWS + 1, np.int32)
        places, start = [], 0
        for index, number in enumerate(rows):
            row, new = self.rows[number], work[number]
            stop = start + len(new)
            tokens[start:stop] = new
            positions[start:stop] = row.length + np.arange(len(new))
            prompt_lens[start:stop] = row.prompt_len
            row.length += len(new)
            kv_lens[index], sample_at[index] = row.length, stop - 1
            page_table[index] = row.pages
            places.append((start, stop))
            start = stop
            query_starts[index + 1 :] = stop
        decode = sum(len(work[row]) == 1 for row in rows)
        distribution = np.array([decode, len(rows), len(rows)], np.int32)
        attention = AttentionMetadata(kv_lens, page_table, query_starts, distribution)
        return ForwardBatch(tokens, positions, prompt_lens, attention, sample_at), places


def batches(prompts: Sequence[Sequence[int]]) -> list[list[Sequence[int]]]:
    """Prompts in order, as many together as a step has rows and tokens for."""
    out: list[list[Sequence[int]]] = [[]]
    for prompt in prompts:
        if len(out[-1]) == ROWS or sum(map(len, out[-1])) + len(prompt) > TOKENS:
            out.append([])
        out[-1].append(prompt)
    return out


def full_logits(model: Model, prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Logits `[L, V]` of whole prompts, each computed in one piece, several rows to a step."""
    out = []
    for group in batches(prompts):
        session = Session(model)
        rows = dict(enumerate(group))
        for row, prompt in rows.items():
            session.add(row, len(prompt))
        logits = session.step(rows)
        out += [logits[row] for row in rows]
    return out


def ragged_logits(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    prompt_lens: Sequence[int] | None = None,
    chunks: Iterable[int] = (7, 1, 13, 3),
    seed: int = 0,
) -> list[np.ndarray]:
    """Logits `[L, V]` of the same tokens computed in uneven chunks, rows mixed in every step.

    Tokens past a row's `prompt_lens` come one at a time, as in decoding.
    """
    session = Session(model, seed)
    prompt_lens = [len(p) for p in prompts] if prompt_lens is None else prompt_lens
    sizes = list(chunks)
    pieces: dict[int, list[np.ndarray]] = {row: [] for row in range(len(prompts))}
    for row, length in enumerate(prompt_lens):
        session.add(row, length)
    turn = 0
    while any(session.rows[row].length < len(p) for row, p in enumerate(prompts)):
        work = {}
        for row, prompt in enumerate(prompts):
            done = session.rows[row].length
            left = prompt_lens[row] - done
            size = min(sizes[(turn + row) % len(sizes)], left) if left > 0 else 1
            if done < len(prompt):
                work[row] = prompt[done : done + size]
        for row, logits in session.step(work).items():
            pieces[row].append(logits)
        turn += 1
    return [np.concatenate(pieces[row]) for row in range(len(prompts))]


def greedy(model: Model, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """`count` greedy tokens per prompt, decoding all rows together through their pages."""
    session = Session(model)
    work: dict[int, Sequence[int]] = {}
    for row, prompt in enumerate(prompts):
        session.add(row, len(prompt))
        work[row] = prompt
    out: list[list[int]] = [[] for _ in prompts]
    for _ in range(count):
        for row, logits in session.step(work).items():
            out[row].append(int(logits[-1].argmax()))
        work = {row: tokens[-1:] for row, tokens in enumerate(out)}
    return out


def greedy_recomputed(
    model: Model, prompts: Sequence[Sequence[int]], count: int
) -> list[list[int]]:
    """The same from scratch for every token: nothing is kept between steps."""
    known = [list(prompt) for prompt in prompts]
    for _ in range(count):
        for tokens, logits in zip(known, full_logits(model, known), strict=True):
            tokens.append(int(logits[-1].argmax()))
    return [tokens[-count:] for tokens in known]
