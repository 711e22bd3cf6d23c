"""Files of prompts are read by one rule."""

from __future__ import annotations

import json

import pytest

from vllm_gumiho.engines.prompts import Prompt, read_prompts
from vllm_gumiho.errors import PromptError


def test_ids_are_texts_and_later_turns_may_be_blank(tmp_path):
    file = tmp_path / "prompts.jsonl"
    lines = [{"id": 7, "turns": ["x", "", "y"]}, {"id": "a", "source": "kept out", "turns": ["z"]}]
    file.write_text("\n\n".join(json.dumps(line) for line in lines))
    assert list(read_prompts(file)) == [(1, Prompt("7", ("x", "", "y"))), (3, Prompt("a", ("z",)))]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"id": "a", "turns": [" "]}', "its first turn is blank"),
        ('{"id": "a", "turns": "x"}', "its turns are not a list of texts"),
        ('{"id": true, "turns": ["x"]}', "it has no id, or one that is neither text nor a whole number"),
        ('{"id": "", "turns": ["x"]}', "it has no id"),
    ],
)
def test_a_line_that_is_no_prompt_is_named_with_the_reason(tmp_path, line, reason):
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"id": "b", "turns": ["x"]}}\n{line}\n')
    with pytest.raises(PromptError, match=f"prompts.jsonl:2: not a prompt \\({reason}"):
        list(read_prompts(file))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(PromptError, match=r"absent.jsonl: no such file; give JSON lines"):
        list(read_prompts(tmp_path / "absent.jsonl"))
