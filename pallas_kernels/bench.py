"""Time the kernels on this machine: `python -m pallas_kernels.bench [op]`, one JSON line a case.

On a GPU, ragged paged attention is timed alone; where FlashAttention 3 was timed, too, its figure
stands beside ours, with the share of what a copy (decode) or a matrix product (prefill) reaches on
this card. Everything else is timed by the operation's own bench, which takes further arguments.
"""

from __future__ import annotations

import argparse
import json
from functools import partial

import jax

from pallas_kernels.gated_matmul import bench as gated_matmul
from pallas_kernels.gpu_timing import Card, all_at_once
from pallas_kernels.grouped_matmul import bench as grouped_matmul
from pallas_kernels.ragged_paged_attention import bench as ragged_paged_attention
from pallas_kernels.ragged_paged_attention import gpu_bench

OPS = {
    "ragged_paged_attention": ragged_paged_attention,
    "grouped_matmul": grouped_matmul,
    "gated_matmul": gated_matmul,
}


def gpu_attention_records(match: str):
    """Yield the JSON record of each case whose name contains `match`."""
    card = Card.measured()
    cases = [case for case in gpu_bench.CASES if match in case.name]
    compilers = [partial(gpu_bench.case_timer, case, device_kind=card.kind) for case in cases]
    for case, timer in zip(cases, all_at_once(compilers), strict=True):
        seconds = timer.result()()
        head = {
            "op": "ragged_paged_attention",
            "case": case.name,
            "page_size": case.page_size,
            "fa3_us": case.fa3_us,
            "fa3_ratio": None if case.fa3_us is None else round(case.fa3_us / seconds / 1e6, 3),
        }
        work = {"num_bytes": case.kv_bytes} if case.is_decode else {"flops": case.flops}
        yield card.record(head, seconds, **work)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.bench",
        description=__doc__.splitlines()[0],
        epilog="Further arguments go to the operation's own bench; see its --help.",
    )
    parser.add_argument("op", nargs="?", choices=sorted(OPS), help="default: all of them")
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    arguments, rest = parser.parse_known_args()
    on_gpu = jax.default_backend() == "gpu"
    for op in [arguments.op] if arguments.op else OPS:
        if on_gpu and op == "ragged_paged_attention":
            for record in gpu_attention_records(arguments.match):
                print(json.dumps(record), flush=True)
        else:
            OPS[op].main(["--match", arguments.match, *rest])


if __name__ == "__main__":
    main()
