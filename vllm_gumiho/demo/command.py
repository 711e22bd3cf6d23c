"""The command ``vllm-gumiho demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_gumiho.options import CONCURRENCY, TARGET, TOKENS, CheckpointOption
from vllm_gumiho.request.lengths import AUTO, length_option

LENGTH = (
    f"{TOKENS[:-1]}, or {AUTO}. By default all, on a CPU ended by request; of a bundled head there 4 to 0 by requests "
    "at once."
)


def demo(
    target: Annotated[str, typer.Option(help=TARGET)] = "smollm2",
    checkpoint: CheckpointOption = "gumiho",
    num_speculative_tokens: Annotated[str | None, typer.Option(help=LENGTH, parser=length_option)] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, tokens.")] = 96,
    concurrency: Annotated[int, typer.Option(help=f"{CONCURRENCY[:-1]} in the second round; the first has one.")] = 4,
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON report to write.")] = Path("out/demo.json"),
) -> None:
    """Chat with and without Gumiho, compare texts and speed.  Exit code 1 if a text differs."""
    from vllm_gumiho.demo.chat import run_demo

    loads = (1,) if concurrency == 1 else (1, concurrency)
    if not run_demo(target, checkpoint, num_speculative_tokens, max_tokens, loads, output, Console()):
        raise typer.Exit(1)
