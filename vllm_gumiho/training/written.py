"""Training data from conversations that others wrote: their answers stand, and the target is not asked."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

from vllm_gumiho.engines.prompts import Prompt, read_prompts
from vllm_gumiho.errors import DataError
from vllm_gumiho.training.decontaminate import EvaluationPrompts
from vllm_gumiho.training.generate import (
    Conversation,
    Questions,
    distinct,
    known_ids,
    of_shard,
    refuse_output,
)


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

    The lines of the files are ``{"id", "turns", "answers"}``; a conversation ends before a blank answer.  Of the target
    its tokenizer is read alone.  As with `vllm_gumiho.training.generate.generate_answers`: ids that the output has are
    skipped, repeats are left out, and turns and shards mean the same.  An answer longer than ``questions.max_tokens``
    is cut, and ends its conversation.

    Returns counts: conversations and answer tokens written; first prompts that were too long; conversations that ended
    before their last answer as it was cut or its prompt did not fit, as the template writes earlier turns in other
    tokens, or as an answer's text has the template's own marks (``with_marks``); repeats; lines without answers; and
    prompts checked against the evaluation prompts.

    Raises: PromptError for a prompt file that cannot be read; DataError for an output that is a prompt file or of
    something else, for evaluation prompts in turns or answers, for a target without a chat template, or where no
    conversation has an answer; OutputError.
    """
    from transformers import AutoTokenizer

    refuse_output(output, prompt_files)
    lines = [prompt for file in prompt_files for _, prompt in read_prompts(file, answers=True)]
    prompts, repeats = distinct(prompt for prompt in lines if prompt.answers)
    if lines and not prompts:
        raise DataError(
            f"{', '.join(map(str, prompt_files))}: no line has answers; give {{id, turns, answers}}, or leave out "
            "--written and the target answers"
        )
    prompts = of_shard(prompts, shard)
    counts = dict.fromkeys(
        ("conversations", "answer_tokens", "too_long", "cut_by_length", "cut_by_template", "with_marks"), 0
    )
    counts |= {"repeats": repeats, "without_answers": sum(not prompt.answers for prompt in lines), "checked": 0}
    if evaluation_prompts:
        evaluation = EvaluationPrompts.read(evaluation_prompts)
        counts["checked"] = evaluation.refuse(
            ((prompt.id, turn) for prompt in prompts for turn in prompt.turns),
            ((prompt.id, answer) for prompt in prompts for answer in prompt.answers),
        )
    known = known_ids(output, Path(target).name)
    tokenizer = AutoTokenizer.from_pretrained(target)
    if not tokenizer.chat_template:
        raise DataError(f"{target}: its tokenizer has no chat template; give a chat model")
    with output.open("a") as file:
        for prompt in islice((prompt for prompt in prompts if prompt.id not in known), limit or None):
            talk = read_aloud(tokenizer, prompt, questions)
            if talk.lost is not None:
                counts[talk.lost] += 1
            if not talk.turns:
                continue
            file.write(json.dumps({"id": talk.id, "target": Path(target).name, "turns": talk.turns}) + "\n")
            counts["conversations"] += 1
            counts["answer_tokens"] += sum(len(turn["answer"]) for turn in talk.turns)
    return counts


def read_aloud(tokenizer: Any, prompt: Prompt, questions: Questions) -> Conversation:
    """The conversation of a prompt and its answers, in the template's tokens up to the mark that ends a turn."""
    answers = prompt.answers[: questions.max_turns]
    talk = Conversation(prompt.id, list(prompt.turns[: len(answers)]))
    marks = {*tokenizer.all_special_ids} | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    for answer in answers:
        ids = talk.ask(tokenizer, questions.longest)
        if ids is None:
            break
        if not marks.isdisjoint(tokenizer.encode(answer, add_special_tokens=False)):
            talk.lost = "with_marks"
            break
        messages = [*talk.messages, {"role": "assistant", "content": answer}]
        whole = list(tokenizer.apply_chat_template(messages, return_dict=False))
        if whole[: len(ids)] != ids:
            talk.lost = "cut_by_template"
            break
        tokens = whole[len(ids) :]
        end = next((place for place, token in enumerate(tokens, 1) if token in marks), len(tokens))
        talk.turns.append({"prompt": ids[len(talk.ids) :], "answer": tokens[: min(end, questions.max_tokens)]})
        talk.ids, talk.messages = ids + tokens[:end], messages
        if end > questions.max_tokens:
            talk.lost = "cut_by_length"
            break
    return talk
