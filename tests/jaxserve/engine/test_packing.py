"""What a step reads on the device is what the scheduler meant on the host."""

from __future__ import annotations

import itertools
import random
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.engine.packing import SlotColumns, fill_rank
from jaxserve.engine.step import RowState, StepLayout, step_inputs
from jaxserve.request import Request, SamplingParams
from jaxserve.sampling import unpack
from jaxserve.scheduler.buckets import Bucket, make_buckets
from jaxserve.scheduler.scheduler import Batch, Scheduler
from model_defs.sharding import ShardingRules, make_mesh

MAX_LEN, NUM_SLOTS, MAX_TOKENS = 48, 5, 24


class Device:
    """The part of a step that reads the host's vector, for every bucket; no model."""

    def __init__(self, page_size: int, num_ranks: int) -> None:
        self.rules = ShardingRules(make_mesh(num_ranks, 1))
        self.page_size, self.num_ranks = page_size, num_ranks
        pages_per_row = -(-MAX_LEN // page_size)
        self.state = RowState(
            jnp.full((num_ranks, NUM_SLOTS), -1, jnp.int32),
            jnp.full((num_ranks, NUM_SLOTS, pages_per_row), -1, jnp.int32),
        )
        self.columns = [SlotColumns(NUM_SLOTS) for _ in range(num_ranks)]
        self.inputs = jax.jit(step_inputs, static_argnums=(0, 1))

    def run(self, batch: Batch):
        layout = StepLayout(batch.bucket, self.page_size)
        packed = np.zeros((self.num_ranks, layout.size), np.int32)
        for vector, rows, columns in zip(packed, batch.ranks, self.columns, strict=True):
            fill_rank(layout, vector, rows, columns)
        forward, sampling, slots, self.state = self.inputs(layout, self.rules, packed, self.state)
        return jax.tree.map(np.asarray, (forward, unpack(sampling), slots))


def expected_tokens(batch: Batch, rank: int) -> list[int]:
    """-1 where the device's own last token, which no step has set here, is read."""
    tokens = []
    for row in batch.ranks[rank]:
        stop = row.start + row.num_new
        tokens += [-1] if row.token_on_device else row.request.tokens[row.start : stop]
    return tokens


def check(device: Device, batch: Batch) -> None:
    forward, sampling, slots = device.run(batch)
    t, r = batch.bucket.tokens, batch.bucket.rows
    for rank, rows in enumerate(batch.ranks):
        num = sum(row.num_new for row in rows)
        at, first = rank * t, rank * r
        positions = [p for row in rows for p in range(row.start, row.start + row.num_new)]
        assert forward.tokens[at : at + num].tolist() == expected_tokens(batch, rank)
        assert forward.positions[at : at + num].tolist() == positions
        for i, row in enumerate(rows, start=first):
            stop, request = row.start + row.num_new, row.request
            assert forward.attention.kv_lens[i] == stop == sampling.position[i]
            num_pages = -(-stop // device.page_size)
            table = forward.attention.page_table[i, :num_pages].tolist()
            assert table == request.pages[:num_pages], "a page is not where its tokens are"
            assert sampling.temperature[i] == np.float32(request.sampling.temperature)
            assert sampling.top_k[i] == request.sampling.top_k
            assert sampling.seed[i] == request.seed
            assert forward.prompt_lens[at + sum(r.num_new for r in rows[: i - first])] == (
                request.num_prompt
            )
        given = slots.reshape(len(batch.ranks), r)[rank]
        sampled = [row.request.row if row.samples else NUM_SLOTS for row in rows]
        assert given[: len(rows)].tolist() == sampled
        assert (given[len(rows) :] == NUM_SLOTS).all(), "padding must write no token"


@pytest.mark.parametrize(("page_size", "num_ranks", "depth"), [(1, 1, 1), (4, 1, 2), (7, 2, 2)])
def test_the_device_finds_every_token_and_page(page_size: int, num_ranks: int, depth: int) -> None:
    """Preemptions, aborts and reused row slots included; updates lag behind by `depth` steps."""
    draw = random.Random(page_size)
    scheduler = Scheduler(
        num_pages=-(-MAX_LEN // page_size),
        page_size=page_size,
        max_rows=NUM_SLOTS,
        max_tokens_per_step=MAX_TOKENS,
        max_model_len=MAX_LEN,
        num_ranks=num_ranks,
        buckets=make_buckets(MAX_TOKENS, NUM_SLOTS),
    )
    device = Device(page_size, num_ranks)
    requests: list[Request] = []
    in_flight: list[Batch] = []
    for step in itertools.count():
        if step > 250 and not scheduler.has_work:
            break
        if step < 250 and draw.random() < 0.4:
            prompt = [draw.randrange(1000) for _ in range(draw.randint(1, 30))]
            sampling = SamplingParams(
                max_tokens=draw.randint(1, 18),
                temperature=draw.choice((0.0, 0.7)),
                top_k=draw.randint(0, 9),
            )
            request = Request(str(step), prompt, len(prompt), sampling, seed=step)
            scheduler.add(request)
            requests.append(request)
        if draw.random() < 0.03:
            scheduler.abort(draw.choice(requests).id if requests else "")
        batch = scheduler.schedule()
        if batch is not None:
            check(device, batch)
            in_flight.append(batch)
        while len(in_flight) > (depth - 1 if batch is not None else 0):
            done = in_flight.pop(0)
            scheduler.update(done, [[draw.randrange(1000) for _ in rows] for rows in done.ranks])
    assert scheduler.stats.total_preempted > 0
    assert all(request.is_finished for request in requests)


@pytest.mark.parametrize("page_size", [1, 2, 3, 16, 64])
@pytest.mark.parametrize("bucket", [Bucket(1, 1), Bucket(8, 8), Bucket(64, 8), Bucket(64, 64)])
def test_a_full_step_has_room_for_its_pages(page_size: int, bucket: Bucket) -> None:
    for num_rows in range(1, bucket.rows + 1):
        for short in range(1, bucket.tokens // num_rows + 1):
            lengths = [short] * (num_rows - 1)
            lengths.append(bucket.tokens - sum(lengths))
            most = _pages_of_rows(lengths, page_size)
            assert StepLayout(bucket, page_size).max_new_pages >= most


def _pages_of_rows(lengths: list[int], page_size: int) -> int:
    """Most pages that rows of these many new tokens can touch: each starts at a page's end."""
    start = page_size - 1
    return sum((start + q - 1) // page_size - start // page_size + 1 for q in lengths)


def test_an_empty_batch_changes_no_row() -> None:
    device = Device(4, 1)
    before = jax.tree.map(np.asarray, device.state)
    _, _, slots = device.run(Batch(((),), Bucket(8, 4)))
    assert (slots == NUM_SLOTS).all()
    jax.tree.map(partial(np.testing.assert_array_equal), before, device.state)
