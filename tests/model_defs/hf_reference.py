"""Tiny models of transformers' own classes, as the reference for ours.

Weights are random but look real: activations keep their size from layer to layer, norms differ from
one and biases from zero, so that a mistake in any of them moves the logits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

from jaxserve.hf_reference import cache_argument, cache_of


def make_tiny(architecture: str, fields: Mapping[str, Any], seed: int = 0) -> Any:
    """Return a random fp32 model of transformers' class `architecture`."""
    model_class = getattr(transformers, architecture)
    config = model_class.config_class(**fields)
    config._attn_implementation = "eager"  # the only one that does windows to the letter
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(_realistic(name, parameter, noise))
        if getattr(config, "tie_word_embeddings", False):
            # Else a tied random model only repeats its input token.
            signs = torch.randint(0, 2, (config.hidden_size,), generator=generator) * 2 - 1
            norm = _final_norm(model)
            offset = 1 if _stores_scale_minus_one(norm) else 0
            norm.copy_((norm + offset) * signs - offset)
    return model


def _final_norm(model: Any) -> torch.Tensor:
    """The weight of the norm before the head."""
    decoder = model.get_decoder()
    names = ("norm", "norm_f", "final_layernorm", "ln_f")
    return next(getattr(decoder, name) for name in names if hasattr(decoder, name)).weight


def _realistic(name: str, parameter: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    if name.endswith("bias"):
        return 0.2 * noise
    if parameter.ndim == 1:
        return (0 if _stores_scale_minus_one(parameter) else 1) + 0.2 * noise
    if "embed" in name:
        return 0.5 * noise
    gain = 1.5 if "attn" in name else 1.0  # attention that is neither flat nor one key only
    return gain * noise / parameter.shape[1] ** 0.5


def _stores_scale_minus_one(weight: torch.Tensor) -> bool:
    """Whether a fresh norm weight is 0 rather than 1; later values keep near what it was."""
    return abs(float(weight.abs().mean())) < 0.5


def save(model: Any, folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Save a model as a checkpoint and read its config.json and tensors back."""
    model.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def load_bfloat16(architecture: str, folder: Path) -> Any:
    """The saved model with its weights in bfloat16."""
    model_class = getattr(transformers, architecture)
    options = {"dtype": torch.bfloat16, "attn_implementation": "eager"}
    return model_class.from_pretrained(folder, **options).eval()


def has_lm_head(model: Any) -> bool:
    return model.get_output_embeddings() is not None


def hf_logits(model: Any, prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """What the head gives at every position `[L, V]` of each prompt, alone and without a cache.

    Without an LM head, the scores of a text that ends there, or the last hidden states.
    """
    body = model if has_lm_head(model) else model.base_model
    with torch.no_grad():
        outputs = [body(torch.tensor([list(p)]), use_cache=False) for p in prompts]
        if has_lm_head(model):
            return [output.logits[0].float().numpy() for output in outputs]
        head = getattr(model, "score", torch.nn.Identity())
        return [head(output.last_hidden_state)[0].float().numpy() for output in outputs]


def hf_greedy(model: Any, prompt: Sequence[int], count: int) -> tuple[list[int], np.ndarray]:
    """`count` greedy tokens with a KV cache, and the logits `[count, V]` that chose them."""
    cache, new, logits = None, list(prompt), []
    with torch.no_grad():
        for _ in range(count):
            out = model(torch.tensor([new]), **cache_argument(cache), use_cache=True)
            cache = cache_of(out)
            logits.append(out.logits[0, -1].numpy())
            new = [int(logits[-1].argmax())]
    return [int(step.argmax()) for step in logits], np.stack(logits)
