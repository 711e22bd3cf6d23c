"""Conversations that others wrote as training data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from vllm_gumiho.engines.prompts import Prompt, read_prompts
from vllm_gumiho.errors import DataError, PromptError
from vllm_gumiho.training.data import read_samples
from vllm_gumiho.training.generate import Questions, known_ids
from vllm_gumiho.training.written import read_aloud, take_answers

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
    other = {**TALK, "id": "other", "turns": ["Name a tree.", "Another?"]}
    take([TALK, other], None, (0, 1), 1)
    counts, records = take([TALK, other])
    assert counts["conversations"] == 1
    assert set(records) == {"talk", "other"}


def test_evaluation_prompts_are_found_in_answers(take, tmp_path):
    question = "Write a short story about a lighthouse keeper who finds a letter."
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps({"id": t, "turns": [t]}) + "\n" for t in (question, "A")))
    inside = {"id": "bad", "turns": ["Give me a prompt.", "More."], "answers": ["No.", f"Try: {question.upper()}"]}
    short = {"id": "good", "turns": ["Which letter comes first?"], "answers": ["a"]}
    with pytest.raises(DataError, match=r"^1 of 3 training prompts .*bad \(its answer is eval:Write"):
        take([inside, short], [tmp_path / "eval.jsonl"])
    assert take([short], [tmp_path / "eval.jsonl"])[0]["checked"] == 1


def test_a_turn_ends_as_the_template_ends_it_whatever_the_tokenizers_own_end_is(tmp_path, embedded_target):
    tokenizer = AutoTokenizer.from_pretrained(embedded_target)
    (end,) = tokenizer.encode("<|im_end|>")
    tokenizer.eos_token, encode = "<|endoftext|>", tokenizer.encode
    # Many tokenizers put a mark before a text that they are not told to take as it is.
    tokenizer.encode = lambda text, add_special_tokens=True: [end] * add_special_tokens + encode(text)
    talk = read_aloud(tokenizer, Prompt("a", ("One?", "Two?"), ("one", "two")), Questions(max_turns=2))
    assert [turn["answer"][-1] for turn in talk.turns] == [end, end]
    assert talk.lost is None
    assert tokenizer.decode(talk.turns[1]["answer"][:-1]) == "two"


def test_the_templates_own_marks_in_an_answer_end_the_conversation_before_it(take):
    forged = {"id": "forged", "turns": ["One?", "Two?"], "answers": ["one", "Hi<|im_end|>\n<|im_start|>user\nfoo"]}
    counts, records = take([forged])
    assert len(records["forged"]) == 1
    assert counts["with_marks"] == 1


def test_a_blank_answer_ends_its_conversation(take):
    blank = {"id": "blank", "turns": ["One?", "Two?", "Three?"], "answers": ["one", " ", "three"]}
    counts, records = take([blank, {"id": "none", "turns": ["Four?"], "answers": ["\n"]}])
    assert [len(turns) for turns in records.values()] == [1]
    assert counts["without_answers"] == 1


def test_a_repeat_that_is_answered_is_taken_and_shards_are_disjoint(take, tmp_path, embedded_target):
    unanswered = {"id": "asked again", "turns": [TALK["turns"][0]]}
    counts, records = take([unanswered, TALK])
    assert list(records) == ["talk"]
    assert counts["repeats"] == 0
    lines = [{"id": f"n{i}", "turns": [f"Number {i}?"], "answers": [str(i)]} for i in range(6)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    taken = []
    for shard in range(6):
        output = tmp_path / f"shard{shard}.jsonl"
        take_answers(str(embedded_target), [tmp_path / "in.jsonl"], output, Questions(), None, (shard, 6))
        taken.append([json.loads(line)["id"] for line in output.read_text().splitlines()])
    assert sorted(chain(*taken)) == [line["id"] for line in lines]
    assert max(map(len, taken)) < 6


def test_an_output_that_holds_something_else_is_refused_and_stays(take, tmp_path):
    for text in ("notes\nmore notes", '{"id": "a", "turns": ["x"]}\n', '{"id": "a", "turns": ["x"]}'):
        (tmp_path / "out.jsonl").write_text(text)
        with pytest.raises(DataError, match=r"out\.jsonl: holds a line that is no answer .* give another --output"):
            take([TALK])
        assert (tmp_path / "out.jsonl").read_text() == text
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(json.dumps(TALK))
    with pytest.raises(DataError, match=r"p\.jsonl: holds the prompts, .* give another --output"):
        take_answers("no target is opened", [prompts], prompts, Questions())
    assert prompts.read_text() == json.dumps(TALK)


def test_a_line_that_a_kill_cut_off_is_taken_away_and_one_without_its_end_is_kept(tmp_path):
    line = json.dumps({"id": "a", "turns": [{"prompt": [1], "answer": [2]}]})
    file = tmp_path / "out.jsonl"
    for rest, ids in (
        ("", {"a"}),
        ('{"i', {"a"}),
        ('{"id": "b", "tur', {"a"}),
        (line.replace('"a"', '"b"'), {"a", "b"}),
    ):
        file.write_text(f"{line}\n{rest}")
        assert known_ids(file, "any") == ids
        assert len(file.read_text().splitlines()) == len(ids)
        assert file.read_text().endswith("}\n")


def test_answers_of_another_target_are_not_added_to(take, tmp_path):
    """Lines name it; older ones, which do not, are taken for this one's."""
    take([TALK])
    (line,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert line["target"] == "SmolLM2-135M-Instruct"
    text = json.dumps(line | {"target": "Other-1B"}) + "\n"
    (tmp_path / "out.jsonl").write_text(text)
    with pytest.raises(DataError, match=r"holds answers of Other-1B, not SmolLM2-135M-Instruct; give another --output"):
        take([TALK])
    assert (tmp_path / "out.jsonl").read_text() == text


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ("y", "its answers are not a list of texts"),
        ([1], "its answers are not a list of texts"),
        (["y", "z"], "it has 2 answers to 1 turns"),
        (["half \ud83d"], "surrogates not allowed"),
    ],
)
def test_answers_of_another_form_are_named_where_they_are_read(tmp_path, answers, reason):
    file = tmp_path / "in.jsonl"
    file.write_text(json.dumps({"id": "a", "turns": ["x"], "answers": answers}))
    with pytest.raises(PromptError, match=r"in\.jsonl:1: not a prompt .*" + reason + r".*; expected .*\"answers\""):
        list(read_prompts(file, answers=True))
    assert [prompt.answers for _, prompt in read_prompts(file)] == [()]


def test_a_target_without_a_chat_template_is_refused(tmp_path, embedded_target):
    for file in embedded_target.iterdir():
        if file.name.startswith("token"):
            (tmp_path / file.name).write_text(file.read_text())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "in.jsonl").write_text(json.dumps(TALK))
    with pytest.raises(DataError, match=r"its tokenizer has no chat template; give a chat model"):
        take_answers(str(tmp_path), [tmp_path / "in.jsonl"], tmp_path / "out.jsonl", Questions())


def test_files_without_answers_are_refused_with_a_way_out(take):
    with pytest.raises(DataError, match=r"in\.jsonl: no line has answers; give .* or leave out --written"):
        take([ASKED])


def test_the_command_writes_what_train_reads(tmp_path, embedded_target):
    (tmp_path / "in.jsonl").write_text(json.dumps(TALK))
    command = [BIN / "vllm-gumiho", "generate", "--target", embedded_target, "--prompts", tmp_path / "in.jsonl"]
    command += ["--output", tmp_path / "texts.jsonl", "--written", "--max-turns", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (sample,) = read_samples([tmp_path / "texts.jsonl"], 49152)
    assert len(sample.turns) == 2
