"""``vllm-gumiho eval`` and ``vllm-gumiho plot-acceptance``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_gumiho.evaluation.settings import Settings
from vllm_gumiho.options import LabelsOption, OutputOption, takes


@takes(Settings)
def evaluate(
    settings: Settings,
    allow_differences: Annotated[
        bool, typer.Option("--allow-differences", help="Exit code 0 even if a greedy output differs.")
    ] = False,
) -> None:
    """Judge a drafter: acceptance, speed, and whether greedy output equals speculation off.

    Exit code 1 if a greedy output differs.
    """
    from vllm_gumiho.evaluation.judge import judge

    console = Console()
    report = judge(settings, console)
    console.print(f"report: {settings.output}", highlight=False, soft_wrap=True)
    if report["different"]:
        console.print(f"{report['different']} greedy outputs differ from speculation off", style="red", highlight=False)
        if not allow_differences:
            raise typer.Exit(1)


def plot_acceptance(
    reports: Annotated[list[Path], typer.Argument(help="Reports of 'vllm-gumiho eval'.")],
    output: OutputOption,
    labels: LabelsOption = None,
    num_speculative_tokens: Annotated[list[int] | None, typer.Option(help="Only runs with this K; repeat.")] = None,
    temperature: Annotated[list[float] | None, typer.Option(help="Only runs at this temperature; repeat.")] = None,
    ranks: Annotated[
        bool,
        typer.Option("--ranks", help="Instead: the choice that the target's token was, of runs made with --rank-hits."),
    ] = False,
) -> None:
    """Plot acceptance per position of several runs side by side, cumulative and conditional."""
    from vllm_gumiho.evaluation import plot

    runs = plot.read_runs(reports, labels or [], num_speculative_tokens or [], temperature or [])
    (plot.plot_ranks if ranks else plot.plot_acceptance)(runs, output)
    Console().print(f"{output}: {len(runs)} runs", highlight=False, soft_wrap=True)
