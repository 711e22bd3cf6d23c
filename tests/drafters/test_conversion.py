"""A drafter of the whole vocabulary becomes one of its target's most frequent tokens, or says why it cannot."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

from vllm_gumiho.checkpoint.tensors import D2T, target_ids
from vllm_gumiho.drafters.checkpoints import open_checkpoint
from vllm_gumiho.drafters.conversion import convert_checkpoint
from vllm_gumiho.errors import CheckpointError, DataError
from vllm_gumiho.training.data import answer_counter

# Token 9 three times, 4 twice, 30 and 12 once; 5 is in a prompt only.
ANSWERS = [{"id": "a", "prompt": [5, 5, 5], "answer": [9, 4, 9]}, {"id": "b", "prompt": [5], "answer": [30, 9, 4, 12]}]


@pytest.fixture
def source(tmp_path):
    return tiny.write_released(tmp_path / "source", tiny.drafter_tensors(), tiny.target_config())


@pytest.fixture
def answers(tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_text("\n".join(map(json.dumps, ANSWERS)))
    return file


@pytest.mark.parametrize(("size", "wanted"), [(1, [9]), (2, [4, 9]), (3, [4, 9, 12]), (4, [4, 9, 12, 30])])
def test_the_most_frequent_answer_tokens_are_drafted(tmp_path, source, answers, size, wanted):
    written = convert_checkpoint(source, tmp_path / "out", draft_vocab=size, count_answers=answer_counter([answers]))
    assert written.sizes.draft_vocab_size == size
    assert json.loads((tmp_path / "out" / "config.json").read_text())["draft_vocab_size"] == size
    before, after = dict(open_checkpoint(source).tensors()), dict(written.tensors())
    assert target_ids(after.pop(D2T), tiny.VOCAB, "out").tolist() == wanted
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("size", "given", "words"),
    [
        (0, True, "a draft vocabulary needs both"), (3, False, "a draft vocabulary needs both"),
        (5, True, "4 different tokens; give 1 to 4"), (-1, True, "give 1 to 4"),
    ],
)  # fmt: skip
def test_a_draft_vocabulary_that_cannot_be_made_is_refused(tmp_path, source, answers, size, given, words):
    with pytest.raises(CheckpointError, match=words):
        convert_checkpoint(
            source, tmp_path / "out", draft_vocab=size, count_answers=answer_counter([answers]) if given else None
        )
    assert not (tmp_path / "out").exists()


def test_answers_of_another_target_are_refused(tmp_path, source, answers):
    answers.write_text(json.dumps({"id": "a", "prompt": [1], "answer": [2, tiny.VOCAB]}))
    with pytest.raises(DataError, match=f"vocabulary of {tiny.VOCAB}"):
        convert_checkpoint(source, tmp_path / "out", draft_vocab=1, count_answers=answer_counter([answers]))


def test_a_reduced_vocabulary_is_not_reduced_again(tmp_path, source, answers):
    convert_checkpoint(source, tmp_path / "once", draft_vocab=3, count_answers=answer_counter([answers]))
    with pytest.raises(CheckpointError, match="drafts over 3 tokens already"):
        convert_checkpoint(
            tmp_path / "once", tmp_path / "twice", draft_vocab=2, count_answers=answer_counter([answers])
        )
    assert not (tmp_path / "twice").exists()
