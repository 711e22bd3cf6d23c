"""The commands ``vllm-gumiho generate``, ``train`` and ``plot-training``."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated

import typer

from vllm_gumiho.options import EvaluationPrompts, LabelsOption, OutputOption, TargetOption, takes
from vllm_gumiho.training.recipe import Recipe


def generate(
    target: TargetOption,
    prompts: Annotated[
        list[Path], typer.Option(help="JSON lines of {id, turns} (and answers); repeat for more files.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="JSON-lines file to write; existing answers are kept.")
    ],
    max_tokens: Annotated[int, typer.Option(help="Longest answer, tokens.", min=1)] = 256,
    max_prompt_tokens: Annotated[
        int, typer.Option(help="Longest first prompt, tokens; longer are left out.", min=1)
    ] = 512,
    max_turns: Annotated[int, typer.Option(help="User turns asked of each conversation.", min=1)] = 1,
    sampled: Annotated[float, typer.Option(help="Share of answers sampled at T=0.8, the rest greedy.")] = 0.3,
    shard: Annotated[str, typer.Option(help="I/N: answer the I-th (from 0) of N disjoint shares.")] = "0/1",
    evaluation_prompts: EvaluationPrompts = None,
    written: Annotated[
        bool, typer.Option("--written", help="Take the answers that the lines hold ({id, turns, answers}); ask nobody.")
    ] = False,
    concurrency: Annotated[int, typer.Option(help="Most requests at once; a GPU takes some hundred.", min=1)] = 96,
    seed: Annotated[int, typer.Option(help="Of who is sampled, and of the samples.")] = 0,
    limit: Annotated[int, typer.Option(help="Answer at most that many; 0 is all.", min=0)] = 0,
    enforce_eager: Annotated[
        bool, typer.Option("--enforce-eager", help="No torch.compile, no CUDA graphs: sooner for few prompts.")
    ] = False,
    kv_cache_gib: Annotated[
        float, typer.Option(help="KV cache on a GPU, for shards that share one; 0: what vLLM finds free.", min=0)
    ] = 0.0,
) -> None:
    """Let the target answer training prompts (greedy and sampled), the data that heads are trained on."""
    from vllm_gumiho.engines.target import find_target
    from vllm_gumiho.engines.worker import kv_cache_of
    from vllm_gumiho.training.generate import Questions, generate_answers
    from vllm_gumiho.training.written import take_answers

    index, _, count = shard.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise typer.BadParameter(f"{shard!r} is not I/N with I from 0 to N-1", param_hint="--shard")
    questions = Questions(max_tokens, max_prompt_tokens, max_turns, sampled, seed)
    asked = (find_target(target), prompts, output, questions, evaluation_prompts, (int(index), int(count)), limit)
    if written:
        counts = take_answers(*asked)
    else:
        kv_cache = kv_cache_of(kv_cache_gib) if kv_cache_gib else {}
        counts = generate_answers(*asked, seed=seed, max_num_seqs=concurrency, enforce_eager=enforce_eager, **kv_cache)
    typer.echo(f"{output}: " + ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in counts.items()))


def features(
    target: TargetOption,
    data: Annotated[list[Path], typer.Option(help="Files or folders written by 'vllm-gumiho generate'; repeat.")],
    feature_cache: Annotated[Path, typer.Option(help="Folder that keeps target features (bfloat16).")],
    row_length: Annotated[int, typer.Option(help="Tokens of a conversation that are kept: those of a row.")] = 1024,
    target_layers: Annotated[
        list[int] | None,
        typer.Option(help="Layers whose states are kept too; repeat.  Default: none."),
    ] = None,
    bf16: Annotated[bool, typer.Option(help="bfloat16 autocast.")] = True,
) -> None:
    """Fill a store of target features ahead of training; what it has is left, and a stopped run goes on."""
    from rich.progress import Progress

    from vllm_gumiho.engines.target import find_target
    from vllm_gumiho.training.data import read_samples
    from vllm_gumiho.training.target import open_target
    from vllm_gumiho.training.target_model import refuse_placeholders

    opened = open_target(find_target(target), feature_cache, layers=lambda _: tuple(sorted(target_layers or ())))
    samples = read_samples(data, opened.embed.shape[0])
    refuse_placeholders(samples, opened.model.config, opened.name)
    # Kinds mixed, so that a store that is not full yet serves a run as well.
    random.Random(0).shuffle(samples)
    sequences = [sample.tokens()[0][:row_length] for sample in samples]
    with Progress() as progress:
        task = progress.add_task("tokens", total=sum(map(len, sequences)))
        computed = opened.fill(sequences, bf16, lambda tokens: progress.advance(task, tokens))
    typer.echo(f"{feature_cache}: {computed:,} tokens computed, {len(sequences):,} conversations there")


@takes(Recipe)
def train(
    recipe: Recipe,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --output.")] = False,
) -> None:
    """Train a drafter on a frozen target; held-out accuracy and acceptance per draft position at every save."""
    import dataclasses

    from rich.console import Console

    from vllm_gumiho.engines.target import find_target
    from vllm_gumiho.training.trainer import train as run

    Console().print_json(data=run(dataclasses.replace(recipe, target=find_target(recipe.target)), resume))


def plot_training(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs (--output of 'train').")],
    output: OutputOption,
    labels: LabelsOption = None,
) -> None:
    """Plot held-out acceptance length and training loss of several runs over their steps."""
    from rich.console import Console

    from vllm_gumiho.training.curves import plot_curves, read_curves

    plot_curves(read_curves(runs, labels or []), output)
    Console().print(f"{output}: {len(runs)} runs", highlight=False, soft_wrap=True)
