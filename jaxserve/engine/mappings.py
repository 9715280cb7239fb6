"""Memory mappings of this process: a step compiled for a CPU takes hundreds, and they are limited.

XLA maps every piece of machine code by itself. At the kernel's limit its compiler logs "LLVM
compilation error: Cannot allocate memory" and returns a program all the same; writing that to a
cache, or running it, ends the process with a segmentation fault (seen with jaxlib 0.10.2). So they
are counted before compiling.
"""

from __future__ import annotations

from pathlib import Path

MAPS = Path("/proc/self/maps")
LIMIT = Path("/proc/sys/vm/max_map_count")
# More than one step takes: about 20 a layer were counted (600 for 30 layers).
NEEDED = 8192


class TooManyMappings(ValueError):
    """This process has so many memory mappings that it cannot hold another compiled step."""


def num_mappings() -> int:
    """Return how many memory mappings this process has; 0 where the system does not say."""
    try:
        return MAPS.read_bytes().count(b"\n")
    except OSError:
        return 0


def max_mappings() -> int | None:
    """Return how many the system allows; None where it sets no such limit."""
    try:
        return int(LIMIT.read_text())
    except (OSError, ValueError):
        return None


def require_mappings() -> None:
    """Make sure that one more step can be compiled for, or loaded on, a CPU.

    Raises:
        TooManyMappings: fewer than NEEDED mappings are left.
    """
    limit = max_mappings()
    if limit is None:
        return
    found = num_mappings()
    if found + NEEDED > limit:
        raise TooManyMappings(
            f"no further step can be compiled: a step needs up to {NEEDED} memory mappings, and "
            f"this process has {found} of the {limit} that the system allows. Raise the limit "
            f"(sysctl -w vm.max_map_count={4 * limit}), close engines that are no longer needed, "
            f"or drop compiled functions of your own (jax.clear_caches())."
        )
