"""The command ``vllm-gumiho bench``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

# Small enough for two slow cores; what does not fit into the time is left out and said to be.
QUICK: dict[str, Any] = {
    "max_concurrency": (1, 4), "num_prompts": 4, "output_len": 16, "repeats": 2, "max_model_len": 512,
}  # fmt: skip
QUICK_MINUTES = 8.5


def bench(
    context: typer.Context,
    target: Annotated[str, typer.Option(help="'smollm2' (embedded), folder or hub name.")] = "smollm2",
    output: Annotated[Path, typer.Option(help="Folder for report.json, plots and finished cells.")] = Path("out/bench"),
    quick: Annotated[
        bool,
        typer.Option("--quick", help="A small grid, under 10 minutes on two CPU cores; options given hold."),
    ] = False,
    method: Annotated[
        list[str] | None,
        typer.Option(help="'ngram', 'eagle' or 'gumiho', beside 'none', which always runs; repeat.  Default: all."),
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Gumiho checkpoint; by default the target's known one.")
    ] = None,
    eagle_checkpoint: Annotated[str | None, typer.Option(help="EAGLE checkpoint; without one no EAGLE.")] = None,
    num_speculative_tokens: Annotated[list[int] | None, typer.Option(help="K; repeat.  Default: 3 and 7.")] = None,
    mode: Annotated[list[str] | None, typer.Option(help="'offline' or 'server'; repeat.  Default: both.")] = None,
    max_concurrency: Annotated[
        list[int] | None, typer.Option(help="Requests at a time; repeat.  Default: 1, 4 and 16.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='JSON lines of {"id", "turns"}; first turns are asked.  Default: built-in ones.')
    ] = None,
    dataset_name: Annotated[str | None, typer.Option(help="Dataset of 'vllm bench serve' instead.")] = None,
    dataset_path: Annotated[str | None, typer.Option(help="Its file or hub name.")] = None,
    num_prompts: Annotated[int, typer.Option(help="Requests a cell, at least two for each at a time.")] = 16,
    output_len: Annotated[int, typer.Option(help="Longest answer, tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Answers of exactly --output-len tokens.")] = False,
    repeats: Annotated[int, typer.Option(help="Cycles through all engines.")] = 3,
    dtype: Annotated[str | None, typer.Option(help="Default: float32 on a CPU, else the target's own.")] = None,
    enforce_eager: Annotated[
        bool | None, typer.Option("--enforce-eager/--no-enforce-eager", help="Default: on a CPU.")
    ] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Context, tokens.  Default: the target's.")] = None,
    engine_args: Annotated[str, typer.Option(help="More arguments of 'vllm serve', in one text.")] = "",
    bench_args: Annotated[str, typer.Option(help="More arguments of 'vllm bench serve', in one text.")] = "",
    max_minutes: Annotated[
        float | None, typer.Option(help="Start no engine that would end later; what is left out is said.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on with the finished cells of --output.")
    ] = True,
    seed: int = 0,
) -> None:
    """What does Gumiho give on this machine, with this model, at this load?

    Runs no speculation, n-grams, EAGLE (with a checkpoint) and Gumiho in turn, offline and against a real server that
    'vllm bench serve' drives.  Exit code 1 if a cell failed.
    """
    from vllm_gumiho.benchmark.grid import Settings, make_grid
    from vllm_gumiho.benchmark.plots import plot_all
    from vllm_gumiho.benchmark.report import show
    from vllm_gumiho.benchmark.run import run

    settings = Settings(
        target=target, methods=tuple(method or ()), checkpoint=checkpoint, eagle_checkpoint=eagle_checkpoint,
        num_speculative_tokens=tuple(num_speculative_tokens or (3, 7)), modes=tuple(mode or ("offline", "server")),
        max_concurrency=tuple(max_concurrency or (1, 4, 16)), prompts=prompts, dataset_name=dataset_name,
        dataset_path=dataset_path, num_prompts=num_prompts, output_len=output_len, temperature=temperature,
        ignore_eos=ignore_eos, repeats=repeats, dtype=dtype, enforce_eager=enforce_eager,
        max_model_len=max_model_len, engine_args=engine_args, bench_args=bench_args, seed=seed,
    )  # fmt: skip

    def given(name: str) -> bool:
        source = context.get_parameter_source(name)
        return source is not None and source.name != "DEFAULT"

    if quick:
        settings = dataclasses.replace(settings, **{name: QUICK[name] for name in QUICK if not given(name)})
        max_minutes = max_minutes if max_minutes is not None else QUICK_MINUTES
    grid = make_grid(settings, output)
    if quick and not given("num_speculative_tokens"):
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
