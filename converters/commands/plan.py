"""`jaxserve plan SRC`: where each tensor of a checkpoint goes, from its headers only."""

from __future__ import annotations

import argparse
import importlib
import json
from typing import TYPE_CHECKING

import rich.console
import rich.markup
import rich.table

if TYPE_CHECKING:
    from converters.plan import ModelPlan, PlanRow

COLUMNS = ("checkpoint", "canonical", "shape", "dtype", "device array", "sharding")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the checkpoint and the mesh to plan for; the mesh needs no devices."""
    parser.add_argument(
        "src", metavar="SRC", help="a folder, a .gguf file, a hub id, or 'demo' or 'gemma-270m'"
    )
    parser.add_argument(
        "--tp-size",
        "--tensor-parallel-size",
        "--tp",
        type=_positive,
        default=1,
        metavar="N",
        help="devices that share each layer (need not be on this machine)",
    )
    parser.add_argument(
        "--dp-size",
        "--data-parallel-size",
        "--dp",
        type=_positive,
        default=1,
        metavar="N",
        help="copies of the model",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--download-dir", help="where downloads are kept")


def run(args: argparse.Namespace) -> int:
    """Print the plan and return 0; a checkpoint that does not fit its config raises."""
    checkpoints = importlib.import_module("converters.checkpoint")
    planning = importlib.import_module("converters.plan")  # deferred: it imports JAX
    sharding = importlib.import_module("model_defs.sharding")
    checkpoint = checkpoints.open_checkpoint(args.src, args.revision, args.download_dir)
    rules = sharding.ShardingRules(sharding.make_abstract_mesh(args.dp_size, args.tp_size))
    plan = planning.plan_checkpoint(checkpoint, rules)
    print_json(plan) if args.json else print_table(plan)
    return 0


def print_json(plan: ModelPlan) -> None:
    """Print the plan as one JSON object."""
    tensors = [
        {
            "source": row.source,
            "name": row.name,
            "shape": row.shape,
            "dtype": row.dtype,
            "array": row.array,
            "array_shape": row.array_shape,
            "sharding": list(row.sharding),
        }
        for row in plan.rows()
    ]
    print(json.dumps(_totals(plan) | {"tensors": tensors}, indent=2))


def print_table(plan: ModelPlan) -> None:
    """Print the plan as a table, and its totals; plain columns where there is no terminal."""
    lines = [_cells(row) for row in plan.rows()]
    console = rich.console.Console()
    if console.is_terminal:
        _print_grid(console, lines)
    else:
        widths = [max(map(len, column)) for column in zip(COLUMNS, *lines, strict=True)]
        for cells in (COLUMNS, *lines):
            padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
            print("  ".join(padded).rstrip())
    totals = _totals(plan)
    for name in totals["dropped"]:
        print(f"not used: {name}")
    mesh = " x ".join(f"{axis} {size}" for axis, size in totals["mesh"].items())
    print(
        f"{totals['architecture']}: {len(lines)} tensors, {totals['parameters']:,} parameters, "
        f"{totals['checkpoint_bytes'] / 1e9:.3f} GB; on a mesh of {mesh}: "
        f"{totals['bytes_per_device'] / 1e9:.3f} GB of {totals['dtype']} weights on each device"
    )


def _print_grid(console: rich.console.Console, lines: list[tuple[str, ...]]) -> None:
    """Draw the table with two columns per cell, so that it fits a terminal of usual width."""
    table = rich.table.Table(show_lines=True)
    for upper, lower in zip(COLUMNS[::2], COLUMNS[1::2], strict=True):
        table.add_column(f"{upper}\n{lower}", overflow="fold")
    for cells in lines:
        pairs = zip(cells[::2], cells[1::2], strict=True)
        table.add_row(*(rich.markup.escape(f"{upper}\n{lower}") for upper, lower in pairs))
    console.print(table)


def _axes(axes: str | tuple[str, ...] | None) -> str:
    """The mesh axes over which one dimension is split."""
    return axes if isinstance(axes, str) else "+".join(axes or "-")


def _cells(row: PlanRow) -> tuple[str, ...]:
    return (
        row.source,
        row.name,
        str(list(row.shape)),
        row.dtype,
        f"{row.array} {list(row.array_shape)}",
        f"({', '.join(map(_axes, row.sharding))})",
    )


def _totals(plan: ModelPlan) -> dict[str, object]:
    return {
        "architecture": plan.architecture,
        "mesh": dict(plan.rules.mesh.shape),
        "parameters": plan.num_parameters,
        "checkpoint_bytes": plan.checkpoint_bytes,
        "bytes_per_device": plan.bytes_per_device,
        "dtype": str(plan.dtype),
        "dropped": plan.weights.dropped,
    }


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value
