"""How a benchmark's result is told: a table for people, facts of the run for everyone else."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import rich.console
import rich.table

from jaxserve.version import __version__


def environment() -> dict[str, object]:
    """Device, versions, commit and command of this run."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxserve": __version__,
        "commit": _commit(),
        "command": " ".join(["jaxserve", *sys.argv[1:]]),
    }


def _commit() -> str | None:
    """The commit this package is checked out at, None outside a checkout."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def table(results: Sequence[Mapping[str, object]]) -> None:
    """Print results, which share their keys, to standard error."""
    shown = rich.table.Table()
    for name in results[0]:
        shown.add_column(name, justify="right" if name != "case" else "left")
    for result in results:
        shown.add_row(*(_text(value) for value in result.values()))
    rich.console.Console(stderr=True).print(shown)


def _text(value: object) -> str:
    return f"{value:,.2f}" if isinstance(value, float) else str(value)
