"""``vllm-gumiho eval`` and ``vllm-gumiho plot-acceptance``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def evaluate(
    prompts: Annotated[Path, typer.Option(help='Folder of *.jsonl, a set each: lines of {"id", "turns": [...]}.')],
    json: Annotated[Path, typer.Option(help="Report to write.")],
    target: Annotated[str, typer.Option(help="'smollm2' (embedded), folder or hub name.")] = "smollm2",
    checkpoint: Annotated[
        str | None, typer.Option(help="Drafter; 'gumiho' (default of that method) is the target's known one.")
    ] = None,
    method: Annotated[str, typer.Option(help="'gumiho', 'eagle', 'ngram' or 'none'.")] = "gumiho",
    num_speculative_tokens: Annotated[
        list[int] | None, typer.Option(help="K; repeat for a grid.  Default: all the checkpoint has, else 7.")
    ] = None,
    temperature: Annotated[list[float] | None, typer.Option(help="0 (default) or 1; repeat for a grid.")] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="Report with a greedy run without speculation, instead of running one.")
    ] = None,
    allow_differences: Annotated[
        bool, typer.Option("--allow-differences", help="Exit code 0 even if a greedy output differs.")
    ] = False,
    limit: Annotated[int, typer.Option(help="First N prompts of each set; 0 for all.")] = 0,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 64,
    turns: Annotated[
        str, typer.Option(help="'first', or 'all' turns with the engine's own answers between.")
    ] = "first",
    max_num_seqs: Annotated[int, typer.Option(help="Requests decoded together.")] = 8,
    max_model_len: Annotated[int | None, typer.Option(help="Context in tokens; default: enough.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Default: float32 on a CPU, else the target's own.")] = None,
    eager: Annotated[
        bool | None, typer.Option("--eager/--no-eager", help="No torch.compile, no CUDA graphs; default: on a CPU.")
    ] = None,
    seed: int = 0,
) -> None:
    """Judge a drafter: acceptance, speed, and whether greedy output equals speculation off.

    Exit code 1 if a greedy output differs.
    """
    from vllm_gumiho.evaluation import EvalError
    from vllm_gumiho.evaluation.judge import judge
    from vllm_gumiho.evaluation.plan import Settings

    if turns not in ("first", "all"):
        raise EvalError(f"--turns {turns!r}: give 'first' or 'all'")
    console = Console()
    report = judge(
        Settings(
            target=target, prompts=prompts, json=json, method=method, checkpoint=checkpoint,
            num_speculative_tokens=tuple(num_speculative_tokens or ()), temperatures=tuple(temperature or (0.0,)),
            baseline=baseline, limit=limit, max_tokens=max_tokens, max_num_seqs=max_num_seqs,
            max_model_len=max_model_len, dtype=dtype, eager=eager, seed=seed, all_turns=turns == "all",
        ),
        console,
    )  # fmt: skip
    console.print(f"report: {json}", highlight=False, soft_wrap=True)
    if report["different"]:
        console.print(f"{report['different']} greedy outputs differ from speculation off", style="red", highlight=False)
        if not allow_differences:
            raise typer.Exit(1)


def plot_acceptance(
    reports: Annotated[list[Path], typer.Argument(help="Reports of 'vllm-gumiho eval'.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG to write.")],
    labels: Annotated[list[str] | None, typer.Option(help="A label for each report, in order; repeat.")] = None,
    num_speculative_tokens: Annotated[list[int] | None, typer.Option(help="Only runs with this K; repeat.")] = None,
    temperature: Annotated[list[float] | None, typer.Option(help="Only runs at this temperature; repeat.")] = None,
) -> None:
    """Plot acceptance per position of several runs side by side, cumulative and conditional."""
    from vllm_gumiho.evaluation import plot

    runs = plot.read_runs(reports, labels or [], num_speculative_tokens or [], temperature or [])
    plot.plot_acceptance(runs, output)
    Console().print(f"{output}: {len(runs)} runs", highlight=False, soft_wrap=True)
