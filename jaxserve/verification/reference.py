"""What the outputs should be: the prompts, and the stored outputs of a golden.npz."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxserve.tokenizer import Tokenizer

NUM_PROMPTS = 5
LAYERS_OF_PROMPT = 2  # the prompt whose layer outputs a golden.npz holds


class VerifyError(ValueError):
    """There is nothing to compare with; the message says what was expected."""


@dataclass(frozen=True, eq=False)
class Reference:
    """A prompt and what the model should compute for it.

    Attributes:
        logits: f32[T, V], of every position.
        layers: f32[L, T, D], the residual stream after each layer; None where not known.
        greedy: the tokens that follow.
        margins: of each of them, how far its logit was above the second; None where not known.
        rounding: f32[T], how far the reference's own logits move when its inputs change in their
            last bit; None where not known.
    """

    name: str
    tokens: list[int]
    logits: np.ndarray
    layers: np.ndarray | None
    greedy: list[int]
    margins: list[float] | None
    rounding: np.ndarray | None = None


# ---- prompts --------------------------------------------------------------------------------

PLAIN = "The capital of France is"
CHAT = "Name three primary colors and say in one sentence what they are used for."
CODE = '''def fibonacci(n: int) -> list[int]:
    """Return the first n Fibonacci numbers."""
    numbers = [0, 1]
    while len(numbers) < n:
'''
UNICODE = "Grüße aus Köln! 你好世界。 Привет, мир! こんにちは 🌍🚀 naïve café: ½ + ¼ = ¾, ∑ x² ≤ ∞"
LONG = (
    "The harbour wakes before the town does. Crates of fish are counted by lamplight, gulls "
    "argue over what falls, and the ferry's bell says how late it is going to be. A clerk with "
    "cold hands writes a list that nobody will read until spring:\n"
    + "\n".join(f"crate {n}: {n * n} herrings, {7 * n % 11} crabs" for n in range(1, 41))
    + "\nIn spring somebody does read it, and finds that crate number"
)


def make_prompts(tokenizer: Tokenizer, max_tokens: int, count: int) -> dict[str, list[int]]:
    """Return the first `count` prompts as token ids by name, each cut to `max_tokens`.

    The chat prompt is plain text where the model has no chat template.
    """
    chat = (
        tokenizer.encode_chat([{"role": "user", "content": CHAT}])
        if tokenizer.has_chat_template
        else tokenizer.encode(CHAT)
    )
    prompts = {
        "plain": tokenizer.encode(PLAIN),
        "chat": chat,
        "long": tokenizer.encode(LONG),
        "code": tokenizer.encode(CODE),
        "unicode": tokenizer.encode(UNICODE),
    }
    return {name: ids[:max_tokens] for name, ids in list(prompts.items())[:count]}


# ---- stored outputs -------------------------------------------------------------------------


def read_golden(
    file: Path, count: int | None = None, max_new_tokens: int | None = None
) -> list[Reference]:
    """Read the prompts and outputs of a golden.npz.

    Its arrays: `input_ids` i32[P, Lmax] and `lengths` i32[P]; `logits` f32[P, Lmax, V]; `greedy`
    i32[P, N] with `greedy_margin` f32[P, N], and `greedy_cached` where the original gives other
    tokens with a KV cache; optionally `layer_out` f32[L, T, D] of prompt 2.

    Raises:
        VerifyError: no such file, or it does not hold a generating model's outputs.
    """
    try:
        with np.load(file, allow_pickle=False) as stored:
            arrays = dict(stored)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise VerifyError(
            f"{file} cannot be read as an .npz archive ({error}). Give the path of a golden.npz."
        ) from error
    _check_kind(file, arrays)
    greedy, margins = arrays["greedy"], arrays.get("greedy_margin")
    if "greedy_cached" in arrays:
        greedy, margins = arrays["greedy_cached"], None
    references = []
    for index, (ids, length) in enumerate(zip(arrays["input_ids"], arrays["lengths"], strict=True)):
        layers = arrays.get("layer_out") if index == LAYERS_OF_PROMPT else None
        references.append(
            Reference(
                name=str(index),
                tokens=ids[:length].tolist(),
                logits=arrays["logits"][index, :length],
                layers=layers,
                greedy=greedy[index, :max_new_tokens].tolist(),
                margins=None if margins is None else margins[index].tolist(),
            )
        )
    return references[:count]


def _check_kind(file: Path, arrays: dict[str, np.ndarray]) -> None:
    for key in ("scores", "embeddings"):
        if key in arrays:
            raise VerifyError(
                f"{file} holds {key}, not logits. Only models that generate text can be served "
                "and verified so far."
            )
    absent = [k for k in ("input_ids", "lengths", "logits", "greedy") if k not in arrays]
    if absent:
        raise VerifyError(
            f"{file} lacks {', '.join(absent)}; it holds {', '.join(sorted(arrays)) or 'nothing'}. "
            "Write the missing arrays, or compare with transformers: leave --golden out."
        )
