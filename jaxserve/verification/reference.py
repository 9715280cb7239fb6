"""What the outputs should be: the prompts, and the stored outputs of a golden.npz."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from jaxserve.tokenizer import Tokenizer

Task = Literal["generate", "score", "embed"]
# Of models that read texts: the arrays of the results, and of every position's outputs.
READ: dict[Task, tuple[str, str]] = {
    "score": ("scores", "scores_every_position"),
    "embed": ("embeddings", "last_hidden"),
}
NUM_PROMPTS = 5
LAYERS_OF_PROMPT = 2  # the prompt whose layer outputs a golden.npz holds


class VerifyError(ValueError):
    """There is nothing to compare with; the message says what was expected."""


@dataclass(frozen=True, eq=False)
class Reference:
    """A prompt and what the model should compute for it.

    Attributes:
        logits: f32[T, V], of every position; of a model that reads texts the scores f32[T, L] or
            the hidden states f32[T, D]. None where not known.
        layers: f32[L, T, D], the residual stream after each layer; None where not known.
        greedy: the tokens that follow.
        margins: of each of them, how far its logit was above the second; None where not known.
        rounding: f32[T], how far the reference's own logits move when its inputs change in their
            last bit; None where not known.
        read: what the whole text is read as, scores f32[L] or an embedding f32[D]; None for models
            that generate.
        task: what the outputs are of.
    """

    name: str
    tokens: list[int]
    logits: np.ndarray | None
    layers: np.ndarray | None
    greedy: list[int]
    margins: list[float] | None
    rounding: np.ndarray | None = None
    read: np.ndarray | None = None
    task: Task = "generate"


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
    tokens with a KV cache; optionally `layer_out` f32[L, T, D] of prompt 2. Of models that read
    texts `scores` f32[P, L], with or without `scores_every_position` f32[P, Lmax, L]; or
    `embeddings` f32[P, D], with or without `last_hidden` f32[P, Lmax, D].

    Raises:
        VerifyError: no such file, or it does not hold a model's outputs.
    """
    try:
        with np.load(file, allow_pickle=False) as stored:
            arrays = dict(stored)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise VerifyError(
            f"{file} cannot be read as an .npz archive ({error}). Give the path of a golden.npz."
        ) from error
    for task, (read, outputs) in READ.items():
        if read in arrays:
            _check_arrays(file, arrays, "input_ids", "lengths", read)
            return _read_texts(arrays, task, read, outputs)[:count]
    _check_arrays(file, arrays, "input_ids", "lengths", "logits", "greedy")
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


def _read_texts(
    arrays: dict[str, np.ndarray], task: Task, read: str, outputs: str
) -> list[Reference]:
    references = []
    for index, (ids, length) in enumerate(zip(arrays["input_ids"], arrays["lengths"], strict=True)):
        whole = arrays[read][index].reshape(-1)
        every = arrays[outputs][index, :length].reshape(length, -1) if outputs in arrays else None
        references.append(
            Reference(
                name=str(index),
                tokens=ids[:length].tolist(),
                logits=every,
                layers=arrays.get("layer_out") if index == LAYERS_OF_PROMPT else None,
                greedy=[],
                margins=None,
                read=whole,
                task=task,
            )
        )
    return references


def _check_arrays(file: Path, arrays: dict[str, np.ndarray], *needed: str) -> None:
    absent = [name for name in needed if name not in arrays]
    if absent:
        raise VerifyError(
            f"{file} lacks {', '.join(absent)}; it holds {', '.join(sorted(arrays)) or 'nothing'}. "
            "Write the missing arrays, or compare with transformers: leave --golden out."
        )
