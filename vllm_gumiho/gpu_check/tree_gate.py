"""The command ``vllm-gumiho tree-gate``: whether a GPU has the rows to spare that a draft tree takes.

A tree is worth building only where the target's pass over its rows costs hardly more than one over a chain's: then its
longer accepted length is a gain.  No tree is run; the passes are those of a stock engine, with CUDA graphs, on an 8B
target with random weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vllm_gumiho.benchmark.shapes import SHAPES, write_models
from vllm_gumiho.engines.facts import machine, versions, with_python
from vllm_gumiho.engines.process import Worker
from vllm_gumiho.env import ONE_PROCESS, V2_RUNNER
from vllm_gumiho.errors import GpuCheckError
from vllm_gumiho.files import write_json

TASKS = "vllm_gumiho.gpu_check.step_tasks"
# What a pass over the second number of rows may cost over one of the first, by batch size.
ALLOWED = {1: 0.06, 4: 0.08}


@dataclass(frozen=True)
class Grid:
    """What is timed.  rows: of each request; the first is a chain's of seven drafts, the second a tree's of sixteen."""

    shape: str = "llama-3-8b"
    rows: tuple[int, ...] = (8, 17, 33, 64)
    batches: tuple[int, ...] = (1, 4, 16)
    contexts: tuple[int, ...] = (512, 4096)
    repeats: int = 30
    on_cpu: bool = False


DRY = Grid("tiny", (2, 3), (1, 4), (32,), 1, True)


def tree_gate(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for report.json and logs.")] = Path(
        "out/tree-gate"
    ),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="A tiny shape on the CPU, in Triton's interpreter; no result.")
    ] = False,
) -> None:
    """Whether draft trees could pay on this GPU: times of stock target passes at a chain's and at trees' rows.

    Go, if 17 rows of a request cost at most 6 % over 8 at batch 1 and 8 % at batch 4, at every context.
    """
    import torch

    if not dry_run and not torch.cuda.is_available():
        raise GpuCheckError("tree-gate times a GPU and PyTorch sees none; --dry-run goes through it on the CPU")
    grid, console = DRY if dry_run else Grid(), Console()
    output.mkdir(parents=True, exist_ok=True)
    cells = measure(grid, output.resolve(), console)
    report = {
        "dry_run": dry_run,
        "machine": machine(),
        "versions": with_python(versions()),
        "grid": vars(grid),
        "cells": cells,
        **judge(cells, grid),
    }
    write_json(output / "report.json", report, indent=1)
    _show(console, cells, grid)
    console.print(("DRY RUN, no result. " if dry_run else "") + report["verdict"], highlight=False, soft_wrap=True)
    console.print(str(output / "report.json"), highlight=False, markup=False, soft_wrap=True)


def measure(grid: Grid, folder: Path, console: Console) -> list[dict[str, Any]]:
    """A cell for each number of rows, batch size and context, milliseconds; an engine for each number of rows.

    Raises: EngineError.
    """
    shape = SHAPES[grid.shape]
    longest = max(grid.contexts) + max(grid.rows) + 16
    folders = write_models(shape, folder / "models")
    # As many drafts as a tree has nodes: any drafter will do, as its time is not looked at.
    config = shape.config(max_position_embeddings=max(longest, 4096))
    write_json(folders["target"] / "config.json", config)
    write_json(folders["eagle"] / "config.json", config | {"num_hidden_layers": 1})
    cells = []
    for rows in grid.rows:
        with (
            console.status(f"{rows} rows a request"),
            Worker(
                TASKS,
                {"llm": _engine(grid, folders, rows, longest), "interpreter": grid.on_cpu},
                f"{rows} rows",
                environment={ONE_PROCESS.name: "0", V2_RUNNER.name: "1"},
                log=folder / f"{rows}-rows.log",
            ) as engine,
        ):
            for batch in grid.batches:
                for context in grid.contexts:
                    found = engine.ask("pass", batch=batch, rows=rows, context=context, repeats=grid.repeats)
                    total = found["forward"] + found["logits"]
                    cells.append({"rows": rows, "batch": batch, "context": context, "ms": total, **found})
    return cells


def _engine(grid: Grid, folders: dict[str, Path], rows: int, longest: int) -> dict[str, Any]:
    sizes = [rows * batch for batch in grid.batches]
    return {
        "model": str(folders["target"]),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": longest,
        "max_num_seqs": max(grid.batches),
        "max_num_batched_tokens": max(longest, max(grid.batches) * max(grid.rows)),
        "dtype": "float32" if grid.on_cpu else "bfloat16",
        "enforce_eager": grid.on_cpu,
        "speculative_config": {
            "method": "eagle",
            "model": str(folders["eagle"]),
            "num_speculative_tokens": rows - 1,
        },
        **({} if grid.on_cpu else {"compilation_config": {"cudagraph_capture_sizes": sizes}}),
    }


def judge(cells: Sequence[dict[str, Any]], grid: Grid) -> dict[str, Any]:
    """``checks``, what more rows cost against what they may; ``go``; and the ``verdict`` in words."""
    at = {(cell["rows"], cell["batch"], cell["context"]): cell for cell in cells}
    chain, tree = grid.rows[:2]
    checks = []
    for batch, allowed in ALLOWED.items():
        for context in grid.contexts:
            cost = at[tree, batch, context]["ms"] / at[chain, batch, context]["ms"] - 1
            checks.append({"batch": batch, "context": context, "cost": cost, "allowed": allowed})
    graphs = all(cell["full_graph"] for cell in cells)
    dear = [check for check in checks if check["cost"] > check["allowed"]]
    said = ", ".join(
        f"{check['cost']:+.1%} at batch {check['batch']}, context {check['context']} ({check['allowed']:.0%} allowed)"
        for check in dear or checks
    )
    rows = f"{tree} rows of a request against {chain} cost {said}"
    if not graphs:
        verdict = f"Not judged, as not every pass was one CUDA graph, and times without hide what rows cost: {rows}."
    elif dear:
        verdict = f"No: {rows}; a tree would not pay here."
    else:
        verdict = (
            f"Go, as far as rows are concerned: {rows}. A tree is worth building only where the chain itself pays: "
            "measure that with vllm-gumiho bench."
        )
    return {"checks": checks, "go": graphs and not dear, "verdict": verdict}


def _show(console: Console, cells: Sequence[dict[str, Any]], grid: Grid) -> None:
    table = Table("batch", "context", *(f"{rows} rows" for rows in grid.rows), title="target pass, ms")
    at = {(cell["rows"], cell["batch"], cell["context"]): cell["ms"] for cell in cells}
    for batch in grid.batches:
        for context in grid.contexts:
            base = at[grid.rows[0], batch, context]
            times = [at[rows, batch, context] for rows in grid.rows]
            table.add_row(str(batch), str(context), *(f"{ms:.2f} ({ms / base:.2f}x)" for ms in times))
    console.print(table)
