"""Compile fast where a test asks what a program computes, and not how fast it is.

Tiny programs compile for seconds and run for milliseconds.
"""

from __future__ import annotations

from functools import partial

import jax

WANTED = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,  # the older ones compile in two thirds of the time
}


def known(name: str, value: object) -> bool:
    """Whether this version of XLA has the option: they come and go."""
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


QUICK_COMPILE = {
    name: value
    for name, value in WANTED.items()
    if jax.default_backend() == "cpu" and known(name, value)
}
quick_jit = partial(jax.jit, compiler_options=QUICK_COMPILE)
