"""Kinds of data: shares of the answer tokens, held-out slices that stay, reports by kind; schedules that branch."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
from runs import recipe

from vllm_gumiho.errors import DataError, RecipeError
from vllm_gumiho.training.data import PackedRows, Sample, by_kind, mixed, split_held_out
from vllm_gumiho.training.metrics import acceptance_metrics
from vllm_gumiho.training.trainer import train


def samples(**counts: int) -> list[Sample]:
    """As many samples of each kind, of ten answer tokens."""
    return [
        Sample(f"{kind}{i}", (([1, 2, i % 90], list(range(10))),), kind) for kind, n in counts.items() for i in range(n)
    ]


def share(taken: list[Sample], kind: str) -> float:
    tokens = {name: sum(s.answer_tokens for s in of) for name, of in by_kind(taken).items()}
    return tokens.get(kind, 0) / sum(tokens.values())


def test_an_epoch_has_the_shares_that_were_asked_for():
    data = samples(mix=400, long=100, code=50)
    taken = mixed(data, {"mix": 2, "long": 1, "code": 1}, 0)
    # A draw decides on some of the samples: chance moves a share by .02.
    assert share(taken, "mix") == pytest.approx(0.5, abs=0.06)
    assert share(taken, "long") == pytest.approx(0.25, abs=0.06)
    assert sum(s.answer_tokens for s in taken) == pytest.approx(sum(s.answer_tokens for s in data), rel=0.1)
    assert {s.id for s in taken if s.kind == "code"} == {s.id for s in data if s.kind == "code"}
    assert mixed(data, {"mix": 2, "long": 1, "code": 1}, 0) == taken
    assert mixed(data, {}, 0) == data
    assert {s.kind for s in mixed(data, {"long": 1.0}, 0)} == {"long"}
    with pytest.raises(DataError, match="shares of qa: no such kind of data; kinds are the files' names: code, long"):
        mixed(data, {"qa": 1.0}, 0)


@pytest.mark.parametrize("text", ["mix", "=1", "mix=0", "mix=much"])
def test_a_share_of_another_form_is_named(tmp_path, text):
    with pytest.raises(RecipeError, match=f"shares {text!r} is not KIND=SHARE"):
        recipe("t", "d", tmp_path, shares=[text]).check()


def test_no_sample_changes_sides_when_data_is_added():
    few, many = samples(a=100, b=3), samples(a=300, b=3, c=1)
    for fraction in (0.05, 0.3):
        (train_few, held_few), (train_many, held_many) = (split_held_out(x, fraction, 0) for x in (few, many))
        assert {s.id for s in train_few} <= {s.id for s in train_many}
        kinds = by_kind(held_few)
        assert set(kinds) == {"a", "b"}
        assert {s.id for s in held_few} <= {s.id for s in held_many}
        assert len(by_kind(held_many)["a"]) / 300 == pytest.approx(fraction, abs=0.08)
        assert not {s.id for s in train_many} & {s.id for s in held_many}
    assert split_held_out(many, 0.3, 1)[1] != held_many


def test_held_out_rows_are_of_one_kind_each():
    rows, kinds = PackedRows.of_kinds(samples(a=30, b=4), 64, 3)
    assert kinds == ["a", "a", "a", "b"]
    assert len(rows) == 4
    assert int((rows[3]["answer"]).sum()) == 40


def test_metrics_are_of_all_and_of_each_kind():
    # Seen, right and accepted at two positions, of three rows.
    counts = np.array([[[10, 8], [5, 4], [5, 2]], [[10, 8], [9, 8], [9, 8]], [[20, 4], [2, 1], [2, 0]]])
    prediction = SimpleNamespace(predictions=counts[[2, 0, 1]], label_ids=np.array([2, 0, 1]))
    found = acceptance_metrics(["a", "a", "b"])(prediction)
    assert found["acceptance_length"] == 1 + 26 / 40
    assert found["a_acceptance_length"] == 1 + 24 / 20
    assert found["b_acceptance_length"] == 1 + 2 / 20
    assert (found["a_accuracy_1"], found["b_accuracy_2"], found["accepted_2"]) == (14 / 20, 1 / 4, 10 / 40)
    assert not [name for name in acceptance_metrics(["a"] * 3)(prediction) if name.startswith("a_")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two kinds of answers."""
    rng = random.Random(0)
    made = tmp_path_factory.mktemp("data")
    for kind in ("count", "steps"):
        lines = [
            {"id": f"{kind}{i}", "prompt": [rng.randrange(2, 150) for _ in range(5)], "answer": list(range(9, 25))}
            for i in range(20)
        ]
        (made / f"{kind}.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return made


def test_a_stable_run_is_decayed_from_one_of_its_checkpoints(tmp_path, tiny_target, folder, caplog):
    ways = {"schedule": "stable", "warmup_ratio": 0.0, "phase": "serial", "shares": ["count=1", "steps=3"]}
    ways["extra"] = {"disable_tqdm": True, "report_to": [], "logging_steps": 1}
    ran = train(recipe(tiny_target, folder, tmp_path / "run", steps=4, **ways))
    assert {"eval_count_acceptance_length", "eval_steps_accuracy_2", "eval_accuracy_1"} <= set(ran)
    # The heads are not trained, and not measured.
    assert "eval_accuracy_3" not in ran
    branch = {"branch_from": str(tmp_path / "run" / "checkpoint-2"), "decay_steps": 4}
    train(recipe(tiny_target, folder, tmp_path / "head", steps=6, **ways, **branch))

    def logged(name):
        state = json.loads((tmp_path / name / "final" / "trainer_state.json").read_text())
        return {entry["step"]: entry for entry in state["log_history"] if "loss" in entry}

    run, head = logged("run"), logged("head")
    assert sorted(head) == [1, 2, 3, 4, 5, 6]
    assert {entry["learning_rate"] for entry in run.values()} == {5e-4}
    # The rate of the step that is logged: whole, then a quarter less each step.
    assert [head[i]["learning_rate"] / 5e-4 for i in (3, 4, 5, 6)] == pytest.approx([1.0, 0.75, 0.5, 0.25])
    # The same rows in the same order as the run that it leaves, until the rate differs.
    assert head[3]["loss"] == run[3]["loss"]
    assert head[4]["loss"] == run[4]["loss"]
    # At another rate from there on, with a warning of rows that are drawn otherwise.
    slow = {"learning_rate": 1e-4, "seed": 1, "branch_from": branch["branch_from"]}
    caplog.clear()
    train(recipe(tiny_target, folder, tmp_path / "slow", steps=4, **ways, **slow))
    rates = {i: entry["learning_rate"] for i, entry in logged("slow").items()}
    assert rates == {1: 5e-4, 2: 5e-4, 3: pytest.approx(1e-4), 4: pytest.approx(1e-4)}
    assert "checkpoint-2 was trained with seed 0, this run has 1" in caplog.text


def test_a_branch_needs_a_checkpoint(tmp_path, tiny_target, folder):
    with pytest.raises(RecipeError, match="checkpoint-9: no whole checkpoint there"):
        train(recipe(tiny_target, folder, tmp_path / "out", branch_from=str(tmp_path / "checkpoint-9")))
    assert not (tmp_path / "out").exists()


def test_a_run_makes_checkpoints_by_the_clock(tmp_path, tiny_target, folder):
    train(recipe(tiny_target, folder, tmp_path, steps=3, save_every=3, save_minutes=1e-6))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
