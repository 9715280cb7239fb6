"""A batch as numbers: what the host writes into a step's vector (`jaxserve.engine.step`).

This runs once a step and row, while the device waits for nothing; still it is what one process can
do at most, so rows are turned into columns at once and what does not change is kept by row slot.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxserve.engine.step import ON_DEVICE, SAMPLES, StepLayout
from jaxserve.request import Request
from jaxserve.sampling import NUM_COLUMNS, POSITION, pack_into
from jaxserve.scheduler.scheduler import Scheduled


class SlotColumns:
    """What stays the same about a request while it runs, by row slot of one rank.

    sampling: i32[NUM_COLUMNS, slots], positions not filled in. prompt_lens: i32[slots].
    """

    def __init__(self, num_slots: int) -> None:
        self.sampling = np.zeros((NUM_COLUMNS, num_slots), np.int32)
        self.prompt_lens = np.zeros(num_slots, np.int32)
        self._owners: list[Request | None] = [None] * num_slots

    def slots_of(self, requests: Sequence[Request]) -> np.ndarray:
        """The requests' row slots, i64[len(requests)], whose columns are those requests' now."""
        slots = [request.row for request in requests]
        owners = self._owners
        for slot, request in zip(slots, requests, strict=True):
            if owners[slot] is not request:
                owners[slot] = request
                self.prompt_lens[slot] = request.num_prompt
                column = self.sampling[:, slot : slot + 1]
                pack_into(column, [(request.sampling, request.seed, 0)])
        return np.array(slots)


def fill_rank(
    layout: StepLayout, vector: np.ndarray, rows: Sequence[Scheduled], columns: SlotColumns
) -> None:
    """Write one rank's rows, those of one new token first, into its vector of zeros."""
    num = len(rows)
    if num == 0:
        return
    fields = layout.views(vector)
    requests, starts, new, samples, on_device = zip(*rows, strict=True)
    num_single = new.count(1)
    slots = columns.slots_of(requests)
    stops = np.array(starts) + np.array(new)
    fields["kv_lens"][:num] = stops
    fields["prompt_lens"][:num] = columns.prompt_lens[slots]
    fields["slots"][:num] = slots
    fields["flags"][:num] = ON_DEVICE * np.array(on_device) + SAMPLES * np.array(samples)
    ends = fields["query_starts"]
    np.cumsum(new, out=ends[1 : num + 1])
    ends[num + 1 :] = ends[num]
    fields["distribution"][:] = (num_single, num_single, num)
    sampling = fields["sampling"]
    sampling[:, :num] = columns.sampling[:, slots]
    sampling[POSITION, :num] = stops
    _fill_tokens(fields["tokens"], rows, num_single, on_device, ends)
    pages = _new_pages(rows, num_single, layout.page_size)
    fields["new_pages"][: len(pages)] = pages


def _fill_tokens(
    tokens: np.ndarray,
    rows: Sequence[Scheduled],
    num_single: int,
    on_device: Sequence[bool],
    ends: np.ndarray,
) -> None:
    if not all(on_device[:num_single]):
        tokens[:num_single] = [
            0 if row.token_on_device else row.request.tokens[row.start] for row in rows[:num_single]
        ]
    for row, at in zip(rows[num_single:], ends[num_single:].tolist(), strict=False):
        tokens[at : at + row.num_new] = row.request.tokens[row.start : row.start + row.num_new]


def _new_pages(rows: Sequence[Scheduled], num_single: int, page_size: int) -> list[int]:
    """Row after row, the pages that the new tokens lie in."""
    pages = [request.pages[start // page_size] for request, start, _, _, _ in rows[:num_single]]
    for request, start, num_new, _, _ in rows[num_single:]:
        pages += request.pages[start // page_size : (start + num_new - 1) // page_size + 1]
    return pages
