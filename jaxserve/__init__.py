"""Serve language models with JAX: `from jaxserve import LLM, SamplingParams`.

Importing this package imports neither JAX nor the web framework.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxserve.version import __version__

if TYPE_CHECKING:
    from jaxserve.llm import LLM
    from jaxserve.request import SamplingParams

__all__ = ["LLM", "SamplingParams", "__version__"]

_HOMES = {"LLM": "jaxserve.llm", "SamplingParams": "jaxserve.request"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxserve' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
