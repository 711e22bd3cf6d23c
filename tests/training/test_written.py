"""Conversations that others wrote as training data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from vllm_gumiho.engines.prompts import read_prompts
from vllm_gumiho.errors import DataError, PromptError
from vllm_gumiho.training.data import read_samples
from vllm_gumiho.training.generate import Questions
from vllm_gumiho.training.written import take_answers

BIN = Path(sys.executable).parent
TALK = {"id": "talk", "turns": ["Name a fruit.", "Another?", "One more?"], "answers": ["An apple.", "A pear."]}
ASKED = {"id": "asked", "turns": ["Who answers this?"]}


@pytest.fixture
def take(tmp_path, embedded_target):
    """Take the answers of these lines; returns the counts and the records written."""

    def run(lines: list[dict], *rest, **questions) -> tuple[dict, dict]:
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        asked = Questions(**{"max_turns": 8, **questions})
        counts = take_answers(str(embedded_target), [tmp_path / "in.jsonl"], tmp_path / "out.jsonl", asked, *rest)
        records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        return counts, {record["id"]: record["turns"] for record in records}

    return run


def ids_of(turns: list[dict]) -> list[int]:
    return [token for turn in turns for token in turn["prompt"] + turn["answer"]]


def test_a_conversation_is_what_the_targets_template_makes_of_it(take, embedded_target):
    counts, records = take([TALK, ASKED])
    tokenizer = AutoTokenizer.from_pretrained(embedded_target)
    messages = []
    for turn, answer in zip(TALK["turns"], TALK["answers"], strict=False):
        messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    # The template writes a line's end after an answer; the target's own answers end before it.
    assert ids_of(records["talk"]) + tokenizer.encode("\n") == list(whole)
    assert tokenizer.decode(records["talk"][1]["answer"], skip_special_tokens=True) == "A pear."
    assert list(records) == ["talk"]
    assert (counts["conversations"], counts["without_answers"]) == (1, 1)
    assert counts["answer_tokens"] == sum(len(turn["answer"]) for turn in records["talk"])


def test_lengths_and_turns_are_those_of_generated_answers(take):
    first = take([TALK], max_turns=1)[1]["talk"]
    assert len(first) == 1
    counts, records = take([{**TALK, "id": "cut"}], max_tokens=2)
    assert [len(turn["answer"]) for turn in records["cut"]] == [2]
    assert counts["cut_by_length"] == 1
    counts, records = take([{**TALK, "id": "long"}], max_prompt_tokens=4, max_turns=1)
    assert counts["too_long"] == 1
    assert "long" not in records


def test_what_was_taken_is_not_taken_again(take, tmp_path):
    other = {**TALK, "id": "other", "turns": ["Name a tree."]}
    take([TALK, other], None, (0, 1), 1)
    counts, records = take([TALK, other])
    assert counts["conversations"] == 1
    assert set(records) == {"talk", "other"}


def test_evaluation_prompts_are_found_in_answers(take, tmp_path):
    question = "Write a short story about a lighthouse keeper who finds a letter."
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps({"id": t, "turns": [t]}) + "\n" for t in (question, "A")))
    inside = {"id": "bad", "turns": ["Give me a prompt."], "answers": [f"Try this: {question.upper()}"]}
    short = {"id": "good", "turns": ["Which letter comes first?"], "answers": ["a"]}
    with pytest.raises(DataError, match=r"^1 of 2 training prompts .*answer of bad \(is eval:Write"):
        take([inside, short], [tmp_path / "eval.jsonl"])
    assert take([short], [tmp_path / "eval.jsonl"])[0]["checked"] == 1


def test_files_without_answers_are_refused_with_a_way_out(take, tmp_path):
    with pytest.raises(DataError, match=r"in\.jsonl: no line has answers; give .* or leave out --written"):
        take([ASKED])
    (tmp_path / "in.jsonl").write_text('{"id": "a", "turns": ["x"], "answers": "y"}')
    with pytest.raises(PromptError, match=r"in\.jsonl:1: not a prompt \(its answers are not a list of texts"):
        list(read_prompts(tmp_path / "in.jsonl"))


def test_the_command_writes_what_train_reads(tmp_path, embedded_target):
    (tmp_path / "in.jsonl").write_text(json.dumps(TALK))
    command = [BIN / "vllm-gumiho", "generate", "--target", embedded_target, "--prompts", tmp_path / "in.jsonl"]
    command += ["--output", tmp_path / "texts.jsonl", "--written", "--max-turns", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (sample,) = read_samples([tmp_path / "texts.jsonl"], 49152)
    assert len(sample.turns) == 2
