"""Prompt sets: ``*.jsonl`` files of ``{"id", "turns": [...]}``, one set a file, named by it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_gumiho.evaluation import EvalError

_SHAPE = 'expected {"id": "...", "turns": ["user turn", ...]}'


@dataclass(frozen=True)
class Prompt:
    """One conversation: what the user says, turn by turn."""

    id: str
    turns: tuple[str, ...]

    @property
    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 of the turns."""
        return hashlib.sha256(json.dumps(self.turns).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Fitting:
    """Prompts that fit, ids of those that do not (by set), and the context length in tokens for the engines."""

    sets: dict[str, list[Prompt]]
    refused: dict[str, list[str]]
    max_model_len: int


def read_sets(folder: Path, limit: int = 0, all_turns: bool = False) -> dict[str, list[Prompt]]:
    """Sets by name, the first ``limit`` prompts of each (0: all); one turn each unless ``all_turns``.

    Raises: EvalError for a missing folder, one without sets, an empty set, a wrong line or an id given twice.
    """
    if not folder.is_dir():
        raise EvalError(f"{folder}: no such folder of prompts; give one with *.jsonl files")
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise EvalError(f"{folder}: no *.jsonl in it; each file is a set of prompts, one a line: {_SHAPE}")
    return {file.stem: read_set(file, all_turns)[: limit or None] for file in files}


def read_set(file: Path, all_turns: bool = False) -> list[Prompt]:
    """Prompts of one file, one turn each unless ``all_turns``.  Raises: EvalError as `read_sets` does."""
    prompts: dict[str, Prompt] = {}
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise EvalError(f"{file}: not readable as UTF-8 text ({error}); repair or remove it") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompt = _prompt(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise EvalError(f"{file}:{number}: not a prompt ({error}); {_SHAPE}") from error
        if prompt.id in prompts:
            raise EvalError(f"{file}:{number}: id {prompt.id!r} is there twice; give each prompt its own")
        prompts[prompt.id] = prompt if all_turns else Prompt(prompt.id, prompt.turns[:1])
    if not prompts:
        raise EvalError(f"{file}: an empty set; put prompts in it, one a line, or remove it: {_SHAPE}")
    return list(prompts.values())


def _prompt(raw: Any) -> Prompt:
    if not isinstance(raw, dict):
        raise ValueError(f"it is {type(raw).__name__}, not an object")
    name, turns = raw.get("id"), raw.get("turns")
    if not isinstance(name, str) or not name:
        raise ValueError("it has no id, or one that is not text")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise ValueError("its turns are not a list of texts")
    return Prompt(name, tuple(turns))


def render(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a conversation by the target's chat template, ready for the next answer."""
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


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
