"""Keeping evaluation prompts out of training data."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_gumiho.engines.prompts import read_prompts, render
from vllm_gumiho.errors import DataError
from vllm_gumiho.files import json_lines_files
from vllm_gumiho.training.data import Sample

WHOLE_ONLY = 40
SHOWN = 10
logger = logging.getLogger("vllm_gumiho")


def normalise(text: str) -> str:
    """Letters and digits only, in lower case: what is left alike when a prompt is copied with other spacing."""
    return re.sub(r"[\W_]+", "", text.lower())


@dataclass(frozen=True)
class EvaluationPrompts:
    """Normalised user turns of evaluation prompts, by id."""

    turns: dict[str, str]

    @staticmethod
    def read(paths: Iterable[str | Path]) -> EvaluationPrompts:
        """Files (a folder stands for its ``*.jsonl``) of ``{"id", "turns"}`` lines.

        Raises: DataError for a folder without any, PromptError for a file that is not there or a line of another form.
        """
        turns: dict[str, str] = {}
        for path in paths:
            files = json_lines_files([path])
            if not files:
                raise DataError(f"{path}: no evaluation prompts there; give a JSON-lines file or a folder of them")
            for file in files:
                for _, prompt in read_prompts(file):
                    texts = map(normalise, prompt.turns)
                    turns |= {text: f"{file.stem}:{prompt.id}" for text in texts if text}
        return EvaluationPrompts(turns)

    def found_in(self, text: str, answer: bool = False) -> str | None:
        """Id of an evaluation prompt that ``text`` is or contains; short ones count only when they are all of it.

        answer: the text answers somebody, and may be what a short prompt is by chance.
        """
        text = normalise(text)
        if text in self.turns and not answer:
            return self.turns[text]
        return next((name for turn, name in self.turns.items() if len(turn) >= WHOLE_ONLY and turn in text), None)

    def refuse(self, prompts: Iterable[tuple[str, str]], answers: Iterable[tuple[str, str]] = ()) -> int:
        """Check ``(id, text)`` pairs of prompts, and of answers to them; returns how many prompts were checked.

        Raises: DataError naming the ids of those that hold an evaluation prompt, and which.
        """
        checked, found, named = 0, [], set()
        for name, text in prompts:
            checked += 1
            if evaluation := self.found_in(text):
                found.append(f"{name} (is {evaluation})")
                named.add(name)
        for name, text in answers:
            if name not in named and (evaluation := self.found_in(text, answer=True)):
                found.append(f"{name} (its answer is {evaluation})")
                named.add(name)
        if found:
            more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            raise DataError(
                f"{len(found)} of {checked} training prompts are evaluation prompts: {', '.join(found[:SHOWN])}{more}; "
                "take them out, a head must not be trained on what it is measured with"
            )
        return checked


def _frames(tokenizer: Any) -> list[tuple[str, str]]:
    """What the target's template writes before and after a first user turn and a later one, normalised."""
    user, answer, later = "zqfirstturn", "zqanswertoit", "zqlaterturn"
    roles = (("user", user), ("assistant", answer), ("user", later))
    talk = [{"role": role, "content": text} for role, text in roles]
    try:
        first, whole = (
            normalise(tokenizer.decode(render(tokenizer, messages), skip_special_tokens=True))
            for messages in (talk[:1], talk)
        )
    except Exception:  # a template is a program, and there may be none
        return [("", "")] * 2
    before, _, after = first.partition(user)
    between, _, end = whole.partition(answer)[2].partition(later)
    return [(before, after), (between, end)]


def _bare(text: str, before: str, after: str) -> str:
    """The normalised text of a user turn, without what a template puts around it."""
    text = normalise(text)
    framed = len(text) >= len(before) + len(after) and text.startswith(before) and text.endswith(after)
    return text[len(before) : len(text) - len(after)] if framed else text


def refuse_evaluation_prompts(samples: list[Sample], target: str, paths: Iterable[str]) -> None:
    """Raises: DataError when the decoded prompt of a sample holds an evaluation prompt, or an answer does."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)
    prompts, frames = EvaluationPrompts.read(paths), _frames(tokenizer)

    def texts(part: int) -> Iterator[tuple[str, str]]:
        for sample in samples:
            for number, turn in enumerate(sample.turns):
                text = tokenizer.decode(turn[part], skip_special_tokens=True)
                yield sample.id, text if part else _bare(text, *frames[min(number, 1)])

    checked = prompts.refuse(texts(0), texts(1))
    logger.warning(
        "%d training prompts checked: none of the %d evaluation turns is in them", checked, len(prompts.turns)
    )
