"""What a judgement is asked for."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_gumiho.drafters import DEFAULT, DRAFTERS
from vllm_gumiho.errors import EvalError
from vllm_gumiho.options import CONCURRENCY, PER_REQUEST, TARGET, option
from vllm_gumiho.request.lengths import AUTO, length_option
from vllm_gumiho.request.per_request import per_request_option

METHODS = (*DRAFTERS, "eagle", "ngram", "none")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the user asks for; tuples make a grid, one engine for each K."""

    prompts: Path = option(help='Folder of *.jsonl, a set each: lines of {"id", "turns": [...]}.')
    output: Path = option(help="JSON report to write.")
    target: str = option("smollm2", TARGET)
    checkpoint: str | None = option(None, "Drafter; by default, for our methods, the target's known one.")
    method: str = option(DEFAULT.name, f"One of {', '.join(METHODS)}.")
    num_speculative_tokens: tuple[int | str, ...] = option(
        (), f"K or {AUTO}; repeat for a grid.  Default: all the checkpoint has, else 7.", parser=length_option
    )
    per_request: str | None = option(None, PER_REQUEST, parser=per_request_option)
    temperatures: tuple[float, ...] = option((0.0,), "0 (default) or 1; repeat for a grid.", "--temperature")
    baseline: Path | None = option(None, "Report with a greedy run without speculation, instead of running one.")
    limit: int = option(0, "First N prompts of each set; 0 for all.")
    max_tokens: int = option(64, "Longest answer, tokens.")
    turns: str = option("first", "'first', or 'all' turns with the engine's own answers between.")
    concurrency: int = option(8, CONCURRENCY)
    max_model_len: int | None = option(None, "Context, tokens.  Default: enough.")
    dtype: str | None = option(None, "Default: float32 on a CPU, else the target's own.")
    enforce_eager: bool | None = option(
        None, "No torch.compile, no CUDA graphs.  Default: on a CPU.", "--enforce-eager/--no-enforce-eager"
    )
    seed: int = option(0, "Of sampled answers.")
    rank_hits: bool = option(
        False,
        "Count how often the target's token is the drafter's first to eighth choice at each position, without CUDA "
        "graphs. Drafts are the same, speeds are not; texts are compared only with a --baseline.",
        "--rank-hits",
    )

    @property
    def all_turns(self) -> bool:
        """Whether conversations go on after their first answer."""
        return self.turns == "all"

    def recorded(self) -> dict[str, Any]:
        """For the report: paths as text."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}


def check_settings(settings: Settings) -> None:
    """Raises: EvalError for a method, a number or a combination that cannot be judged."""
    if settings.method not in METHODS:
        raise EvalError(f"--method {settings.method!r}: no such method; give one of {', '.join(METHODS)}")
    if settings.turns not in ("first", "all"):
        raise EvalError(f"--turns {settings.turns!r}: give 'first' or 'all'")
    for name, least in (("limit", 0), ("max_tokens", 1), ("concurrency", 1), ("max_model_len", 1), ("seed", 0)):
        value = getattr(settings, name)
        if value is not None and value < least:
            raise EvalError(f"--{name.replace('_', '-')} {value}: give a whole number from {least}")
    for temperature in settings.temperatures:
        if not math.isfinite(temperature) or temperature < 0:
            raise EvalError(f"--temperature {temperature}: give 0 (greedy) or a positive number")
    for name in ("temperatures", "num_speculative_tokens"):
        values = getattr(settings, name)
        if len(set(values)) < len(values):
            raise EvalError(f"--{name.rstrip('s').replace('_', '-')}: a value is given twice: {list(values)}")
    for length in settings.num_speculative_tokens:
        if isinstance(length, int) and length < 1:
            raise EvalError(f"--num-speculative-tokens {length}: give whole numbers from 1, or {AUTO}")
        if length == AUTO and (settings.method not in DRAFTERS or settings.rank_hits):
            what = "--rank-hits" if settings.rank_hits else f"method {settings.method!r}"
            raise EvalError(f"--num-speculative-tokens {AUTO} does not go with {what}; give whole numbers from 1")
    if settings.rank_hits and settings.method not in DRAFTERS:
        raise EvalError(
            f"--rank-hits looks at the choices of {' and '.join(DRAFTERS)} alone, not of method {settings.method!r}; "
            "leave it out"
        )
    if settings.per_request is not None and settings.method not in DRAFTERS:
        raise EvalError(
            f"--per-request {settings.per_request} ends drafts of {' and '.join(DRAFTERS)} alone, not of method "
            f"{settings.method!r}; leave it out"
        )
    if settings.method == "none" and settings.baseline is not None:
        raise EvalError(f"--baseline {settings.baseline}: --method none makes baselines; leave it out")
    if settings.method == "none" and settings.num_speculative_tokens:
        raise EvalError("--num-speculative-tokens goes with a method that drafts, not with 'none'; leave it out")
    if settings.method in ("ngram", "none") and settings.checkpoint is not None:
        raise EvalError(f"--checkpoint {settings.checkpoint}: method {settings.method!r} has none; leave it out")
    if settings.method == "eagle" and (settings.checkpoint is None or settings.checkpoint in DRAFTERS):
        raise EvalError("--method eagle needs --checkpoint FOLDER, an EAGLE drafter of this target")
