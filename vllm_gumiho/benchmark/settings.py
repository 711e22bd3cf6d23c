"""What a benchmark is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_gumiho.drafters import DEFAULT, DRAFTERS
from vllm_gumiho.errors import BenchError
from vllm_gumiho.options import CONCURRENCY, PER_REQUEST, TARGET, TOKENS, option
from vllm_gumiho.request.lengths import AUTO, length_option
from vllm_gumiho.request.per_request import per_request_option

METHODS = ("none", "ngram", "eagle", *DRAFTERS)
MODES = ("offline", "server")

# --quick: small enough for two slow cores; what does not fit into the time is left out and said to be.
QUICK: dict[str, Any] = {
    "concurrency": (1, 4),
    "num_prompts": 4,
    "output_len": 16,
    "repeats": 2,
    "max_model_len": 512,
}
QUICK_MINUTES = 8.5


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the user asks for; tuples make the grid.  ``num_prompts`` is the least a cell gets."""

    target: str = option("smollm2", TARGET)
    methods: tuple[str, ...] = option(
        (),
        f"Of {', '.join(METHODS[1:])}, beside 'none', which always runs; repeat.  Default: ngram, {DEFAULT.name}, and "
        "eagle where it has a checkpoint.",
        "--method",
    )
    checkpoint: str | None = option(None, "Draft checkpoint of our methods; by default the target's known one.")
    eagle_checkpoint: str | None = option(None, "EAGLE checkpoint; without one no EAGLE.")
    num_speculative_tokens: tuple[int | str, ...] = option(
        (3, 7), f"{TOKENS[:-1]}, or {AUTO}; repeat.  Default: 3 and 7.", parser=length_option
    )
    per_request: str | None = option(None, PER_REQUEST, parser=per_request_option)
    modes: tuple[str, ...] = option(MODES, "'offline' or 'server'; repeat.  Default: both.", "--mode")
    concurrency: tuple[int, ...] = option((1, 4, 16), f"{CONCURRENCY[:-1]}; repeat.  Default: 1, 4 and 16.")
    prompts: Path | None = option(
        None, 'JSON lines of {"id", "turns"}; first turns are asked.  Default: built-in ones.'
    )
    dataset_name: str | None = option(None, "Dataset of 'vllm bench serve' instead.")
    dataset_path: str | None = option(None, "Its file or hub name.")
    num_prompts: int = option(16, "Requests a cell, at least two for each at once.")
    output_len: int = option(128, "Longest answer, tokens.")
    temperature: float = option(0.0, "0 is greedy.")
    ignore_eos: bool = option(False, "Answers of exactly --output-len tokens.", "--ignore-eos")
    repeats: int = option(3, "Cycles through all engines.")
    dtype: str | None = option(None, "Default: float32 on a CPU, else the target's own.")
    enforce_eager: bool | None = option(
        None, "No torch.compile, no CUDA graphs.  Default: on a CPU.", "--enforce-eager/--no-enforce-eager"
    )
    max_model_len: int | None = option(None, "Context, tokens.  Default: the target's.")
    engine_args: str = option("", "More arguments of 'vllm serve', in one text.")
    bench_args: str = option("", "More arguments of 'vllm bench serve', in one text.")
    seed: int = option(0, "Of the engines and of the client.")


def check(settings: Settings) -> None:
    """Raises: BenchError for a value out of range, given twice, or with nothing to go with."""
    for name, values, known in (("--method", settings.methods, METHODS), ("--mode", settings.modes, MODES)):
        for value in values:
            if value not in known:
                raise BenchError(f"{name} {value!r}: no such one; give one of {', '.join(known)}")
    for name in ("methods", "modes", "concurrency", "num_speculative_tokens"):
        values = getattr(settings, name)
        if len(set(values)) < len(values):
            raise BenchError(f"--{name.rstrip('s').replace('_', '-')}: a value is given twice: {list(values)}")
    for name, word in (("concurrency", ""), ("num_speculative_tokens", f", or {AUTO}")):
        values = getattr(settings, name)
        if not values or any(isinstance(value, int) and value < 1 for value in values):
            raise BenchError(f"--{name.replace('_', '-')} {list(values)}: give whole numbers from 1{word}")
    for name in ("num_prompts", "output_len", "repeats"):
        if getattr(settings, name) < 1:
            raise BenchError(f"--{name.replace('_', '-')} {getattr(settings, name)}: give a whole number from 1")
    if settings.temperature < 0:
        raise BenchError(f"--temperature {settings.temperature:g}: give 0 (greedy) or a positive number")
    if "eagle" in settings.methods and settings.eagle_checkpoint is None:
        raise BenchError("--method eagle needs --eagle-checkpoint FOLDER, an EAGLE drafter of this target")
    if settings.per_request is not None and settings.methods and not {*DRAFTERS} & {*settings.methods}:
        raise BenchError(
            f"--per-request {settings.per_request} ends drafts of {' and '.join(DRAFTERS)} alone, and none is "
            "measured; leave it out"
        )
    if settings.prompts is not None and settings.dataset_name is not None:
        raise BenchError("--prompts and --dataset-name: two sources of prompts; give one of them")
    if settings.prompts is not None and not settings.prompts.is_file():
        raise BenchError(f'--prompts {settings.prompts}: no such file; give JSON lines of {{"id", "turns"}}')
    if settings.dataset_path is not None and settings.dataset_name is None:
        raise BenchError("--dataset-path needs --dataset-name, one of those of 'vllm bench serve --help'")
