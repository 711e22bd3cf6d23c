"""The ``vllm-gumiho`` command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vllm_gumiho.benchmark.command import bench
from vllm_gumiho.demo.command import demo
from vllm_gumiho.env import PLUGINS
from vllm_gumiho.errors import GumihoError
from vllm_gumiho.evaluation.command import evaluate, plot_acceptance
from vllm_gumiho.gpu_check.command import gpu_check
from vllm_gumiho.gpu_check.tree_gate import tree_gate
from vllm_gumiho.options import STORED, TARGET, JsonFlag, renamed
from vllm_gumiho.training.command import features, generate, plot_training, train
from vllm_gumiho.tuning.command import plan, tune

app = typer.Typer(
    help="Gumiho speculative decoding for vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

SERVE, TRAIN, MEASURE = "Serve", "Train", "Measure"
CheckpointArgument = Annotated[str, typer.Argument(help=STORED)]


def main() -> None:
    """Run the command; an error of ours ends it with one line and exit code 2."""
    try:
        app()
    except GumihoError as error:
        Console(stderr=True).print(f"vllm-gumiho: {error}", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(2) from None


@app.command(rich_help_panel=SERVE)
def check(
    target: Annotated[str | None, typer.Argument(help=f"Say whether this one can be used instead.  {TARGET}")] = None,
    wheel: Annotated[Path | None, typer.Option(help="Check a vLLM wheel instead of the installed one.")] = None,
) -> None:
    """Show every vLLM internal that Gumiho touches, and whether it is as expected; or what is known of a target.

    Of a target: whether it can be served and trained for, and which checkpoint fits; nothing is downloaded or loaded.

    Exit code 1 if one that serving needs is not, or the target cannot be served.
    """
    if target is not None:
        _check_target(target)
        return
    from vllm_gumiho.engines.facts import vllm_version
    from vllm_gumiho.plugin.hooks import MEASURING, mismatch_message
    from vllm_gumiho.plugin.hooks import check as findings_of
    from vllm_gumiho.plugin.vllm_source import Source

    source = Source.wheel(wheel) if wheel else Source.installed()
    name = wheel.name if wheel else vllm_version()
    serving = findings_of(source)
    for title, findings in (("serving", serving), ("tools", findings_of(source, MEASURING))):
        table = Table("vLLM name", "use", "for", "state", title=f"vLLM {name}: {title}")
        for finding in findings:
            hook = finding.hook
            state = f"[red]{finding.problem}" if finding.problem else "[green]ok"
            table.add_row(f"{hook.module}.{hook.name}", hook.use, hook.why, state)
        console.print(table)
    named = PLUGINS.get()
    left_out = named is not None and "gumiho" not in named.split(",")
    message = mismatch_message(serving, vllm_version()) or (
        f"{PLUGINS.name}={named} leaves this plugin out: vLLM then knows no method gumiho; add gumiho to it"
        if left_out
        else None
    )
    if message is not None:
        console.print(message, style="red", markup=False)
        raise typer.Exit(1)


def _check_target(target: str) -> None:
    from vllm_gumiho.engines.target import SMOLLM2
    from vllm_gumiho.request.target_check import check_target

    found = check_target("models/SmolLM2-135M-Instruct" if target == SMOLLM2 else target)
    table = Table("", "", show_header=False, title=f"{found.target}: {found.kind}, {found.architecture}")
    table.add_row("served", found.unserved or "yes")
    table.add_row("trained for", found.untrained or "yes")
    table.add_row("checkpoint", found.checkpoint or "none is known; train one with 'vllm-gumiho train'")
    for note in found.notes:
        table.add_row("note", note)
    console.print(table)
    if found.unserved:
        raise typer.Exit(1)


@app.command(rich_help_panel=SERVE)
def inspect(checkpoint: CheckpointArgument, as_json: JsonFlag = False) -> None:
    """Print what a checkpoint is: drafter, layout, sizes, K, target, parameters and bytes."""
    from vllm_gumiho.drafters.checkpoints import open_checkpoint
    from vllm_gumiho.request.catalogue import local_path

    opened = open_checkpoint(local_path(checkpoint))
    count = {name: math.prod(info.shape) for name, info in opened.infos.items()}
    facts: dict[str, Any] = {
        "path": str(opened.path),
        "drafter": opened.drafter.name,
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


@app.command(rich_help_panel=SERVE)
def convert(
    source: CheckpointArgument,
    destination: Annotated[Path, typer.Argument(help="Folder to write.")],
    target: Annotated[str | None, typer.Option(help=TARGET)] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Store matrices but fc in 8 bits, one scale a row.")] = False,
    draft_vocab: Annotated[int, typer.Option(help="Draft only the N most frequent tokens of --answers; 0 is all.")] = 0,
    answers: Annotated[
        list[Path] | None, typer.Option(help="Answers of 'vllm-gumiho generate', for --draft-vocab.")
    ] = None,
) -> None:
    """Write a checkpoint in the speculators format: safetensors and a full config.json, tensors bit for bit."""
    from vllm_gumiho.drafters.conversion import convert_checkpoint
    from vllm_gumiho.request.catalogue import local_path
    from vllm_gumiho.training.data import answer_counter

    counter = answer_counter(answers) if answers else None
    written = convert_checkpoint(local_path(source), destination, target, int8, draft_vocab, counter)
    console.print(f"{written.path}: {len(written.infos)} tensors, K={written.sizes.max_draft_tokens}", highlight=False)


app.command(rich_help_panel=SERVE)(demo)
app.command(rich_help_panel=TRAIN)(generate)
app.command(rich_help_panel=TRAIN)(features)
app.command(rich_help_panel=TRAIN, cls=renamed(float32="no-bf16"))(train)
app.command("plot-training", rich_help_panel=TRAIN)(plot_training)
app.command(
    "eval",
    rich_help_panel=MEASURE,
    cls=renamed(json="output", max_num_seqs="concurrency", eager="enforce-eager", no_eager="no-enforce-eager"),
)(evaluate)
app.command("plot-acceptance", rich_help_panel=MEASURE)(plot_acceptance)
app.command("bench", rich_help_panel=MEASURE, cls=renamed(max_concurrency="concurrency"))(bench)
app.command("gpu-check", rich_help_panel=MEASURE)(gpu_check)
app.command("tree-gate", rich_help_panel=MEASURE)(tree_gate)
app.command("plan", rich_help_panel=MEASURE, cls=renamed(batch="concurrency"))(plan)
app.command("tune", rich_help_panel=MEASURE, cls=renamed(max_batch="concurrency"))(tune)


if __name__ == "__main__":
    main()
