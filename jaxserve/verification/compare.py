"""How far two results are apart, and whether that is acceptable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxserve.verification.reference import Reference

# Below this distance of the two best logits, rounding decides which token is the greedy one.
TIE_MARGIN = 1e-3
MIN_COSINE = 0.99999  # of two embeddings of one text


@dataclass(frozen=True)
class Difference:
    """Absolute differences of many values.

    Attributes:
        std: standard deviation of the reference's values.
        prompt, position: where the largest difference is.
    """

    max: float
    mean: float
    std: float
    prompt: str
    position: int

    @property
    def relative(self) -> float:
        """The largest difference in standard deviations of the reference."""
        return self.max / self.std if self.std else math.inf


class Tally:
    """Collects differences piece by piece. A NaN counts as an infinite difference."""

    def __init__(self) -> None:
        self._max, self._sum, self._count = -1.0, 0.0, 0
        self._reference_sum, self._reference_squares = 0.0, 0.0
        self._prompt, self._position = "", 0

    def add(self, ours: np.ndarray, theirs: np.ndarray, prompt: str, start: int) -> None:
        """Compare rows `[n, ...]` that begin at position `start` of a prompt."""
        difference = np.abs(ours - theirs)
        worst = np.nan_to_num(difference.max(axis=-1), nan=np.inf)
        if worst.max() > self._max:
            self._max = float(worst.max())
            self._prompt, self._position = prompt, start + int(worst.argmax())
        self._sum += float(difference.sum(dtype=np.float64))
        self._reference_sum += float(theirs.sum(dtype=np.float64))
        self._reference_squares += float(np.square(theirs, dtype=np.float64).sum())
        self._count += difference.size

    def result(self) -> Difference | None:
        """The differences so far; None when nothing was compared."""
        if not self._count:
            return None
        mean = self._reference_sum / self._count
        variance = max(self._reference_squares / self._count - mean**2, 0.0)
        return Difference(
            max=self._max,
            mean=np.nan_to_num(self._sum / self._count, nan=np.inf).item(),
            std=math.sqrt(variance),
            prompt=self._prompt,
            position=self._position,
        )


@dataclass(frozen=True)
class StageResult:
    """One way of computing the prompts, compared with the reference.

    Attributes:
        num_steps: forward passes it took.
        layers: by layer, of the prompts whose layer outputs are known.
        rounding: how far rounding moves the reference's own logits where `logits` is largest.
    """

    name: str
    num_steps: int
    logits: Difference
    layers: tuple[Difference, ...]
    rounding: float | None = None

    def bad_layers(self, tolerance: float) -> list[int]:
        """The layers whose mean difference is over `tolerance` of their own standard deviation.

        Not the largest difference, because that rule fails the reference itself. Single
        activations of real models are thousands of times the usual size, and so are their rounding
        errors: transformers' float32 Gemma 3 270M on 702 tokens is up to 4.9e-3 standard
        deviations from the same model in float64 after layer 7, and 2.0e-3 after layer 11 (root
        mean square: 7.6e-6 and 4.1e-6). A wrong layer moves all of its values, so its mean shows
        it; a few wrong values show in the logits, which are judged by their largest difference.
        """
        return [i for i, d in enumerate(self.layers) if not d.mean <= tolerance * d.std]

    def passes(self, tolerance: float) -> bool:
        """Whether every logit is within `tolerance`, and no layer is bad."""
        return self.logits.max <= tolerance and not self.bad_layers(tolerance)


@dataclass(frozen=True)
class GreedyResult:
    """Generated tokens compared with the reference's.

    Attributes:
        num_equal: tokens before the first difference.
        margin: at the first difference, how far the reference's token was above its second; None
            where not known or nothing differs.
    """

    name: str
    num_tokens: int
    num_equal: int
    margin: float | None = None

    @property
    def is_equal(self) -> bool:
        return self.num_equal == self.num_tokens

    @property
    def is_tie(self) -> bool:
        """Whether the first difference is where the reference itself was undecided."""
        return not self.is_equal and self.margin is not None and self.margin < TIE_MARGIN

    @property
    def passes(self) -> bool:
        return self.is_equal or self.is_tie


def compare_greedy(reference: Reference, tokens: Sequence[int]) -> GreedyResult:
    """Compare generated tokens with a reference's, up to the first difference."""
    expected = reference.greedy
    pairs = zip(expected, [*tokens, *[-1] * len(expected)], strict=False)
    differs = next((i for i, (theirs, ours) in enumerate(pairs) if theirs != ours), None)
    if differs is None:
        return GreedyResult(reference.name, len(expected), len(expected))
    margin = None if reference.margins is None else reference.margins[differs]
    return GreedyResult(reference.name, len(expected), differs, margin)


@dataclass(frozen=True)
class ReadResult:
    """What a text was read as, compared with the reference.

    Attributes:
        difference: the largest, absolute.
        cosine: of an embedding and the reference's; None for scores.
    """

    name: str
    difference: float
    cosine: float | None = None

    def passes(self, tolerance: float) -> bool:
        """Whether it is within `tolerance`, and an embedding points the same way."""
        return self.difference <= tolerance and (self.cosine is None or self.cosine >= MIN_COSINE)


def compare_read(reference: Reference, result: np.ndarray) -> ReadResult:
    """Compare the scores or the embedding of a text with the reference's."""
    expected = reference.read
    assert expected is not None and expected.shape == result.shape
    difference = np.nan_to_num(np.abs(result - expected).max(), nan=np.inf).item()
    if reference.task == "score":
        return ReadResult(reference.name, difference)
    ours, theirs = result.astype(np.float64), expected.astype(np.float64)
    cosine = float(ours @ theirs / (np.linalg.norm(ours) * np.linalg.norm(theirs)))
    return ReadResult(reference.name, difference, cosine)


@dataclass(frozen=True)
class Report:
    """Everything that was compared.

    Attributes:
        model, reference, engine: what was compared, in words.
        prompts: number of tokens by name.
        seconds: wall time by part of the work.
    """

    model: str
    reference: str
    engine: str
    tolerance: float
    prompts: dict[str, int]
    stages: tuple[StageResult, ...]
    greedy: tuple[GreedyResult, ...]
    seconds: dict[str, float] = field(default_factory=dict)
    read: tuple[ReadResult, ...] = ()
    outputs: str = "Logits"  # what `stages` compare

    @property
    def passes(self) -> bool:
        return (
            all(s.passes(self.tolerance) for s in self.stages)
            and all(g.passes for g in self.greedy)
            and all(r.passes(self.tolerance) for r in self.read)
        )
