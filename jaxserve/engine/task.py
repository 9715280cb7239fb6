"""What a checkpoint is served for: to write text, to score it, or to make vectors of it."""

from __future__ import annotations

import dataclasses
import logging

from converters.interface import Checkpoint
from converters.sentence_transformers import default_prompt, read_pooling
from jaxserve.config import ConfigError, EngineConfig
from model_defs.decoder import DecoderSpec
from model_defs.heads import as_embedding
from model_defs.hf_config import UnsupportedConfig
from model_defs.layers.embedding import Pooling
from model_defs.registry import Family, family_of

logger = logging.getLogger(__name__)


def family_and_spec(config: EngineConfig, checkpoint: Checkpoint) -> tuple[Family, DecoderSpec]:
    """What to serve a checkpoint as: its family, under another head with --is-embedding.

    How token states become one vector is the checkpoint's to say, in the files that
    sentence-transformers writes. A model whose ropes stretch with the request takes any
    --context-length.
    """
    family = family_of(checkpoint.config)
    if family.task == "generate" and config.is_embedding:
        family = as_embedding(family)
    try:
        spec = family.spec(checkpoint.config)
    except UnsupportedConfig as error:
        if family.task == "generate" and checkpoint.config.get("is_causal") is False:
            raise ConfigError(
                f"{config.model_path}: its config.json says is_causal: false, so it is no model "
                "that writes text. Serve its embeddings with --is-embedding."
            ) from error
        raise
    if config.context_length is not None and spec.grows:
        longest = max(spec.max_length, config.context_length)
        spec = dataclasses.replace(spec, max_length=longest)
    if spec.task != "embed":
        return family, spec
    pooling = read_pooling(checkpoint.path) if checkpoint.path.is_dir() else None
    return family, dataclasses.replace(spec, head=pooling or spec.head)


def log_embedding(checkpoint: Checkpoint, spec: DecoderSpec) -> None:
    """Say how embeddings are made, and where that is not what the files would have."""
    assert isinstance(spec.head, Pooling)
    logger.info(
        "embeddings: %s, %s",
        {"last": "the last token", "cls": "the first token", "mean": "the mean of all tokens"}[
            spec.head.kind
        ],
        "normalised" if spec.head.normalize else "not normalised",
    )
    if checkpoint.config.get("is_causal") is False:
        logger.warning(
            "config.json says is_causal: false, for code of its own that lets tokens see later "
            "ones; it is served with causal attention, as other servers do"
        )
    if checkpoint.path.is_dir() and (prompt := default_prompt(checkpoint.path)):
        logger.warning(
            "sentence-transformers would put %r before every text; send it with the text where it "
            "is wanted",
            prompt,
        )
