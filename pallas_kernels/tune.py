"""Find the fastest block sizes on this device and keep them: `python -m pallas_kernels.tune`.

Writes `pallas_kernels/tuned/<device>.json`. Cases that share a shape share the sizes: those count
that are best in all of them together, by the product of their slow-downs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections import defaultdict

import jax

from pallas_kernels import tuning
from pallas_kernels.ragged_paged_attention import gpu_bench


def best_of(times_s: dict[str, dict[object, float]]) -> object:
    """The choice whose times, relative to the best of each case, have the smallest product."""
    common = set.intersection(*(set(times) for times in times_s.values()))

    def slow_down(choice: object) -> float:
        return math.prod(times[choice] / min(times.values()) for times in times_s.values())

    return min(sorted(common, key=repr), key=slow_down)


def tune_attention(match: str, device: jax.Device) -> None:
    """Time every candidate of every case; prints a JSON line each, then writes the best."""
    times: dict[tuple[str, str], dict[str, dict[object, float]]] = defaultdict(dict)
    for case in gpu_bench.CASES:
        if match not in case.name:
            continue
        op, candidates = gpu_bench.candidates(case, device.device_kind)
        seconds = times[op, case.key()].setdefault(case.name, {})
        for sizes in candidates:
            try:
                seconds[sizes] = gpu_bench.time_case_s(
                    case, device_kind=device.device_kind, sizes=sizes
                )
            except (jax.errors.JaxRuntimeError, NotImplementedError) as error:  # too large, say
                print(json.dumps({"case": case.name, "sizes": str(sizes), "error": str(error)}))
                continue
            micros = round(1e6 * seconds[sizes], 1)
            record = {"case": case.name, "us": micros, **dataclasses.asdict(sizes)}
            print(json.dumps(record), flush=True)
    for (op, key), cases in times.items():
        best = best_of(cases)
        measured = {name: round(1e6 * seconds[best], 1) for name, seconds in cases.items()}
        entry = {"parameters": dataclasses.asdict(best), "measured": {"us": measured}}
        path = tuning.write(tuning.device_name(device.device_kind), op, {key: entry})
        print(json.dumps({"op": op, "shape": key, **entry, "file": str(path)}))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.tune", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    arguments = parser.parse_args()
    device = jax.devices()[0]
    if device.platform != "gpu":
        parser.error(f"there is something to tune on a GPU only; this is a {device.device_kind}")
    tune_attention(arguments.match, device)


if __name__ == "__main__":
    main()
