"""Tiny checkpoints with stored outputs of the original PyTorch code; no reference is run here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from . import harness

FOLDER = Path(__file__).resolve().parents[1] / "goldens"
NAMES = sorted(path.name for path in FOLDER.iterdir())
TOLERANCE = 2e-4  # absolute; the logits' standard deviation is 0.4 to 3.4


class Golden:
    def __init__(self, folder: Path):
        arrays = np.load(folder / "golden.npz")
        lengths = arrays["lengths"]
        config = json.loads((folder / "config.json").read_text())
        self.model = harness.load(config, load_file(folder / "model.safetensors"))
        self.prompts = [
            row[:n].tolist() for row, n in zip(arrays["input_ids"], lengths, strict=True)
        ]
        self.logits = [rows[:n] for rows, n in zip(arrays["logits"], lengths, strict=True)]
        self.greedy = arrays["greedy"].tolist()
        self.greedy_cached = arrays.get("greedy_cached", arrays["greedy"]).tolist()


@pytest.fixture(scope="module", params=NAMES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(FOLDER / request.param)


def batches(prompts: list) -> list[list]:
    return [prompts[i : i + harness.ROWS] for i in range(0, len(prompts), harness.ROWS)]


def test_goldens_are_there() -> None:
    assert NAMES == ["gemma3-a", "llama3rope-a", "mistral-a", "phi3_longrope-a"]


def test_whole_prompts_give_the_stored_logits(golden: Golden) -> None:
    for ours, theirs in zip(
        harness.full_logits(golden.model, golden.prompts), golden.logits, strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)


def test_chunked_prompts_give_the_stored_logits(golden: Golden) -> None:
    ours = [
        logits
        for prompts in batches(golden.prompts)
        for logits in harness.ragged_logits(golden.model, prompts)
    ]
    for a, b in zip(ours, golden.logits, strict=True):
        np.testing.assert_allclose(a, b, atol=TOLERANCE, rtol=0)


def test_decoding_gives_the_stored_tokens(golden: Golden) -> None:
    ours = [
        tokens
        for prompts in batches(golden.prompts)
        for tokens in harness.greedy(golden.model, prompts, 16)
    ]
    assert ours == golden.greedy_cached


def test_recomputing_gives_the_stored_tokens(golden: Golden) -> None:
    assert harness.greedy_recomputed(golden.model, golden.prompts, 16) == golden.greedy
