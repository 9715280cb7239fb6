"""A model's spec as text for people: what it is made of, layer by layer, and how large it is."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from model_defs.decoder import DecoderSpec
from model_defs.layers.linear import BuildContext
from model_defs.sharding import ShardingRules, make_abstract_mesh

MAX_VALUES = 6  # of a tuple of numbers that are shown


@dataclass(frozen=True)
class Sizes:
    """Of one copy of the model. `cache_bytes` is what a token takes in all layers together."""

    parameters: int
    weight_bytes: int
    cache_bytes: int


def sizes(spec: DecoderSpec, dtype: np.dtype) -> Sizes:
    """Count parameters and bytes with weights and KV cache in `dtype`; nothing is allocated."""
    rules = ShardingRules(make_abstract_mesh(1, 1))
    module = spec.build(BuildContext(rules, dtype, dtype))
    parameters = module.num_parameters
    return Sizes(
        parameters=parameters,
        weight_bytes=parameters * dtype.itemsize,
        cache_bytes=sum(cache.token_bytes for cache in module.cache_specs),
    )


def describe(spec: DecoderSpec) -> list[str]:
    """Lines that show every part of a spec; equal consecutive layers are shown once."""
    lines = [
        f"{field.name:<13} {as_text(getattr(spec, field.name))}"
        for field in dataclasses.fields(spec)
        if field.name != "layers" and not _is_absent(getattr(spec, field.name))
    ]
    first = 0
    for layer, group in itertools.groupby(spec.layers):
        last = first + len(list(group)) - 1
        count = last - first + 1
        span = f"layer {first}" if count == 1 else f"layers {first}-{last} ({count} equal)"
        lines += ["", span]
        lines += [
            f"  {field.name:<11} {as_text(getattr(layer, field.name))}"
            for field in dataclasses.fields(layer)
            if not _is_absent(getattr(layer, field.name))
        ]
        first = last + 1
    return lines


def as_text(value: Any) -> str:
    """A spec as the call that makes it; parts that are not there are left out."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        given = (f"{name}={as_text(v)}" for name, v in fields.items() if not _is_absent(v))
        return f"{type(value).__name__}({', '.join(given)})"
    if isinstance(value, tuple) and len(value) > MAX_VALUES:
        shown = ", ".join(map(as_text, value[:MAX_VALUES]))
        return f"({shown}, ... {len(value)} values)"
    return repr(value)


def _is_absent(value: Any) -> bool:
    return value is None or value is False
