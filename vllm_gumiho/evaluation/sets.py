"""Sets of prompts: a folder of ``*.jsonl``, one set a file, named by it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_gumiho.engines.prompts import SHAPE, Prompt, read_prompts, render
from vllm_gumiho.errors import EvalError, PromptError


@dataclass(frozen=True)
class Fitting:
    """Prompts that fit, ids of those that do not (by set), and the context length in tokens for the engines."""

    sets: dict[str, list[Prompt]]
    refused: dict[str, list[str]]
    max_model_len: int


def read_sets(folder: Path, limit: int = 0, all_turns: bool = False) -> dict[str, list[Prompt]]:
    """Sets by name, the first ``limit`` prompts of each (0: all); one turn each unless ``all_turns``.

    Raises: PromptError for a missing folder, one without sets, an empty set, a wrong line or an id given twice.
    """
    if not folder.is_dir():
        raise PromptError(f"{folder}: no such folder of prompts; give one with *.jsonl files")
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise PromptError(f"{folder}: no *.jsonl in it; each file is a set of prompts, one a line: {SHAPE}")
    return {file.stem: read_set(file, all_turns)[: limit or None] for file in files}


def read_set(file: Path, all_turns: bool = False) -> list[Prompt]:
    """Prompts of one file, one turn each unless ``all_turns``.  Raises: PromptError as `read_sets` does."""
    prompts: dict[str, Prompt] = {}
    for number, prompt in read_prompts(file):
        if prompt.id in prompts:
            raise PromptError(f"{file}:{number}: id {prompt.id!r} is there twice; give each prompt its own")
        prompts[prompt.id] = prompt if all_turns else Prompt(prompt.id, prompt.turns[:1])
    if not prompts:
        raise PromptError(f"{file}: an empty set; put prompts in it, one a line, or remove it: {SHAPE}")
    return list(prompts.values())


def fit(
    sets: dict[str, list[Prompt]], tokenizer: Any, max_tokens: int, most: int, max_model_len: int | None = None
) -> Fitting:
    """Sort out prompts that could outgrow the context with answers of ``max_tokens`` tokens a turn.

    most: the target's own limit in tokens, which is also that of the context by default.  The context is no longer
    than the prompts need.

    Raises: EvalError when a given ``max_model_len`` is over that limit, or no prompt of a set fits.
    """
    if max_model_len is not None and max_model_len > most:
        raise EvalError(f"--max-model-len {max_model_len}: the target has {most} positions; give at most that")
    room = max_model_len or most
    kept: dict[str, list[Prompt]] = {}
    refused: dict[str, list[str]] = {}
    longest = 0
    for name, prompts in sets.items():
        needs = [_tokens(tokenizer, prompt) + len(prompt.turns) * max_tokens for prompt in prompts]
        kept[name] = [prompt for prompt, need in zip(prompts, needs, strict=True) if need <= room]
        refused[name] = [prompt.id for prompt, need in zip(prompts, needs, strict=True) if need > room]
        if not kept[name]:
            raise EvalError(
                f"set {name}: no prompt fits into {room} tokens with its answers (the shortest needs {min(needs)}); "
                "raise --max-model-len or lower --max-tokens"
            )
        longest = max(longest, *(need for need in needs if need <= room))
    return Fitting(kept, refused, max_model_len or min(most, longest + 16))


def _tokens(tokenizer: Any, prompt: Prompt) -> int:
    """Tokens of the whole conversation with empty answers."""
    messages: list[dict[str, str]] = []
    for turn in prompt.turns:
        messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": ""}]
    return len(render(tokenizer, messages[:-1]))
