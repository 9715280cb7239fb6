"""Time the gated product over GPU_SPECS: `python -m pallas_kernels.gated_matmul.bench`, on a GPU.

Prints one JSON line per case and implementation: microseconds per call, and the share of what a
large matrix product reaches on this card. Elsewhere there is one implementation, XLA's, and nothing
to compare.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial

import jax

from pallas_kernels.gated_matmul.api import gated_matmul
from pallas_kernels.gated_matmul.arg_specs import GPU_SPECS, ArgSpec
from pallas_kernels.gpu_timing import Card, all_at_once, compile_timer

IMPLEMENTATIONS = ("hopper", "xla")


def timer(spec: ArgSpec, implementation: str, device_kind: str) -> Callable[[], float]:
    """Compile a call; see `compile_timer`. Calls in a row use other matrices."""

    def make():
        x, _ = spec.arguments()
        return [spec.arguments(seed)[1] for seed in range(3)], (x,)

    def call(w, x):
        options = {"device_kind": device_kind, "implementation": implementation}
        return gated_matmul(x, w, combine=spec.combine, **options)

    return compile_timer(call, make, 12)


def records(match: str, implementations: tuple[str, ...]) -> Iterator[dict]:
    """Yield the JSON record of each case whose name contains `match`, by implementation."""
    card = Card.measured()
    chosen = [(spec, name) for spec in GPU_SPECS if match in spec.name for name in implementations]
    compilers = [partial(timer, spec, name, card.kind) for spec, name in chosen]
    for (spec, name), compiled in zip(chosen, all_at_once(compilers), strict=True):
        head = {"op": "gated_matmul", "case": spec.name, "implementation": name}
        yield card.record(head, compiled.result()(), flops=spec.flops)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time the gated product on a GPU.")
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, help="default: both")
    arguments = parser.parse_args(argv)
    if jax.default_backend() != "gpu":
        print("gated_matmul: nothing to compare without a GPU", file=sys.stderr)
        return
    chosen = arguments.implementation
    for record in records(arguments.match, (chosen,) if chosen else IMPLEMENTATIONS):
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
