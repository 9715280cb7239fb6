"""The checkpoints that every registered architecture is tested on, and their references' outputs.

Cases come from the registry and need no entry here. A family's `tiny` configs are run live against
transformers' own class; the folders of `tests/goldens` hold checkpoints in their original layout
with stored outputs of the original code, for architectures that transformers lacks.

"Logits" are what the model's head gives at every position: scores of the vocabulary, scores of a
text that ends there, or the hidden states an embedding is pooled from.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from model_defs.decoder import DecoderSpec
from model_defs.layers.moe import MoE
from model_defs.layers.rope import DynamicNTK, LongRope, PromptNTK
from model_defs.registry import Family, family_of, list_families

from . import harness, hf_reference

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = ROOT / "tests" / "goldens"
LENGTHS = (1, 9, 23, 45)  # shorter and longer than the tiny windows (8, 16) and lengths (32)
NEW_TOKENS = 12
TOLERANCE = 1e-4  # of the logits' standard deviation
BUFFER = ".inv_freq"  # old checkpoints carry the rope's frequencies; they are no weights


@dataclass
class Case:
    """One tiny checkpoint, its reference's outputs and its model.

    Attributes:
        hf_logits: of every position of each prompt, run alone.
        hf_greedy: the reference's greedy tokens with its KV cache; empty without an LM head.
        saved: where transformers keeps the model; None for those that it lacks.
    """

    family: Family
    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    prompts: list[list[int]]
    hf_logits: list[np.ndarray]
    hf_greedy: list[list[int]]
    saved: Path | None = None

    @cached_property
    def model(self) -> harness.Model:
        return harness.load(self.config, self.tensors)

    @cached_property
    def spec(self) -> DecoderSpec:
        return self.family.spec(self.config)

    @cached_property
    def logits(self) -> list[np.ndarray]:
        return harness.full_logits(self.model, self.prompts)

    @cached_property
    def greedy(self) -> list[list[int]]:
        return greedy(self.model, self.prompts)

    @property
    def has_experts(self) -> bool:
        return any(isinstance(layer.ffn, MoE) for layer in self.spec.layers)

    def needs_lm_head(self) -> None:
        if self.spec.task != "generate":
            pytest.skip(f"a model for '{self.spec.task}' writes no text")

    @property
    def length_dependent(self) -> set[int]:
        """Prompts whose rope changes while they grow, so that a recomputation differs."""
        scalings = {
            scaling
            for layer in self.spec.layers
            if (scaling := getattr(layer.mixer.position, "scaling", None)) is not None
        }
        return {
            row
            for row, prompt in enumerate(self.prompts)
            for scaling in scalings
            if _changes(scaling, len(prompt), len(prompt) + NEW_TOKENS)
        }


def _changes(scaling: Any, start: int, stop: int) -> bool:
    if isinstance(scaling, LongRope):
        return start <= scaling.original_length < stop
    return isinstance(scaling, DynamicNTK | PromptNTK) and stop > scaling.original_length


def live_case(family: Family, index: int, folder: Path) -> Case:
    """A random model of transformers' class, saved and read back."""
    fields = dict(family.tiny[index])
    (architecture,) = fields.pop("architectures", family.architectures[:1])
    hf_model = hf_reference.make_tiny(architecture, fields)
    config, tensors = hf_reference.save(hf_model, folder)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, config["vocab_size"], n).tolist() for n in LENGTHS]
    greedy = []
    if hf_reference.has_lm_head(hf_model):
        greedy = [hf_reference.hf_greedy(hf_model, p, NEW_TOKENS)[0] for p in prompts]
    logits = hf_reference.hf_logits(hf_model, prompts)
    return Case(family, config, tensors, prompts, logits, greedy, folder)


def golden_case(folder: Path) -> Case:
    """A stored checkpoint with the outputs of the original code."""
    config = json.loads((folder / "config.json").read_text())
    with np.load(folder / "golden.npz") as arrays:
        lengths = arrays["lengths"]
        names = ("logits", "scores_every_position", "last_hidden")
        outputs = next(arrays[name] for name in names if name in arrays)
        logits = [rows[:n].reshape(n, -1) for rows, n in zip(outputs, lengths, strict=True)]
        ids = arrays["input_ids"]
        prompts = [row[:n].tolist() for row, n in zip(ids, lengths, strict=True)]
        greedy = arrays["greedy_cached"] if "greedy_cached" in arrays else arrays.get("greedy", [])
    greedy = [row[:NEW_TOKENS].tolist() for row in greedy]
    tensors = load_file(folder / "model.safetensors")
    return Case(family_of(config), config, tensors, prompts, logits, greedy)


def architecture_of(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["architectures"][0]


FOLDERS = sorted(GOLDENS.iterdir())
CASES = [
    pytest.param((family, index), id=f"{family.name}-{index}")
    for family in list_families()
    for index in range(len(family.tiny))
] + [pytest.param((None, folder), id=folder.name.replace("-a", "-golden")) for folder in FOLDERS]


def worst(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    """The largest difference, in standard deviations of the reference's logits."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
    largest = max(np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True))
    return float(largest / np.concatenate(list(theirs)).std())


def token_errors(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> np.ndarray:
    """The root mean square of each token's differences, in standard deviations of all logits."""
    expected = np.concatenate(list(theirs))
    difference = np.concatenate(list(ours)).astype(np.float32) - expected
    return np.sqrt(np.square(difference).mean(-1)) / expected.std()


def greedy(model: harness.Model, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    return [
        tokens
        for group in harness.batches(prompts)
        for tokens in harness.greedy(model, group, NEW_TOKENS)
    ]


def ragged(case: Case, model: harness.Model, **options: Any) -> list[np.ndarray]:
    return [
        logits
        for prompts in harness.batches(case.prompts)
        for logits in harness.ragged_logits(model, prompts, **options)
    ]
