"""The command ``vllm-gumiho bench``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_gumiho.benchmark.settings import QUICK, QUICK_MINUTES, Settings
from vllm_gumiho.options import takes


@takes(Settings)
def bench(
    settings: Settings,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for report.json, plots and finished cells.")
    ] = Path("out/bench"),
    quick: Annotated[
        bool,
        typer.Option("--quick", help="A small grid, under 10 minutes on two CPU cores; options given hold."),
    ] = False,
    max_minutes: Annotated[
        float | None, typer.Option(help="Start no engine that would end later; what is left out is said.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on with the finished cells of --output.")
    ] = True,
    *,
    given: set[str],
) -> None:
    """What does Gumiho give on this machine, with this model, at this load?

    Runs no speculation, n-grams, EAGLE (with a checkpoint) and Gumiho in turn, offline and against a real server that
    'vllm bench serve' drives.  Exit code 1 if a cell failed.
    """
    from vllm_gumiho.benchmark.grid import make_grid
    from vllm_gumiho.benchmark.plots import plot_all
    from vllm_gumiho.benchmark.report import show
    from vllm_gumiho.benchmark.run import run

    if quick:
        settings = dataclasses.replace(settings, **{name: QUICK[name] for name in QUICK if name not in given})
        max_minutes = max_minutes if max_minutes is not None else QUICK_MINUTES
    grid = make_grid(settings, output)
    if quick and "num_speculative_tokens" not in given:
        # One engine less: n-grams found are rarely longer.
        kept = tuple(one for one in grid.variants if (one.method, one.length) != ("ngram", 7))
        grid = dataclasses.replace(grid, variants=kept)
    console = Console()
    report = run(grid, output, console, resume, max_minutes)
    show(console, report)
    for file in (*plot_all(report, output), output / "report.json"):
        console.print(str(file), highlight=False, markup=False, soft_wrap=True)
    if any(cell["status"] == "failed" for cell in report["cells"]):
        raise typer.Exit(1)
