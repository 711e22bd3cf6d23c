"""The commands ``vllm-gumiho generate`` and ``vllm-gumiho train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

TargetOption = Annotated[str, typer.Option(help="Target: 'smollm2' (the embedded one), folder or hub name.")]
EvaluationOption = Annotated[
    list[Path] | None,
    typer.Option(help="Prompts that must not be in the data: file or folder; repeat for more. Found ones are named."),
]


def generate(
    target: TargetOption,
    prompts: Annotated[list[Path], typer.Option(help="JSON lines of {id, turns}; repeat for more files.")],
    output: Annotated[Path, typer.Option(help="JSON-lines file to write; existing answers are kept.")],
    max_tokens: Annotated[int, typer.Option(help="Longest answer, tokens.")] = 256,
    max_prompt_tokens: Annotated[int, typer.Option(help="Longest first prompt, tokens; longer are left out.")] = 512,
    max_turns: Annotated[int, typer.Option(help="User turns asked of each conversation.")] = 1,
    sampled: Annotated[float, typer.Option(help="Share of answers sampled at T=0.8, the rest greedy.")] = 0.3,
    shard: Annotated[str, typer.Option(help="I/N: answer the I-th (from 0) of N disjoint shares.")] = "0/1",
    evaluation_prompts: EvaluationOption = None,
    seed: int = 0,
    limit: Annotated[int, typer.Option(help="Answer at most that many; 0 is all.")] = 0,
) -> None:
    """Let the target answer training prompts (greedy and sampled), the data that heads are trained on."""
    from vllm_gumiho.embedded import target_path
    from vllm_gumiho.training.generate import Questions, generate_answers

    index, _, count = shard.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise typer.BadParameter(f"{shard!r} is not I/N with I from 0 to N-1", param_hint="--shard")
    counts = generate_answers(
        target_path(target), prompts, output,
        Questions(max_tokens, max_prompt_tokens, max_turns, sampled, seed),
        evaluation_prompts, (int(index), int(count)), limit, seed=seed,
    )  # fmt: skip
    typer.echo(f"{output}: " + ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in counts.items()))


def train(
    target: TargetOption,
    data: Annotated[list[str], typer.Option(help="Files or folders written by 'vllm-gumiho generate'.")],
    output: Annotated[str, typer.Option(help="Folder for checkpoints and the finished drafter.")],
    recipe: Annotated[
        str, typer.Option(help="'unrolled' (on its own features), 'paper' (teacher-forced) or 'eagle' (EAGLE-1).")
    ] = "unrolled",
    steps: int = 1000,
    rows: Annotated[int, typer.Option(help="Packed rows a step and device.")] = 2,
    row_length: Annotated[int, typer.Option(help="Tokens a packed row.")] = 1024,
    learning_rate: float = 5e-4,
    optimizer: Annotated[
        str, typer.Option(help="'adamw' (the paper's), 'muon', or 'muon-serial' (AdamW for the heads).")
    ] = "adamw",
    phase: Annotated[
        str, typer.Option(help="'all', 'serial' (Transformer alone) or 'heads' (on a frozen one).")
    ] = "all",
    num_serial_steps: int = 2,
    num_heads: int = 5,
    init: Annotated[str, typer.Option(help="'random' or 'target' (the target's own last layers).")] = "random",
    init_from: Annotated[str | None, typer.Option(help="Checkpoint to start from.")] = None,
    draft_vocab: Annotated[int, typer.Option(help="Draft only the N most frequent answer tokens; 0 is all.")] = 0,
    own_tokens: Annotated[
        float, typer.Option(help="Share of anchors that draft on from the drafter's own token when training ends.")
    ] = 0.0,
    early_weighting: Annotated[bool, typer.Option(help="Early positions weigh more (unrolled).")] = True,
    heads_steer: Annotated[bool, typer.Option(help="Heads' losses train the Transformer too (unrolled).")] = False,
    further_steps: Annotated[int, typer.Option(help="Serial steps trained beyond those served (unrolled).")] = 0,
    candidates: Annotated[int, typer.Option(help="Tokens drawn for the cross-entropy; 0 takes all.")] = 4096,
    frequent: Annotated[int, typer.Option(help="Frequent tokens always in the cross-entropy.")] = 2048,
    feature_weight: Annotated[float | None, typer.Option(help="Weight of the feature loss; the recipe's own.")] = None,
    feature_cache: Annotated[str | None, typer.Option(help="Folder that keeps target features (bfloat16).")] = None,
    evaluation_prompts: EvaluationOption = None,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints and held-out measurements.")] = 200,
    patience: Annotated[
        int, typer.Option(help="End when held-out acceptance has not risen for N measurements; 0 never.")
    ] = 0,
    float32: Annotated[bool, typer.Option("--float32", help="No bfloat16 autocast.")] = False,
    seed: int = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --output.")] = False,
) -> None:
    """Train a drafter on a frozen target; held-out accuracy and acceptance per draft position at every save."""
    from rich.console import Console

    from vllm_gumiho.embedded import target_path
    from vllm_gumiho.training.recipe import Recipe
    from vllm_gumiho.training.trainer import train as run

    settings = Recipe(
        target=target_path(target), data=data, output=output, recipe=recipe, steps=steps, rows=rows,
        row_length=row_length, learning_rate=learning_rate, optimizer=optimizer, phase=phase,
        num_serial_steps=num_serial_steps, num_heads=num_heads, init=init, init_from=init_from,
        draft_vocab=draft_vocab, own_tokens=own_tokens, early_weighting=early_weighting, heads_steer=heads_steer,
        further_steps=further_steps,
        candidates=candidates, frequent=frequent, feature_weight=feature_weight, feature_cache=feature_cache,
        evaluation_prompts=[str(path) for path in evaluation_prompts or []], save_every=save_every,
        patience=patience, bf16=not float32, seed=seed,
    )  # fmt: skip
    Console().print_json(data=run(settings, resume))


def plot_training(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs (--output of 'train').")],
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG to write.")],
    labels: Annotated[list[str] | None, typer.Option(help="A label for each run, in order; repeat.")] = None,
) -> None:
    """Plot held-out acceptance length and training loss of several runs over their steps."""
    from rich.console import Console

    from vllm_gumiho.training.curves import plot_curves, read_curves

    plot_curves(read_curves(runs, labels or []), output)
    Console().print(f"{output}: {len(runs)} runs", highlight=False, soft_wrap=True)
