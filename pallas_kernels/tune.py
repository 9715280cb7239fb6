"""Find the fastest block sizes on this device and keep them: `python -m pallas_kernels.tune [op]`.

Writes `pallas_kernels/tuned/<device>.json`. Cases that share a shape share the sizes: those count
that are best in all of them together, by the product of their slow-downs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from pallas_kernels import tuning
from pallas_kernels.gpu_timing import all_at_once
from pallas_kernels.grouped_matmul import arg_specs, bench, gpu
from pallas_kernels.ragged_paged_attention import gpu_bench

# Decode calls that read less are over before the host has started the next one.
HOST_BOUND_BYTES = 2**24


def best_of(times_s: dict[str, dict[object, float]]) -> object:
    """The choice whose times, relative to the best of each case, have the smallest product."""
    common = set.intersection(*(set(times) for times in times_s.values()))

    def slow_down(choice: object) -> float:
        return math.prod(times[choice] / min(times.values()) for times in times_s.values())

    return min(sorted(common, key=repr), key=slow_down)


@dataclass(frozen=True)
class Case:
    """Something to time with each of `candidates`, dataclasses of sizes.

    op, key: where the best ones are kept. timer: given `sizes`, compiles a call with them, and
    returns what runs it and returns seconds.
    """

    name: str
    op: str
    key: str
    candidates: Sequence[Any]
    timer: Callable[..., Callable[[], float]]


def attention_cases(device_kind: str) -> Iterator[Case]:
    for case in gpu_bench.CASES:
        if case.is_decode and case.kv_bytes < HOST_BOUND_BYTES:
            continue
        timer = partial(gpu_bench.case_timer, case, device_kind=device_kind)
        for op, candidates in gpu_bench.candidates(case, device_kind).items():
            yield Case(case.name, op, case.key(), candidates, timer)


def grouped_matmul_cases(device_kind: str) -> Iterator[Case]:
    for spec in arg_specs.GPU_SPECS:
        x, w, _, *rows = spec.shapes()
        problem = gpu.problem_of(x, w, *rows, **spec.options)
        timer = partial(bench.gpu_timer, spec, device_kind=device_kind)
        yield Case(spec.name, gpu.OP, problem.key(), gpu.candidates(problem), timer)


OPS = {"ragged_paged_attention": attention_cases, "grouped_matmul": grouped_matmul_cases}


def tune(cases: Iterable[Case], device: jax.Device) -> None:
    """Time every candidate of every case; prints a JSON line each, then writes the best.

    Candidates are compiled on all cores at once, and timed one after the other.
    """
    times: dict[tuple[str, str], dict[str, dict[object, float]]] = defaultdict(dict)
    tried = [(case, sizes) for case in cases for sizes in case.candidates]
    timers = all_at_once([partial(case.timer, sizes=sizes) for case, sizes in tried])
    for (case, sizes), timer in zip(tried, timers, strict=True):
        seconds = times[case.op, case.key].setdefault(case.name, {})
        try:
            seconds[sizes] = timer.result()()
        except (jax.errors.JaxRuntimeError, NotImplementedError) as error:  # too large, say
            print(json.dumps({"case": case.name, "sizes": str(sizes), "error": str(error)}))
            continue
        micros = round(1e6 * seconds[sizes], 1)
        record = {"case": case.name, "us": micros, **dataclasses.asdict(sizes)}
        print(json.dumps(record), flush=True)
    for (op, key), of_cases in times.items():
        best = best_of(of_cases)
        measured = {name: round(1e6 * seconds[best], 1) for name, seconds in of_cases.items()}
        entry = {"parameters": dataclasses.asdict(best), "measured": {"us": measured}}
        path = tuning.write(tuning.device_name(device.device_kind), op, {key: entry})
        print(json.dumps({"op": op, "shape": key, **entry, "file": str(path)}))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.tune", description=__doc__.splitlines()[0]
    )
    parser.add_argument("op", nargs="?", choices=sorted(OPS), help="default: all of them")
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    arguments = parser.parse_args()
    device = jax.devices()[0]
    if device.platform != "gpu":
        parser.error(f"there is something to tune on a GPU only; this is a {device.device_kind}")
    for op in [arguments.op] if arguments.op else OPS:
        cases = OPS[op](device.device_kind)
        tune((case for case in cases if arguments.match in case.name), device)


if __name__ == "__main__":
    main()
