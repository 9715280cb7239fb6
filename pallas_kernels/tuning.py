"""Block sizes that were measured to be fastest, by device, operation and shape: data, not code.

`tuned/<device>.json` maps an operation to shape keys, and those to the parameters and what they
were measured at. `python -m pallas_kernels.tune` writes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "tuned"


def device_name(device_kind: str) -> str:
    """A device's file name: "NVIDIA H100 80GB HBM3" -> "nvidia_h100_80gb_hbm3"."""
    return re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_")


def is_hopper(device_kind: str | None) -> bool:
    """Whether a device, as JAX names it, is a Hopper GPU: H20, H100, H200, H800, GH200."""
    return device_kind is not None and re.match(r"NVIDIA G?H\d", device_kind) is not None


def multiprocessors(device_kind: str | None) -> int:
    """Of a Hopper GPU: so many thread blocks run at once, where one fills a multiprocessor."""
    if device_kind is None:
        return 132
    if re.match(r"NVIDIA H20\b", device_kind):
        return 78
    return 114 if "PCIe" in device_kind else 132


def shape_key(**sizes: object) -> str:
    """The key of a shape, its sizes in the order given: "head_dim=128 group=4"."""
    return " ".join(f"{name}={size}" for name, size in sizes.items())


def tuned(device_kind: str | None, op: str, key: str) -> Mapping[str, Any] | None:
    """Parameters of `op` for a shape on a device, or None where nothing was measured.

    A file is for every device whose name begins with the file's: nvidia_h100.json for all H100s.
    """
    if device_kind is None:
        return None
    entry = _entries(device_name(device_kind)).get(op, {}).get(key)
    return None if entry is None else entry["parameters"]


@cache
def _entries(device: str) -> Mapping[str, Mapping[str, Any]]:
    matching = [path for path in FOLDER.glob("*.json") if device.startswith(path.stem)]
    if not matching:
        return {}
    return json.loads(max(matching, key=lambda path: len(path.stem)).read_text())


def write(device: str, op: str, entries: Mapping[str, Any]) -> Path:
    """Merge `entries` (shape key -> parameters and measurement) of `op` into a device's file."""
    path = FOLDER / f"{device}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known[op] = {**known.get(op, {}), **entries}
    path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    _entries.cache_clear()
    return path
