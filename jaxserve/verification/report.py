"""A report as tables for people and as JSON for programs."""

from __future__ import annotations

from typing import Any

import rich.box
import rich.console
import rich.table

from jaxserve.verification.compare import TIE_MARGIN, Difference, GreedyResult, Report

PLAIN_WIDTH = 160  # where there is no terminal to fit into


def print_report(report: Report) -> None:
    """Print the tables and the verdict to standard output."""
    console = rich.console.Console(highlight=False)
    if not console.is_terminal:
        console = rich.console.Console(highlight=False, width=PLAIN_WIDTH)
    prompts = ", ".join(f"{name} {count}" for name, count in report.prompts.items())
    for line in (
        f"model      {report.model}",
        f"reference  {report.reference}",
        f"engine     {report.engine}",
        f"prompts    {prompts} (tokens)",
    ):
        console.print(line, markup=False)
    if report.stages:
        console.print(_stage_table(report))
    if any(stage.layers for stage in report.stages):
        console.print(_layer_table(report))
        for stage in report.stages:
            if bad := stage.bad_layers(report.tolerance):
                console.print(f"first bad layer of '{stage.name}': {bad[0]}", markup=False)
    console.print(_read_table(report) if report.read else _greedy_table(report))
    times = ", ".join(f"{what} {s:.1f}" for what, s in report.seconds.items())
    console.print(f"seconds: {times}", markup=False)
    console.print("PASS" if report.passes else "FAIL", markup=False)


def to_json(report: Report) -> dict[str, Any]:
    """The report as plain data; infinite differences (NaN in a result) become null."""

    def difference(d: Difference) -> dict[str, Any]:
        finite = d.max < float("inf")
        return {
            "max": d.max if finite else None,
            "mean": d.mean if finite else None,
            "reference_std": d.std,
            "prompt": d.prompt,
            "position": d.position,
        }

    return {
        "passes": report.passes,
        "model": report.model,
        "reference": report.reference,
        "engine": report.engine,
        "tolerance": report.tolerance,
        "prompts": report.prompts,
        "stages": [
            {
                "name": stage.name,
                "steps": stage.num_steps,
                "passes": stage.passes(report.tolerance),
                "logits": difference(stage.logits),
                "rounding": stage.rounding,
                "layers": [difference(layer) for layer in stage.layers],
            }
            for stage in report.stages
        ],
        "greedy": [
            {
                "prompt": result.name,
                "tokens": result.num_tokens,
                "equal": result.num_equal,
                "margin": result.margin,
                "passes": result.passes,
            }
            for result in report.greedy
        ],
        "read": [
            {
                "prompt": result.name,
                "difference": result.difference if result.difference < float("inf") else None,
                "cosine": result.cosine,
                "passes": result.passes(report.tolerance),
            }
            for result in report.read
        ],
        "seconds": {what: round(s, 2) for what, s in report.seconds.items()},
    }


def _table(title: str, *columns: str) -> rich.table.Table:
    table = rich.table.Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD)
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 else "right")
    return table


def _stage_table(report: Report) -> rich.table.Table:
    table = _table(
        f"{report.outputs} at every position: absolute difference, at most {report.tolerance:g} "
        "allowed",
        *("stage", "steps", "max", "mean", "max / std", "largest at", "rounding there", "verdict"),
    )
    for stage in report.stages:
        d = stage.logits
        table.add_row(
            stage.name,
            str(stage.num_steps),
            f"{d.max:.2e}",
            f"{d.mean:.2e}",
            f"{d.relative:.2e}",
            f"prompt {d.prompt}, {d.position}",
            "-" if stage.rounding is None else f"{stage.rounding:.1e}",
            "ok" if d.max <= report.tolerance else "TOO FAR",
        )
    return table


def _layer_table(report: Report) -> rich.table.Table:
    """Layers as rows, stages as columns; the standard deviation is the reference's."""
    table = _table(
        f"Hidden states after each layer: max (mean) difference; mean at most {report.tolerance:g} "
        "of the layer's standard deviation",
        *("layer", "std", *(stage.name for stage in report.stages), "verdict"),
    )
    for index, layers in enumerate(zip(*(s.layers for s in report.stages), strict=True)):
        bad = any(index in stage.bad_layers(report.tolerance) for stage in report.stages)
        table.add_row(
            str(index),
            f"{layers[0].std:.3g}",
            *(f"{d.max:.2e} ({d.mean:.1e})" for d in layers),
            "TOO FAR" if bad else "ok",
        )
    return table


def _greedy_table(report: Report) -> rich.table.Table:
    table = _table(
        "Greedy text, all prompts in one continuous batch",
        *("prompt", "tokens", "equal", "verdict"),
    )
    for result in report.greedy:
        table.add_row(result.name, str(result.num_tokens), str(result.num_equal), _verdict(result))
    return table


def _read_table(report: Report) -> rich.table.Table:
    table = _table(
        "Whole texts, all in one continuous batch: absolute difference, and cosine of embeddings",
        *("prompt", "max", "cosine", "verdict"),
    )
    for result in report.read:
        table.add_row(
            result.name,
            f"{result.difference:.2e}",
            "-" if result.cosine is None else f"{result.cosine:.8f}",
            "ok" if result.passes(report.tolerance) else "TOO FAR",
        )
    return table


def _verdict(result: GreedyResult) -> str:
    if result.is_equal:
        return "identical"
    known = "" if result.margin is None else f", reference's top-2 margin {result.margin:.1e}"
    if result.is_tie:
        return f"differs from token {result.num_equal}{known} < {TIE_MARGIN:g}: a tie, accepted"
    return f"DIFFERS from token {result.num_equal}{known}"
