"""Prompts: ``*.jsonl`` files of ``{"id", "turns": [...]}``, read by one rule everywhere, and the built-in questions.

An id is a text that is not empty, or a whole number, which stands for its digits.  Turns are a list of user turns, of
which the first is not blank; later ones are in collected conversations now and then.  A line may hold ``answers`` that
others wrote, texts to the turns in their order, which are read where they are asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from vllm_gumiho.errors import PromptError
from vllm_gumiho.files import lines_of

SHAPE = 'expected {"id": "...", "turns": ["user turn", ...]}'
WITH_ANSWERS = 'expected {"id": "...", "turns": ["user turn", ...], "answers": ["answer to it", ...]}'

QUESTIONS = (
    "Explain in a few sentences how a bicycle stays upright.",
    "Write a short poem about the first snow of winter.",
    "Write a Python function that returns the n-th Fibonacci number, and show one call.",
    "A baker sells 14 loaves each morning and 9 each afternoon. How many loaves does he sell in 5 days?",
    "List five things to check before renting a flat.",
    "Summarise the water cycle for a ten-year-old.",
    "Write a polite email asking a colleague to move a meeting to Thursday.",
    "What is the difference between a virus and a bacterium?",
    "Give me a simple recipe for tomato soup.",
    "Name three reasons why the Roman Empire declined.",
)


@dataclass(frozen=True)
class Prompt:
    """One conversation: what the user says, turn by turn, and what another has answered to the first of the turns.

    answers: none is blank.
    """

    id: str
    turns: tuple[str, ...]
    answers: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 of the turns."""
        return hashlib.sha256(json.dumps(self.turns).encode()).hexdigest()[:16]


def read_prompts(file: Path, answers: bool = False) -> Iterator[tuple[int, Prompt]]:
    """Line number and prompt of every line of a file that is not blank.

    answers: read those that the lines hold too, up to the first blank one.

    Raises: PromptError for a file that is not there or not text, or a line that is no prompt.
    """
    shape = WITH_ANSWERS if answers else SHAPE
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise PromptError(f"{file}: no such file; give JSON lines, {shape}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{file}: not readable as UTF-8 text ({error}); give JSON lines, {shape}") from error
    for number, line in lines_of(text):
        try:
            yield number, _prompt(json.loads(line), answers)
        except (ValueError, RecursionError) as error:
            raise PromptError(f"{file}:{number}: not a prompt ({error}); {shape}") from error


def _prompt(raw: Any, with_answers: bool) -> Prompt:
    if not isinstance(raw, dict):
        raise ValueError(f"it is {type(raw).__name__}, not an object")
    name, turns = raw.get("id"), raw.get("turns")
    if isinstance(name, int) and not isinstance(name, bool):
        name = str(name)
    if not isinstance(name, str) or not name:
        raise ValueError("it has no id, or one that is neither text nor a whole number")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
        raise ValueError("its turns are not a list of texts")
    if not turns[0].strip():
        raise ValueError("its first turn is blank")
    answers = (raw.get("answers") or []) if with_answers else []
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError("its answers are not a list of texts")
    if len(answers) > len(turns):
        raise ValueError(f"it has {len(answers)} answers to {len(turns)} turns")
    for text in (name, *turns, *answers):
        text.encode()  # half a surrogate pair, in texts that were cut, is JSON and no text: a ValueError
    return Prompt(name, tuple(turns), tuple(takewhile(str.strip, answers)))


def render(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a conversation by the target's chat template, ready for the next answer."""
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def question_ids(tokenizer: Any) -> list[list[int]]:
    """`QUESTIONS` as token ids, in the target's chat format where it has one."""
    if not getattr(tokenizer, "chat_template", None):
        return [list(tokenizer.encode(question)) for question in QUESTIONS]
    return [render(tokenizer, [{"role": "user", "content": question}]) for question in QUESTIONS]
