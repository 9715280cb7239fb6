"""How a benchmark's results are told: a table for people, a JSON line each for everyone else."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import flax
import jax
import jaxlib
import numpy as np
import rich.console
import rich.table

from jaxserve.bench.peers import PeerModel, load_peers, ratio_to_best
from jaxserve.version import __version__

Result = Mapping[str, Any]
MIN_WIDTH = 160  # of the table where there is no terminal


@cache
def environment() -> dict[str, Any]:
    """Device, versions, commit and command of this run."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "flax": flax.__version__,
        "numpy": np.__version__,
        "jaxserve": __version__,
        "commit": _commit(),
        "command": " ".join(["jaxserve", *sys.argv[1:]]),
    }


def _commit() -> str | None:
    """The commit this package is checked out at, None outside a checkout."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def json_line(result: Result) -> None:
    """Print a result, with the facts of the run, on standard output."""
    print(json.dumps({**result, **environment()}), flush=True)


def table(results: Sequence[Result], *, title: str | None = None) -> None:
    """Print results to standard error; a column for every key, "-" where a result lacks it."""
    shown = rich.table.Table(title=title)
    columns = list(dict.fromkeys(name for result in results for name in result))
    for name in columns:
        shown.add_column(name, justify="left" if name == "case" else "right")
    for result in results:
        shown.add_row(*(_text(result.get(name)) for name in columns))
    console = rich.console.Console(stderr=True)
    if not console.is_terminal:  # nothing is gained by folding lines in a file
        console = rich.console.Console(stderr=True, width=max(MIN_WIDTH, console.width))
    console.print(shown)


class Report:
    """Results as they come: a JSON line each at once, all of them as tables in the end.

    Args:
        settings: what every JSON line says about the engine.
        peer: the same model as peers were measured with, if there is one.
    """

    def __init__(self, settings: Mapping[str, Any], peer: PeerModel | None) -> None:
        self.settings, self.peer = settings, peer
        self._peers = load_peers()
        self._is_same_card = environment()["device"] == self._peers.card
        self._tables: dict[str, list[dict[str, Any]]] = {}
        self.not_run: list[str] = []

    def add(
        self,
        table: str,
        case: str,
        row: Mapping[str, Any],
        facts: Mapping[str, Any],
        *,
        peers_s: Mapping[str, float] | None = None,
    ) -> None:
        """Take one result.

        Args:
            table, row: where it is shown, and as what.
            facts: the JSON line.
            peers_s: peer -> its seconds for the same; told beside, and as a ratio on their card.
        """
        known = peers_s or {}
        shown = {"case": case, **row, **{f"{peer} s": value for peer, value in known.items()}}
        told = {"case": case, **facts}
        if known:
            told["peers_s"] = {f"{p} {self._peers.versions[p]}": s for p, s in known.items()}
            if self._is_same_card:
                shown["ratio"] = told["ratio"] = ratio_to_best(facts["seconds"], known)
        self._tables.setdefault(table, []).append(shown)
        json_line({**told, "settings": self.settings})

    def add_peer(self, table: str, case: str, peer: str, row: Mapping[str, Any]) -> None:
        """Show what a peer did in a row of its own."""
        version = self._peers.versions[peer]
        shown = {"case": f"{case}, {peer} {version}", **row}
        self._tables.setdefault(table, []).append(shown)

    def close(self) -> None:
        """Print the tables, and what was left out."""
        peers = self._peers
        where = ", ".join(f"{peer} {version}" for peer, version in peers.versions.items())
        for name, rows in self._tables.items():
            beside = f" (peers: {where}, on {peers.card}, {peers.date})" if self.peer else ""
            table(rows, title=name + beside)
        if self.not_run:
            rich.console.Console(stderr=True).print(f"not run: {', '.join(self.not_run)}")


def _text(value: object) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.3g}"
