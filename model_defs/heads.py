"""Families that read a text instead of continuing it: a generating family's decoder, another head.

* `scores`: numbers for a whole text (classifiers, reward models).
* `embeds`: a vector for a whole text. `as_embedding` does the same to any generating family.

Nothing of the decoder is declared again: configs and weight rules are those of the family whose
builder is given, less what belongs to its output head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from model_defs.decoder import DecoderSpec, Task
from model_defs.hf_config import HFConfig
from model_defs.layers.embedding import Pooling, ScoreHead
from model_defs.registry import Build, Family, ModelRegistry
from model_defs.weights import Bare, Ignore, Rule, Subtree, Tie

# Keys that say which lengths an embedding may be cut to; every length can be asked for here.
MATRYOSHKA = ("is_matryoshka", "matryoshka_dimensions")
DEFAULT_LABELS = 2  # transformers' default, which its config.json leaves out


def num_labels(cfg: HFConfig, default: int = DEFAULT_LABELS) -> int:
    """How many numbers a text gets: `num_labels`, else the length of `id2label`."""
    names = cfg.get("id2label")
    return cfg.get("num_labels", default if names is None else len(names))


def scores(
    base: Build,
    *architectures: str,
    name: str = "score",
    head: Callable[[HFConfig], ScoreHead] = lambda cfg: ScoreHead(num_labels(cfg)),
    rules: Sequence[Rule] = (),
    examples: Sequence[str] = (),
    tiny: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Register architectures that put a `ScoreHead` on the decoder of `base`'s family.

    Args:
        base: the builder of a registered family.
        name: what is added to that family's name.
        head: of the config; without it one matrix `score`, as transformers'
            `...ForSequenceClassification` have it.
        rules: where the checkpoint's names of the head differ from `score`.
        examples, tiny: as in `register`.
    """
    family = ModelRegistry.built_by(base)
    scoring = replace(
        _with_head(family, "score", head, lambda cfg: rules),
        name=f"{family.name}-{name}",
        architectures=architectures,
        examples=tuple(examples),
        tiny=tuple(tiny),
        reference="transformers" if tiny else "original",
    )
    ModelRegistry.add(scoring)


def embeds(
    base: Build,
    *architectures: str,
    examples: Sequence[str] = (),
    tiny: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Register architectures that are the bare decoder of `base`'s family."""
    family = ModelRegistry.built_by(base)
    embedding = replace(
        as_embedding(family),
        name=f"{family.name}-embed",
        architectures=architectures,
        examples=tuple(examples),
        tiny=tuple(tiny),
        reference="transformers" if tiny else "original",
    )
    ModelRegistry.add(embedding)


def as_embedding(family: Family) -> Family:
    """The family under the same names, giving one vector for a text: last token, length 1.

    Its checkpoints may be stored as those of the generating model or of the bare decoder.
    `is_causal` is read and not applied: attention stays causal (whoever serves should say so).
    """
    if family.task == "embed":
        return family
    embedding = _with_head(family, "embed", lambda cfg: Pooling(), _stored_bare(family))
    return replace(embedding, ignored=(*family.ignored, "is_causal", *MATRYOSHKA))


def _stored_bare(family: Family) -> Callable[[HFConfig], tuple[Rule, ...]]:
    def rules(cfg: HFConfig) -> tuple[Rule, ...]:
        own = family.weight_rules(cfg)
        return tuple(Bare(r.hf) for r in own if isinstance(r, Subtree) and r.ours == "decoder")

    return rules


def _with_head(
    family: Family,
    task: Task,
    head: Callable[[HFConfig], ScoreHead | Pooling],
    first: Callable[[HFConfig], Sequence[Rule]],
) -> Family:
    def build(cfg: HFConfig) -> DecoderSpec:
        spec = family.build(cfg)
        return replace(spec, head=head(cfg), tied=False, logit_scale=None, logit_softcap=None)

    def weights(cfg: HFConfig) -> tuple[Rule, ...]:
        decoder = (rule for rule in family.weight_rules(cfg) if not isinstance(rule, Tie))
        return (*first(cfg), *decoder, Ignore(r"lm_head\..*"))

    return replace(family, build=build, weights=weights, task=task)
