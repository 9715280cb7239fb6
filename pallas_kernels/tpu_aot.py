"""Compile for TPUs that are not there, and read what the compiler made.

libtpu, from the package index, compiles for a topology it is told by name; no TPU and no network
are needed. Where several processes do so at once, ALLOW_MULTIPLE_LIBTPU_LOAD=1 must be in the
environment; TPU_SKIP_MDS_QUERY=1 keeps libtpu from asking a cloud host what it runs on.

The compiled text counts more truly than `cost_analysis()`, which counts copies into VMEM twice.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
from jax.experimental import topologies


@dataclass(frozen=True)
class Chip:
    """A TPU generation as JAX sees it; sizes and rates are of one JAX device.

    topology: the smallest slice that the tests compile for. devices_per_chip: TPU7x shows each of
    a chip's two cores. hbm_bytes, hbm_bytes_per_s, bf16_flops_per_s: as published, by source.
    """

    topology: str
    devices_per_chip: int
    hbm_bytes: int
    hbm_bytes_per_s: float
    bf16_flops_per_s: float
    source: str


_DOCS = "https://docs.cloud.google.com/tpu/docs"
CHIPS = {
    "v5e": Chip("v5e:2x2", 1, 16 * 10**9, 819e9, 197e12, f"{_DOCS}/v5e"),
    "v6e": Chip("v6e:2x2", 1, 32 * 10**9, 1638e9, 918e12, f"{_DOCS}/v6e"),
    "v5p": Chip("v5p:2x2x1", 1, 95 * 2**30, 2765e9, 459e12, f"{_DOCS}/tpu7x"),
    "tpu7x": Chip("tpu7x:2x2x1", 2, 96 * 2**30, 3690e9, 1153.5e12, f"{_DOCS}/tpu7x"),
}


class NoTopology(RuntimeError):
    """libtpu is missing, or does not know the topology."""


def topology_devices(topology: str) -> list[jax.Device]:
    """Devices of a TPU slice ("v6e:2x2") to compile for; they run nothing.

    Raises NoTopology if libtpu cannot be loaded or does not know it.
    """
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:  # What libtpu raises depends on what it lacks.
        reason = str(error).partition("\n")[0]
        raise NoTopology(
            f"cannot compile for {topology}: {type(error).__name__}: {reason}. Install the libtpu "
            f"that this JAX asks for: pip install 'jax[tpu]=={jax.__version__}' (Linux, x86-64)"
        ) from error
    return list(description.devices)


# ---- compiled text ------------------------------------------------------------------------------

_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%(?P<name>[\w.-]+) = (?P<type>\(.*?\)|\S+) (?P<op>[a-z][\w-]*)\((?P<rest>.*)$",
    re.MULTILINE,
)
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_OPERAND = re.compile(r"%([\w.-]+)")
_ITEM_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "s8": 1, "u8": 1}
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_NO_DATA_MOVED = ("parameter", "get-tuple-element", "tuple", "bitcast", "custom-call", "copy-done")


class Instruction(NamedTuple):
    """One line of compiled text. shapes: dtype and sizes of each array it makes."""

    name: str
    op: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    rest: str

    @property
    def num_bytes(self) -> int:
        return sum(_ITEM_BYTES.get(dtype, 4) * math.prod(sizes) for dtype, sizes in self.shapes)


def instructions(text: str) -> Iterator[Instruction]:
    """Every instruction of a compiled module's text, fused ones included."""
    for match in _INSTRUCTION.finditer(text):
        shapes = tuple(
            (dtype, tuple(int(size) for size in sizes.split(",") if size))
            for dtype, sizes in _ARRAY.findall(match["type"])
        )
        yield Instruction(match["name"], match["op"], shapes, match["rest"])


def collectives(text: str) -> list[Instruction]:
    """Collective operations, each once: an asynchronous one by its start."""
    return [each for each in instructions(text) if each.op.removesuffix("-start") in _COLLECTIVES]


def kernel_calls(text: str, name: str) -> int:
    """How often the Pallas kernel `name` is called."""
    return sum(
        each.op == "custom-call"
        and 'custom_call_target="tpu_custom_call"' in each.rest
        and each.name.startswith(name)
        for each in instructions(text)
    )


def arrays_made(text: str, shape: tuple[int, ...]) -> list[Instruction]:
    """Instructions that make a new array of this shape: copies of a cache that should not be.

    A kernel whose output is the same memory as its input, and views, make none.
    """
    return [
        each
        for each in instructions(text)
        if each.op not in _NO_DATA_MOVED and any(sizes == shape for _, sizes in each.shapes)
    ]


def matmul_flops(text: str) -> int:
    """Operations of the matrix products of one device, two for a product and a sum.

    TPUs' compiler writes a matrix product as a convolution without a window. Kernels count nothing.
    Raises ValueError for one with a window, which no model here has.
    """
    known, total = {}, 0
    for each in instructions(text):
        known[each.name] = each.shapes
        if each.op != "convolution":
            continue
        labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", each.rest)
        if labels is None or "window=" in each.rest:
            raise ValueError(f"cannot count the operations of: {each.op}({each.rest[:200]}")
        right = known[_OPERAND.findall(each.rest)[1]][0][1]
        contracted = right[labels[2].index("i")]
        total += 2 * math.prod(each.shapes[0][1]) * contracted
    return total
