"""Engine speed on shapes whose weights cannot be had: ``python -m vllm_gumiho.benchmark.shapes``.

Target and drafters have random weights, so that engine, drafting and verification cost what they cost; how many
drafts are accepted is assumed, by vLLM's ``rejection_sample_method: "synthetic"`` at published rates.  Only a
config.json, a word-level tokenizer and a file of tensor names and shapes are written.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vllm_gumiho.benchmark.grid import Grid, Variant
from vllm_gumiho.drafters.gumiho.layout import GumihoSizes, tensor_shapes
from vllm_gumiho.errors import BenchError
from vllm_gumiho.files import write_json

# Accepted up to position 1, 2, ...: Gumiho on Llama-3-8B, chains of 6, MT-Bench (vLLM pull request 43544).  The seventh
# goes on at the ratio of the two before.
GUMIHO_RATES = (0.60, 0.32, 0.17, 0.09, 0.05, 0.03, 0.018)
# EAGLE-1 on Llama-3.1-8B is published as lengths 2.29 at K=3 and 2.45 at K=6: the geometric series with these sums.
EAGLE_RATES = tuple(round(0.738 * 0.4987**i, 4) for i in range(7))
ASSUMED = (
    "Acceptance is ASSUMED, not measured: synthetic, Gumiho .60 .32 .17 .09 .05 .03 (.018), EAGLE-1 length 2.29 at K=3 "
    "and 2.45 at K=6, both published for 8B targets. Weights are random; speeds are those of engine, drafting and "
    "verification."
)


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama target; a drafter's layers are of the target's size."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int

    def config(self, **changes: Any) -> dict[str, Any]:
        """config.json of a Llama of this shape."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **vars(self),
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            "hidden_act": "silu",
            "max_position_embeddings": 4096,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            **changes,
        }


SHAPES = {
    "llama-3-8b": Shape(4096, 14336, 32, 32, 8, 128, 128256),
    # One of eight tensor-parallel shards of Llama-3-70B on its own: no collectives.  fc and heads are whole.
    "llama-3-70b-shard": Shape(8192, 3584, 80, 8, 1, 128, 16032),
    "tiny": Shape(64, 96, 2, 4, 2, 32, 160),
}


def drafter_sizes(shape: Shape) -> GumihoSizes:
    """Sizes of a drafter as released ones have them: two layers of the target's size, two serial steps, five heads."""
    return GumihoSizes(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        query_size=shape.num_attention_heads * shape.head_dim,
        key_size=shape.num_key_value_heads * shape.head_dim,
        num_layers=2,
        num_serial_steps=2,
        num_heads=5,
        fc_bias=True,
        vocab_size=None,
    )


def write_sparse(file: Path, tensors: Mapping[str, tuple[int | None, ...]]) -> None:
    """A safetensors file of bfloat16 zeros that takes no room on disk: a header, and a hole behind it."""
    header: dict[str, Any] = {}
    end = 0
    for name, size in tensors.items():
        count = 2 * math.prod(one or 0 for one in size)
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [end, end + count]}
        end += count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(8 + len(text) + end)


def write_models(shape: Shape, folder: Path) -> dict[str, Path]:
    """Folders of a target, a Gumiho and an EAGLE-1 drafter of it, for load format ``dummy``."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folders = {name: folder / name for name in ("target", "gumiho", "eagle")}
    for one in folders.values():
        one.mkdir(parents=True, exist_ok=True)
    write_json(folders["target"] / "config.json", shape.config())
    write_json(folders["eagle"] / "config.json", shape.config(num_hidden_layers=1))
    write_sparse(folders["gumiho"] / "model.safetensors", tensor_shapes(drafter_sizes(shape)))
    words = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, shape.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folders["target"])
    return folders


def variants(folders: dict[str, Path], lengths: list[int]) -> tuple[Variant, ...]:
    """Without speculation, then EAGLE-1 and Gumiho at every K, at their published acceptance."""
    found = [Variant("none")]
    for method, rates in (("eagle", EAGLE_RATES), ("gumiho", GUMIHO_RATES)):
        for length in lengths:
            speculative = {
                "method": method,
                "model": str(folders[method]),
                "num_speculative_tokens": length,
                "rejection_sample_method": "synthetic",
                "synthetic_acceptance_rates": list(rates[:length]),
            }
            found.append(Variant(method, length, speculative))
    return tuple(found)


def main(
    shape: Annotated[list[str] | None, typer.Option(help=f"{' or '.join(list(SHAPES)[:2])}; repeat.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for a report a shape.")] = Path("out/gpu-bench"),
    num_speculative_tokens: Annotated[list[int] | None, typer.Option(help="K; default 1 to 7.")] = None,
    concurrency: Annotated[
        list[int] | None, typer.Option("--concurrency", "--max-concurrency", help="Default 1, 2, 4, ... 64.")
    ] = None,
    output_len: Annotated[int, typer.Option(help="Tokens an answer.")] = 128,
    input_len: Annotated[int, typer.Option(help="Tokens a prompt.")] = 128,
    repeats: Annotated[int, typer.Option(help="Cycles through all engines.")] = 3,
    engine_args: Annotated[str, typer.Option(help="More arguments of 'vllm serve', in one text.")] = "",
    max_minutes: Annotated[float | None, typer.Option(help="Start no engine that would end later.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="A tiny shape on the CPU, kernels in Triton's interpreter.")
    ] = False,
) -> None:
    """No speculation, EAGLE-1 and Gumiho at assumed acceptance on shapes with random weights, offline."""
    import shlex

    from vllm_gumiho.benchmark.plots import plot_all
    from vllm_gumiho.benchmark.report import show
    from vllm_gumiho.benchmark.run import run
    from vllm_gumiho.engines.facts import on_cpu

    names = ["tiny"] if dry_run else shape or list(SHAPES)[:2]
    for name in names:
        if name not in SHAPES:
            raise BenchError(f"--shape {name!r}: no such shape; give one of {', '.join(SHAPES)}")
    if on_cpu() and not dry_run:
        raise BenchError("shapes of 8B and more need a GPU and PyTorch sees none; --dry-run goes through it on a CPU")
    at_once = concurrency or ([1, 2] if dry_run else [2**i for i in range(7)])
    lengths = num_speculative_tokens or ([1, 3, 7] if dry_run else list(range(1, 8)))
    console, failed = Console(), False
    for name in names:
        folders = write_models(SHAPES[name], output.resolve() / name / "models")
        base = [
            "--load-format",
            "dummy",
            "--max-model-len",
            str(input_len + output_len + 16),
            "--max-num-seqs",
            str(max(at_once)),
            "--no-enable-prefix-caching",
            "--seed",
            "0",
        ]
        base += ["--dtype", "float32", "--enforce-eager"] if dry_run else ["--dtype", "bfloat16"]
        asked = [
            "--dataset-name",
            "random",
            "--input-len",
            str(input_len),
            "--output-len",
            str(output_len),
            "--ignore-eos",
            "--temperature",
            "0",
            "--seed",
            "0",
        ]
        grid = Grid(
            str(folders["target"]),
            variants(folders, lengths),
            (*base, *shlex.split(engine_args)),
            tuple(asked),
            ("offline",),
            tuple(at_once),
            2,
            repeats,
            interpreter=dry_run,
            assumed=f"{'DRY RUN, no result. ' if dry_run else ''}Shape {name}. {ASSUMED}",
        )
        report = run(grid, output / name, console, max_minutes=max_minutes)
        show(console, report)
        for file in (*plot_all(report, output / name), output / name / "report.json"):
            console.print(str(file), highlight=False, markup=False, soft_wrap=True)
        failed = failed or any(cell["status"] == "failed" for cell in report["cells"])
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    try:
        typer.run(main)
    except BenchError as error:
        Console(stderr=True).print(f"shapes: {error}", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(2) from None
