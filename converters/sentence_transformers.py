"""How a checkpoint's token states become one vector: the files that sentence-transformers writes.

`modules.json` lists the modules a text goes through, each with a folder of its own: the
transformer, then a Pooling, then perhaps a Normalize. Read from the format's published form
(https://sbert.net, class `Pooling`): one key `pooling_mode`, or one `pooling_mode_...` flag a kind.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from converters.errors import CheckpointError
from converters.hf import read_json
from model_defs.layers.embedding import Pooling

MODULES = "modules.json"
PROMPTS = "config_sentence_transformers.json"
KINDS: dict[str, Literal["last", "cls", "mean"]] = {
    "lasttoken": "last",
    "cls": "cls",
    "mean": "mean",
}
# As flags; each mode has one. "max" and others are not implemented.
FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def read_pooling(folder: Path) -> Pooling | None:
    """Read which pooling a checkpoint's folder asks for; None where it does not say.

    Raises:
        CheckpointError: it asks for something that is not implemented, or the files are damaged.
    """
    if not (folder / MODULES).is_file():
        return None
    pooling, normalize = None, False
    for module in _listed(folder / MODULES):
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        if kind == "Pooling":
            pooling = _pooling_kind(folder / str(module.get("path", "")) / "config.json")
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise CheckpointError(
                f"{folder / MODULES}: the module {kind!r} is not implemented; known are "
                "Transformer, Pooling and Normalize. Without it the vectors would be others than "
                "the model's: serve another checkpoint, or remove modules.json to get the last "
                "token's normalised state."
            )
    if pooling is None:
        raise CheckpointError(f"{folder / MODULES} lists no Pooling module. Restore the file.")
    return Pooling(pooling, normalize)


def _listed(file: Path) -> list[dict[str, Any]]:
    try:
        listed = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}. Restore the file.") from error
    if not isinstance(listed, list) or not all(isinstance(module, dict) for module in listed):
        raise CheckpointError(f"{file} holds no list of modules. Restore the file.")
    return listed


def default_prompt(folder: Path) -> str | None:
    """The text that sentence-transformers puts before every input unless told otherwise."""
    file = folder / PROMPTS
    config = read_json(file) if file.is_file() else {}
    prompts = config.get("prompts") or {}
    return prompts.get(config.get("default_prompt_name")) or None


def _pooling_kind(file: Path) -> Literal["last", "cls", "mean"]:
    config = read_json(file)
    mode = config.get("pooling_mode")
    if mode is None:
        mode = [name for flag, name in FLAGS.items() if config.get(flag)] or ["mean"]
    modes = [mode] if isinstance(mode, str) else list(mode)
    if len(modes) != 1 or modes[0] not in KINDS:
        raise CheckpointError(
            f"{file}: pooling by {' and '.join(map(repr, modes))} is not implemented; known are "
            f"{', '.join(map(repr, KINDS))}, one at a time."
        )
    return KINDS[modes[0]]
