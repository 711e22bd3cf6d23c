"""Training data: conversations, repeats, shards, and evaluation prompts kept out."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import version

import pytest
from transformers import AutoTokenizer

from vllm_gumiho.errors import DataError, RecipeError
from vllm_gumiho.training.data import PackedRows, read_samples
from vllm_gumiho.training.decontaminate import EvaluationPrompts
from vllm_gumiho.training.generate import Conversation, Questions, generate_answers, read_questions
from vllm_gumiho.training.provenance import made_with, read_recipe, write_recipe
from vllm_gumiho.training.recipe import Recipe
from vllm_gumiho.version import __version__

LONG = "Write a short story about a lighthouse keeper who finds a letter in a bottle."


def write_lines(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.fixture
def evaluation(tmp_path):
    (tmp_path / "eval").mkdir()
    write_lines(
        tmp_path / "eval" / "set.jsonl", [{"id": "e1", "turns": [LONG, "Shorter."]}, {"id": 2, "turns": ["Hi"]}]
    )
    return tmp_path / "eval"


def test_evaluation_prompts_are_refused_with_their_ids(tmp_path, evaluation):
    prompts = write_lines(
        tmp_path / "prompts.jsonl",
        [
            {"id": "good", "turns": ["Name three rivers. Hi, shorter."]},
            {"id": "copied", "turns": ["Please do this:\n" + LONG.upper().replace(" ", "  ")]},
            {"id": "second turn", "turns": ["Tell me a joke", "hi!"]},
        ],
    )
    with pytest.raises(DataError, match=r"2 of 4 training prompts .*copied \(is set:e1\), second turn \(is set:2\)"):
        generate_answers("no target is opened", [prompts], tmp_path / "out.jsonl", Questions(), [evaluation])
    assert not (tmp_path / "out.jsonl").exists()


def test_clean_prompts_are_counted(evaluation):
    assert EvaluationPrompts.read([evaluation]).refuse([("a", "Name three rivers."), ("b", "hi there")]) == 2


def test_training_refuses_answers_to_evaluation_prompts(tmp_path, evaluation, embedded_target):
    from vllm_gumiho.training.decontaminate import refuse_evaluation_prompts

    tokenizer = AutoTokenizer.from_pretrained(embedded_target)

    def line(name, text):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        return {"id": name, "prompt": list(ids), "answer": [5, 6, 7]}

    data = write_lines(tmp_path / "data.jsonl", [line("fine", "Name three rivers."), line("leak", LONG)])
    samples = read_samples([data], 49152)
    with pytest.raises(DataError, match=r"1 of 2 training prompts are evaluation prompts: leak \(is set:e1\)"):
        refuse_evaluation_prompts(samples, str(embedded_target), [str(evaluation)])
    refuse_evaluation_prompts(samples[:1], str(embedded_target), [str(evaluation)])
    answered = line("said", "Give me a prompt.") | {"answer": tokenizer.encode(f"Here: {LONG}")}
    samples = read_samples([write_lines(tmp_path / "said.jsonl", [answered])], 49152)
    with pytest.raises(DataError, match=r"1 of 1 training prompts .*said \(its answer is set:e1\)"):
        refuse_evaluation_prompts(samples, str(embedded_target), [str(evaluation)])


def test_training_finds_short_evaluation_prompts_within_the_template(tmp_path, evaluation, embedded_target):
    """Each is all that the user said, in the first turn or a later one; words within a turn are none."""
    from vllm_gumiho.training.decontaminate import refuse_evaluation_prompts

    tokenizer = AutoTokenizer.from_pretrained(embedded_target)

    def talk(name, *turns):
        said = Conversation(name, list(turns))
        for _ in turns:
            said.hear(tokenizer, said.ask(tokenizer, 500), [*tokenizer.encode("Hi"), tokenizer.eos_token_id])
        return {"id": name, "turns": said.turns}

    talks = [
        talk("fine", "Say hi.", "And shorter?"),
        talk("first", " hi!"),
        talk("later", "Say a word.", "shorter", "Why?"),
    ]
    samples = read_samples([write_lines(tmp_path / "talks.jsonl", talks)], 49152)
    with pytest.raises(DataError, match=r"2 of 6 .* prompts: first \(is set:2\), later \(is set:e1\); take"):
        refuse_evaluation_prompts(samples, str(embedded_target), [str(evaluation)])
    refuse_evaluation_prompts(samples[:1], str(embedded_target), [str(evaluation)])


def test_missing_evaluation_prompts_are_an_error(tmp_path):
    with pytest.raises(DataError, match="no evaluation prompts there"):
        EvaluationPrompts.read([tmp_path])


def test_repeated_prompts_are_left_out_and_shards_are_disjoint(tmp_path):
    records = [{"id": f"p{i}", "turns": [f"Question number {i}?"]} for i in range(30)]
    file = write_lines(
        tmp_path / "p.jsonl", [*records, {"id": "p3", "turns": ["x"]}, {"id": "q", "turns": ["question NUMBER 7"]}]
    )
    prompts, repeats = read_questions([file])
    assert [prompt.id for prompt in prompts] == [f"p{i}" for i in range(30)]
    assert repeats == 2
    shards = [{prompt.id for prompt in read_questions([file], (i, 3))[0]} for i in range(3)]
    assert set.union(*shards) == {f"p{i}" for i in range(30)}
    assert sum(map(len, shards)) == 30
    assert all(shards)


def test_a_second_turn_goes_on_from_the_ids_of_the_first(embedded_target):
    tokenizer = AutoTokenizer.from_pretrained(embedded_target)
    talk = Conversation("c", ["Name a river.", "And a lake?"])
    first = talk.ask(tokenizer, 200)
    answer = tokenizer.encode("The Rhine.<|im_end|>", add_special_tokens=False)
    talk.hear(tokenizer, first, answer)
    second = talk.ask(tokenizer, 200)
    assert second[: len(first) + len(answer)] == first + answer
    assert "And a lake?" in tokenizer.decode(second[len(first) + len(answer) :])
    talk.hear(tokenizer, second, answer)
    assert talk.ask(tokenizer, 200) is None
    assert [sorted(turn) for turn in talk.turns] == [["answer", "prompt"]] * 2
    assert [i for turn in talk.turns for i in turn["prompt"] + turn["answer"]] == second + answer


def test_an_answer_that_does_not_tokenise_back_ends_the_conversation(embedded_target):
    tokenizer = AutoTokenizer.from_pretrained(embedded_target)
    talk = Conversation("c", ["Name a river.", "And a lake?"])
    first = talk.ask(tokenizer, 200)
    letters = [tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "river"]
    talk.hear(tokenizer, first, letters)
    assert talk.ask(tokenizer, 200) is None


def test_only_answers_of_every_turn_are_trained_on(tmp_path):
    turns = [{"prompt": [5, 6], "answer": [7, 8, 9]}, {"prompt": [10], "answer": [11, 12]}]
    file = write_lines(tmp_path / "d.jsonl", [{"id": "a", "turns": turns}, {"id": "b", "turns": turns}])
    samples = read_samples([file], 160)
    assert len(samples) == 1, "the same first prompt again is a repeat"
    row = PackedRows(samples, 12)[0]
    assert row["input_ids"].tolist() == [5, 6, 7, 8, 9, 10, 11, 12, 0, 0, 0, 0]
    assert row["answer"].nonzero().flatten().tolist() == [2, 3, 4, 6, 7]
    assert row["segments"].tolist() == [1] * 8 + [0] * 4
    assert PackedRows(samples, 12).token_counts(160).nonzero().flatten().tolist() == [7, 8, 9, 11, 12]


def test_a_recipe_names_versions_data_and_processes(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", [{"id": "a", "prompt": [1], "answer": [2, 3]}])
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    made = made_with(Recipe("target", [str(tmp_path)], "run"), processes=2)
    assert made.keys() == {"versions", "data_sha256", "processes"}
    assert (made["data_sha256"], made["processes"]) == ({str(file): digest}, 2)
    assert made["versions"]["vllm-gumiho"] == __version__
    assert all(made["versions"][name] == version(name) for name in ("torch", "transformers"))
    assert made == made_with(Recipe("target", [str(file)], "run"), processes=2)


def test_recipes_are_read_with_and_without_what_they_were_made_with(tmp_path):
    recipe, made = Recipe("target", ["data"], "run", own_tokens=0.5), {"processes": 2}
    write_recipe(tmp_path / "new.json", recipe, made)
    assert read_recipe(tmp_path / "new.json") == (recipe, made)
    (tmp_path / "old.json").write_text(json.dumps(asdict(recipe)))
    assert read_recipe(tmp_path / "old.json") == (recipe, {})
    (tmp_path / "other.json").write_text('{"colour": "blue"}')
    for name in ("other.json", "none.json"):
        with pytest.raises(RecipeError, match=f"{name}: not a recipe of a training run"):
            read_recipe(tmp_path / name)


@pytest.mark.engine
def test_generated_conversations_are_the_targets_own_and_go_on_after_a_kill(tmp_path, embedded_target, evaluation):
    script = (
        "import json, sys; from pathlib import Path; from vllm_gumiho.training.generate import *\n"
        "if __name__ == '__main__':\n"
        " folder = Path(sys.argv[2])\n"
        " counts = generate_answers(sys.argv[1], [folder / 'p.jsonl'], folder / 'out.jsonl',"
        " Questions(max_tokens=6, max_prompt_tokens=64, max_turns=2, sampled=0.0), [folder / 'eval'],"
        " enforce_eager=True, max_num_seqs=4, dtype='float32')\n"
        " (folder / 'counts.json').write_text(json.dumps(counts))\n"
    )
    (tmp_path / "main.py").write_text(script)
    write_lines(
        tmp_path / "p.jsonl",
        [
            {"id": str(i), "turns": [text, "Thanks. Why?"]}
            for i, text in enumerate(["Name a river.", "2+3?", "x " * 80])
        ],
    )
    done_before = {"id": "0", "temperature": 0.0, "turns": [{"prompt": [1], "answer": [2, 3]}]}
    (tmp_path / "out.jsonl").write_text(json.dumps(done_before) + '\n{"id": "1", "tur')
    done = subprocess.run(
        [sys.executable, str(tmp_path / "main.py"), str(embedded_target), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=os.environ,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads((tmp_path / "counts.json").read_text())
    kept, new = (json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines())
    assert kept == done_before
    assert new["id"] == "1"
    assert counts == {
        "conversations": 1,
        "answer_tokens": sum(len(t["answer"]) for t in new["turns"]),
        "too_long": 1,
        "cut_by_length": int(len(new["turns"]) < 2) - counts["cut_by_template"],
        "cut_by_template": counts["cut_by_template"],
        "repeats": 0,
        "checked": 6,
    }
    assert 1 <= len(new["turns"]) <= 2
    assert all(1 <= len(turn["answer"]) <= 6 for turn in new["turns"])
