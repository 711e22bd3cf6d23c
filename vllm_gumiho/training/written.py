"""Training data from conversations that others wrote: their answers stand, and the target is not asked."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

from vllm_gumiho.engines.prompts import Prompt
from vllm_gumiho.errors import DataError
from vllm_gumiho.training.decontaminate import EvaluationPrompts
from vllm_gumiho.training.generate import Conversation, Questions, known_ids, read_questions


def take_answers(
    target: str,
    prompt_files: list[Path],
    output: Path,
    questions: Questions,
    evaluation_prompts: list[Path] | None = None,
    shard: tuple[int, int] = (0, 1),
    limit: int = 0,
) -> dict[str, int]:
    """Append one line ``{"id", "turns"}`` a conversation of the files to ``output``, in the target's tokens.

    The lines of the files are ``{"id", "turns", "answers"}``, an answer to each turn or to the first of them.  As with
    `vllm_gumiho.training.generate.generate_answers`: ids that the output has are skipped, repeats are left out, and
    lengths, turns and shards mean the same.  An answer cut at ``questions.max_tokens`` ends its conversation.

    Returns the same counts, and ``without_answers`` of conversations that have none.

    Raises: PromptError for a prompt file that cannot be read, DataError for evaluation prompts in turns or answers, or
    where no conversation has an answer.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)
    prompts, repeats = read_questions(prompt_files, shard)
    counts = {"conversations": 0, "answer_tokens": 0, "too_long": 0, "cut_by_length": 0, "cut_by_template": 0}
    counts |= {"repeats": repeats, "without_answers": sum(not prompt.answers for prompt in prompts), "checked": 0}
    if prompts and counts["without_answers"] == len(prompts):
        raise DataError(
            f"{', '.join(map(str, prompt_files))}: no line has answers; give {{id, turns, answers}}, or leave out "
            "--written and the target answers"
        )
    if evaluation_prompts:
        evaluation = EvaluationPrompts.read(evaluation_prompts)
        counts["checked"] = evaluation.refuse(
            ((prompt.id, turn) for prompt in prompts for turn in prompt.turns),
            ((prompt.id, answer) for prompt in prompts for answer in prompt.answers),
        )
    known = known_ids(output)
    todo = (prompt for prompt in prompts if prompt.answers and prompt.id not in known)
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("a") as file:
        for prompt in islice(todo, limit or None):
            talk = read_aloud(tokenizer, prompt, questions)
            if talk.lost is not None:
                counts[talk.lost] += 1
            if not talk.turns:
                continue
            file.write(json.dumps({"id": talk.id, "turns": talk.turns}) + "\n")
            counts["conversations"] += 1
            counts["answer_tokens"] += sum(len(turn["answer"]) for turn in talk.turns)
    return counts


def read_aloud(tokenizer: Any, prompt: Prompt, questions: Questions) -> Conversation:
    """The conversation of a prompt and its answers, in tokens."""
    turns = prompt.turns[: min(questions.max_turns, len(prompt.answers))]
    talk = Conversation(prompt.id, list(turns))
    for answer in prompt.answers[: len(turns)]:
        ids = talk.ask(tokenizer, questions.longest)
        if ids is None:
            break
        tokens = answer_tokens(tokenizer, answer)
        talk.hear(tokenizer, ids, tokens[: questions.max_tokens])
        if len(tokens) > questions.max_tokens:
            talk.lost = "cut_by_length"
            break
    return talk


def answer_tokens(tokenizer: Any, answer: str) -> list[int]:
    """Token ids of an answer as the target would write it, with the token that ends it."""
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(tokenizer.encode(answer, add_special_tokens=False)) + ends
