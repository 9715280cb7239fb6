"""Models run by Hugging Face transformers on torch's CPU: what ours are compared with.

Needs the extra `verify`. Importing this module imports torch; nothing that serves does so.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converters.checkpoint import open_checkpoint
from converters.convert import convert
from converters.gguf import GGUFCheckpoint
from converters.hf import HFCheckpoint
from converters.interface import Checkpoint
from jaxserve.config import ConfigError, user_cache_dir

try:
    import torch
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
except ImportError as error:
    raise ConfigError(
        f"Hugging Face's models are run with torch, which cannot be imported ({error}). Install "
        "it: pip install 'jaxserve[verify]'."
    ) from error

logger = logging.getLogger(__name__)

VERSIONS = f"transformers {transformers.__version__}, torch {torch.__version__}"

# transformers 5.24 renamed the KV cache of a call and of its output.
_CACHE_FIELD = next(
    field.name
    for field in dataclasses.fields(transformers.modeling_outputs.CausalLMOutputWithPast)
    if field.name in ("cache", "past_key_values")
)

# Config keys that do not change what a model computes.
_BOOKKEEPING = (
    "_model_name_or_path",
    "_name_or_path",
    "architectures",
    "dtype",
    "transformers_version",
    "use_cache",
)


@dataclass(frozen=True, eq=False)
class Forward:
    """One text through a model. logits: f32[T, V]; layers: f32[L, T, D], each layer's output."""

    logits: np.ndarray
    layers: np.ndarray


@dataclass(frozen=True)
class Greedy:
    """Generated tokens, and how far the logit of each was above the second best."""

    tokens: list[int]
    margins: list[float]


def load_reference(
    model: str | Path | Checkpoint,
    dtype: str = "float32",
    *,
    attention: str = "eager",
    revision: str | None = None,
    download_dir: str | Path | None = None,
) -> Any:
    """Load a checkpoint into transformers' own class, in evaluation mode on the CPU.

    A GGUF file is read by transformers' code, not by ours, where it knows the architecture.

    Args:
        model: an open checkpoint, or what `open_checkpoint` takes.
        dtype: torch's name of it.
        attention: transformers' name of the implementation; "eager" is the plainest.

    Raises CheckpointError, or ConfigError where transformers cannot load it.
    """
    if isinstance(model, str | Path):
        model = open_checkpoint(model, revision, download_dir or user_cache_dir())
    options = {"dtype": getattr(torch, dtype), "attn_implementation": attention}
    if isinstance(model, GGUFCheckpoint):
        loaded = _load_gguf(model, options)
        if loaded is not None:
            return loaded
    if isinstance(model, HFCheckpoint):
        return _load_folder(model.path, options)
    with tempfile.TemporaryDirectory(prefix="jaxserve-reference-") as scratch:
        folder = convert(model.path, Path(scratch) / "hf", "hf").destination
        return _load_folder(folder, options)


def _load_folder(folder: Path, options: Mapping[str, Any]) -> Any:
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **options
        ).eval()
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"transformers cannot load {folder} as a model that generates text: {error}. Compare "
            "with stored outputs instead: --golden FILE."
        ) from error


def _load_gguf(checkpoint: GGUFCheckpoint, options: Mapping[str, Any]) -> Any | None:
    """Load a GGUF file by transformers' code; None where it does not know the architecture.

    Names, row order and values of the tensors are transformers'. The config is ours, because
    transformers ignores rope factors stored as tensors; where the two differ, the log says so.
    """
    fields = {k: v for k, v in checkpoint.config.items() if k not in ("architectures", "dtype")}
    config = transformers.AutoConfig.for_model(**fields)
    with torch.device("meta"):
        names = transformers.AutoModelForCausalLM.from_config(config)
    try:
        stored = load_gguf_checkpoint(
            str(checkpoint.path), return_tensors=True, model_to_load=names
        )
    except (ValueError, NotImplementedError) as error:
        logger.warning("transformers does not read this GGUF file (%s); ours is used", error)
        return None
    theirs = transformers.AutoConfig.for_model(**stored["config"])
    for key, (ours, other) in _differing(config.to_dict(), theirs.to_dict()).items():
        logger.warning("config key %s: %r here, %r in transformers' reading", key, ours, other)
    model = transformers.AutoModelForCausalLM.from_config(config, **options).eval()
    missing, unexpected = model.load_state_dict(stored["tensors"], strict=False)
    model.tie_weights()
    wrong = [name for name in missing if name not in model.all_tied_weights_keys]
    if wrong or unexpected:
        raise ConfigError(
            f"transformers read {checkpoint.path} without {wrong or 'nothing'} and with unknown "
            f"{unexpected or 'nothing'}, so it is no reference. Use the original checkpoint."
        )
    return model


def _differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Values of keys in both configs that differ, by dotted key; float32 rounding does not."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, float) and isinstance(b, float | int):
            return math.isclose(a, b, rel_tol=1e-6)
        return a == b

    left, right = dict(_flat(ours)), dict(_flat(theirs))
    return {
        key: (left[key], right[key])
        for key in sorted(left.keys() & right.keys())
        if not same(left[key], right[key])
    }


def _flat(config: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif key not in _BOOKKEEPING and not str(key).endswith("_token_id"):
            yield f"{prefix}{key}", value


@torch.inference_mode()
def forward(model: Any, token_ids: Sequence[int]) -> Forward:
    """Compute a text at once, without a cache, keeping every position's results."""
    layers: list[np.ndarray] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        layers.append(hidden[0].float().numpy())

    hooks = [layer.register_forward_hook(keep) for layer in model.get_decoder().layers]
    try:
        logits = model(torch.tensor([list(token_ids)]), use_cache=False).logits[0]
    finally:
        for hook in hooks:
            hook.remove()
    return Forward(logits.float().numpy(), np.stack(layers))


@torch.inference_mode()
def rounding(model: Any, token_ids: Sequence[int], logits: np.ndarray) -> np.ndarray:
    """How far rounding alone may move the logits of a text: f32[T], the most at each position.

    The text is computed again with every embedded value changed by the last bit of a float32, up
    or down, and compared with `logits`. Most positions hardly move; where they do, no two correct
    implementations agree.
    """
    draw = torch.Generator().manual_seed(0)

    def nudge(module: Any, inputs: Any, output: Any) -> Any:
        signs = torch.randint(0, 2, output.shape, generator=draw) * 2 - 1
        return output * (1 + signs * torch.finfo(torch.float32).eps)

    hook = model.get_input_embeddings().register_forward_hook(nudge)
    try:
        moved = model(torch.tensor([list(token_ids)]), use_cache=False).logits[0]
    finally:
        hook.remove()
    return np.abs(moved.float().numpy() - logits).max(axis=-1)


def cache_argument(cache: Any) -> dict[str, Any]:
    """The KV cache as a keyword argument of a model, under the name this transformers gives it."""
    return {_CACHE_FIELD: cache}


def cache_of(output: Any) -> Any:
    """The KV cache in what a model returned."""
    return getattr(output, _CACHE_FIELD)


@torch.inference_mode()
def greedy(
    model: Any, token_ids: Sequence[int], num_tokens: int, *, use_cache: bool = True
) -> Greedy:
    """Generate greedily, past any end-of-text token.

    Without the cache the whole text is computed again for every token.
    """
    known, new, cache = list(token_ids), list(token_ids), None
    margins = []
    for _ in range(num_tokens):
        out = model(
            torch.tensor([new]), **cache_argument(cache), use_cache=use_cache, logits_to_keep=1
        )
        logits = out.logits[0, -1].float()
        first, second = logits.topk(2).values
        margins.append(float(first - second))
        known.append(int(logits.argmax()))  # of equal logits the first, which topk need not give
        cache, new = (cache_of(out), known[-1:]) if use_cache else (None, known)
    return Greedy(known[len(token_ids) :], margins)


class HFTimer:
    """Times greedy generation of equal-length prompts, with transformers' fastest CPU settings.

    Args:
        model, revision, download_dir: as `load_reference` takes them.
    """

    def __init__(
        self,
        model: str | Path | Checkpoint,
        *,
        revision: str | None = None,
        download_dir: str | Path | None = None,
    ) -> None:
        self._model = load_reference(
            model, attention="sdpa", revision=revision, download_dir=download_dir
        )

    @torch.inference_mode()
    def seconds(self, prompts: Sequence[Sequence[int]], num_output: int) -> float:
        """Seconds until the first token where `num_output` is 1, else from the first to the last.

        The prompts must have one length; nothing ends before `num_output` tokens.
        """
        start_s = time.perf_counter()
        new, cache = torch.tensor([list(prompt) for prompt in prompts]), None
        for step in range(num_output):
            out = self._model(new, **cache_argument(cache), use_cache=True, logits_to_keep=1)
            cache = cache_of(out)
            new = out.logits[:, -1].argmax(dim=-1, keepdim=True)
            new[0, 0].item()  # as an engine must, to send the token
            if step == 0 and num_output > 1:
                start_s = time.perf_counter()
        return time.perf_counter() - start_s
