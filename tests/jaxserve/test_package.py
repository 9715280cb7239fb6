"""Importing the package is cheap, and gives what the README promises."""

from __future__ import annotations

import subprocess
import sys


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_importing_jaxserve_loads_neither_jax_nor_the_web_framework() -> None:
    code = (
        "import sys, jaxserve; print(sorted({'jax', 'fastapi', 'transformers'} & {*sys.modules}))"
    )
    assert run(code) == "[]"


def test_the_public_names_are_there() -> None:
    code = (
        "import jaxserve; from jaxserve import LLM, SamplingParams, __version__; "
        "print(LLM.__name__, SamplingParams().max_tokens, hasattr(jaxserve, 'nothing'))"
    )
    assert run(code) == "LLM 128 False"
