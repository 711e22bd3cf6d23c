"""All ways in which training data can run out, and what cannot be started from: named, counted, with the remedy."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path

import pytest
import tiny
import zoo
from runs import recipe

from vllm_gumiho.errors import DataError, RecipeError
from vllm_gumiho.training.data import PackedRows, Sample, read_samples
from vllm_gumiho.training.generate import Conversation
from vllm_gumiho.training.trainer import train


def write(folder: Path, lines: list[tuple[list[int], list[int]]]) -> Path:
    file = folder / "answers.jsonl"
    made = [{"id": f"s{i}", "prompt": prompt, "answer": answer} for i, (prompt, answer) in enumerate(lines)]
    file.write_text("\n".join(map(json.dumps, made)))
    return file


def conversations(count: int, prompt: int = 4, answer: int = 10) -> list[tuple[list[int], list[int]]]:
    return [([2 + i, *range(3, 3 + prompt - 1)], list(range(5, 5 + answer))) for i in range(count)]


@pytest.mark.parametrize(
    ("lines", "row_length", "reason"),
    [
        (conversations(1), 64, "no row is left to train on, of 1 conversations taken;"),
        (conversations(30, prompt=70), 64, "30 with fewer than 2 answer tokens within --row-length"),
        (conversations(20, answer=0), 64, "20 with a first answer of fewer than 2 tokens"),
        (conversations(20, prompt=120), 121, "20 with fewer than 2 answer tokens within --row-length"),
        ([*conversations(1), *conversations(3)[:1]], 64, "1 repeats"),
    ],
)
def test_data_of_which_nothing_is_left_is_named(tmp_path, tiny_target, lines, row_length, reason):
    """Fault H."""
    data = write(tmp_path, lines)
    with pytest.raises(DataError) as error:
        train(recipe(tiny_target, data, tmp_path / "run", row_length=row_length))
    assert reason in str(error.value)
    assert "answers.jsonl" in str(error.value)


def test_a_held_out_part_without_a_row_is_named(tmp_path, tiny_target):
    """Fault I: the one conversation that is held out is too long for a row."""
    from vllm_gumiho.training.data import split_held_out

    samples = read_samples([write(tmp_path, conversations(20))], tiny.VOCAB)
    (held,) = split_held_out(samples, 0.0, 0)[1]
    lines = conversations(20)
    i = int(held.id[1:])
    lines[i] = (lines[i][0] + list(range(60)), lines[i][1])
    data = write(tmp_path, lines)
    settings = {"held_out": 0.0, "row_length": 64}
    with pytest.raises(DataError, match="no row is left to measure on, of 20 conversations taken"):
        train(recipe(tiny_target, data, tmp_path / "run", patience=1, **settings))


def test_no_rows_to_measure_on_cannot_be_asked_for(tmp_path, tiny_target):
    with pytest.raises(RecipeError, match="eval_rows is 0"):
        train(recipe(tiny_target, write(tmp_path, conversations(9)), tmp_path / "run", eval_rows=0))


def test_what_is_left_out_is_counted(tmp_path, caplog):
    lines = [*conversations(3), *conversations(1), ([], [5, 6]), ([9], [5])]
    left_out: Counter[str] = Counter()
    assert len(read_samples([write(tmp_path, lines)], tiny.VOCAB, left_out)) == 3
    assert left_out == {
        "repeats": 1,
        "without a prompt": 1,
        "with a first answer of fewer than 2 tokens": 1,
    }
    rows = PackedRows([Sample("a", (([1] * 30, [2] * 9),)), Sample("b", (([1], [2] * 9),))], 16)
    assert (len(rows), rows.cut_away) == (1, 1)


def test_a_run_says_what_it_leaves_out(tmp_path, tiny_target, caplog):
    data = write(tmp_path, [*conversations(8), ([7] * 70, [5, 6, 7]), ([9, 9], [5])])
    with caplog.at_level(logging.WARNING, "vllm_gumiho"):
        train(recipe(tiny_target, data, tmp_path / "run", steps=1, save_every=1))
    assert "9 conversations are taken, left out: 1 with a first answer of fewer than 2 tokens, 1 with" in caplog.text


class Template:
    """Of a tokenizer: a token a character, and spaces of answers trimmed, as Llama-2's template does."""

    def __init__(self, trims: bool):
        self.trims = trims

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(map(chr, ids))

    def render(self, messages: list[dict[str, str]]) -> list[int]:
        text = "".join(m["content"].strip() if self.trims else m["content"] for m in messages)
        return [ord(c) for c in text]


@pytest.mark.parametrize(
    ("trims", "longest", "lost", "turns"),
    [
        (False, 100, None, 3),
        (True, 100, "cut_by_template", 1),
        (False, 8, "cut_by_length", 2),
        (False, 1, "too_long", 0),
    ],
)
def test_turns_that_are_lost_are_counted_by_why(monkeypatch, trims, longest, lost, turns):
    """Fault J: an answer that the template writes in other tokens ends its conversation, and says so."""
    monkeypatch.setattr("vllm_gumiho.training.generate.render", lambda tokenizer, messages: tokenizer.render(messages))
    tokenizer, talk = Template(trims), Conversation("a", ["ab", "cd", "ef"])
    while (ids := talk.ask(tokenizer, longest)) is not None:
        talk.hear(tokenizer, ids, [ord(" "), ord("x")])
    assert (talk.lost, len(talk.turns)) == (lost, turns)


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_layers_that_are_not_llamas_are_no_start(name, tmp_path):
    """Fault G: ``--init target`` of a target of other layers."""
    from vllm_gumiho.training.recipes import new_drafter
    from vllm_gumiho.training.start import start
    from vllm_gumiho.training.target import FrozenTarget

    frozen = FrozenTarget(zoo.new_model(zoo.ZOO[name]))
    settings = recipe("target", "data", "run", init="target")
    drafter = new_drafter(settings, frozen.model.config)
    rows = PackedRows([Sample("a", (([2, 3], [4, 5, 6]),))], 16)
    with pytest.raises(RecipeError, match=r"init 'target': layers of .* are not Llama's"):
        start(drafter, settings, frozen, rows)
