"""`jaxserve show MODEL`, the layers of a model, and `jaxserve models`, what can be served."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import rich.box
import rich.console
import rich.table

from jaxserve.config import DTYPES, user_cache_dir

if TYPE_CHECKING:
    from model_defs.registry import Family

COLUMNS = ("family", "architectures", "for example", "modality", "checked against")
MODALITIES = {"generate": "text", "score": "text to scores", "embed": "text to a vector"}
DEFAULT_DTYPE = "bfloat16"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `show`."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="hub id, folder with a config.json (weights are not needed), .gguf file, Orbax "
        "folder, or 'demo'",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=DTYPES,
        help="dtype that bytes are counted in; auto: the checkpoint's (default: %(default)s)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--download-dir", help="where downloads are kept")


def run(args: argparse.Namespace) -> int:
    """Print the model's parts and sizes; return 0."""
    checkpoints = importlib.import_module("converters.checkpoint")  # deferred: they import JAX
    config = checkpoints.read_config(
        args.model, args.revision, args.download_dir or user_cache_dir()
    )
    print("\n".join(description(config, args.dtype)))
    return 0


def description(config: Mapping[str, Any], dtype: str = "auto") -> list[str]:
    """Describe the model of a config.json: its parts, then its sizes.

    Raises UnsupportedConfig for a config that no family implements.
    """
    registry = importlib.import_module("model_defs.registry")
    describe = importlib.import_module("model_defs.describe")
    family = registry.family_of(config)
    spec = family.spec(config)
    if dtype == "auto":
        dtype = str(config.get("dtype") or config.get("torch_dtype") or DEFAULT_DTYPE)
    item = importlib.import_module("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype
    sizes = describe.sizes(spec, np.dtype(item))
    return [
        f"{config['architectures'][0]}, declared in {family.home}",
        *describe.describe(spec),
        "",
        f"parameters    {sizes.parameters:,}",
        f"weights       {sizes.weight_bytes:,} bytes in {dtype}",
        f"KV cache      {sizes.cache_bytes:,} bytes a token in {dtype}",
    ]


# ---- models ---------------------------------------------------------------------------------


def add_models_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `models`."""
    parser.add_argument(
        "--markdown", action="store_true", help="print the table as the README has it"
    )


def run_models(args: argparse.Namespace) -> int:
    """Print the families, those registered from outside too; return 0."""
    registry = importlib.import_module("model_defs.registry")
    rows = [family_row(family) for family in registry.list_families()]
    if args.markdown:
        print(markdown(rows))
    else:
        print_table(rows)
    return 0


def family_row(family: Family) -> tuple[str, ...]:
    """A family's cells, in the order of COLUMNS; several values of a cell are on lines."""
    demo = importlib.import_module("converters.demo")
    real = [n for n, m in demo.DEMO_MODELS.items() if m.architecture in family.architectures]
    checks = []
    if family.reference == "transformers":
        count = len(family.tiny)
        checks.append(f"transformers ({count} random model{'s' if count > 1 else ''})")
    elif family.reference == "original":
        checks.append("original code or a transcription of it (stored outputs)")
    checks += [f"transformers ({name}, real weights)" for name in real]
    return (
        family.name,
        "\n".join(family.architectures),
        "\n".join(family.examples),
        MODALITIES[family.task],
        "\n".join(checks) or "nothing yet",
    )


def markdown(rows: list[tuple[str, ...]]) -> str:
    """The rows as a Markdown table."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for name, architectures, examples, modality, checks in rows:
        code = [", ".join(f"`{v}`" for v in cell.split("\n")) for cell in (architectures, examples)]
        cells = [name, *code, modality, ", ".join(checks.splitlines())]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Print the rows as a table to standard output."""
    console = rich.console.Console()
    if not console.is_terminal:
        console = rich.console.Console(width=160)
    table = rich.table.Table(*COLUMNS, box=rich.box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*row)
    console.print(table)
