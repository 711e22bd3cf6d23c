"""Whole training runs: killed and resumed, in several processes, and what they leave behind is served."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from children import exit_code
from engines import case, run_engines
from places import PROCESSES
from runs import logged as recipe
from runs import train_rows, write_answers

from vllm_gumiho.checkpoint.tensors import D2T
from vllm_gumiho.drafters.checkpoints import open_checkpoint
from vllm_gumiho.engines.server import free_port
from vllm_gumiho.errors import FigureError, RecipeError
from vllm_gumiho.training import trainer
from vllm_gumiho.training.callbacks import TimedCheckpoints
from vllm_gumiho.training.curves import plot_curves, read_curves
from vllm_gumiho.training.provenance import made_with, read_recipe
from vllm_gumiho.training.recipe import Recipe
from vllm_gumiho.training.trainer import last_checkpoint, train

SCRIPT = PROCESSES / "train_main.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_answers(tmp_path_factory.mktemp("data"))


def start(
    folder: Path, settings: Recipe, *launcher: str, resume: bool = False, script: Path = SCRIPT, **variables: str
) -> subprocess.Popen:
    file = folder / "recipe.json"
    file.write_text(json.dumps(asdict(settings)))
    command = [sys.executable, *launcher, str(script), str(file), *(["resume"] if resume else [])]
    log = (folder / "log").open("a")
    variables = {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", **variables}
    return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **variables})


def history(output: Path) -> list[dict[str, float]]:
    """What was logged of each step."""
    state = json.loads((output / "final" / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


def loss_curve(output: Path) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in history(output)}


def test_a_killed_run_goes_on_where_it_stopped(tmp_path, tiny_target, data):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = {"steps": 12, "own_tokens": 0.5, "feature_cache": str(tmp_path / "features")}
    run = start(tmp_path, recipe(tiny_target, data, killed, **settings))
    while not list(killed.glob("checkpoint-4/trainer_state.json")):
        assert run.poll() is None, (tmp_path / "log").read_text()[-3000:]
        time.sleep(0.02)
    run.kill()
    run.wait()
    assert not (killed / "final").exists()
    stopped = last_checkpoint(killed)
    for output in (killed, whole):
        run = start(tmp_path, recipe(tiny_target, data, output, **settings), resume=output == killed)
        assert exit_code(run, tmp_path / "log") == 0, (tmp_path / "log").read_text()[-3000:]
    expected, seen = loss_curve(whole), loss_curve(killed)
    assert sorted(seen) == sorted(expected) == list(range(1, 13))
    # The same sums in the same order on the same machine: no tolerance.
    assert seen == expected
    counted = [[entry.get("answer_tokens") for entry in history(output)] for output in (whole, killed)]
    assert counted[0] == counted[1]
    assert 0 < counted[0][0] < counted[0][-1]
    assert int(stopped.rpartition("-")[2]) < 12


def test_two_processes_train_one_drafter(tmp_path, tiny_target, data):
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port")
    fsdp = {
        "script": SCRIPT.with_name("fsdp_main.py"),
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    }

    def run(name, resume=False, **ways):
        settings = recipe(tiny_target, data, tmp_path / name, steps=4, optimizer="muon-serial", bf16=True)
        process = start(tmp_path, settings, *launcher, str(free_port()), resume=resume, **ways)
        assert exit_code(process, tmp_path / "log") == 0, (tmp_path / "log").read_text()[-3000:]
        return settings, loss_curve(tmp_path / name), dict(open_checkpoint(tmp_path / name / "final").tensors())

    settings, losses, weights = run("copies")
    assert read_recipe(tmp_path / "copies" / "final" / "recipe.json") == (settings, made_with(settings, processes=2))
    # Two processes of two rows each take four rows a step, so an epoch has a quarter as many steps as rows.
    state = json.loads((tmp_path / "copies" / "final" / "trainer_state.json").read_text())
    assert state["epoch"] == pytest.approx(4 / math.ceil(len(train_rows(settings)) / 4))

    _, sharded_losses, sharded_weights = run("shards", **fsdp)
    # Gradients are summed in another order, and bfloat16 products make more of it: 3e-5 of the loss was measured, and
    # a thirty-fifth of the way from half time.
    assert sharded_losses == pytest.approx(losses, rel=3e-4)
    half = dict(open_checkpoint(tmp_path / "shards" / "checkpoint-2" / "drafter").tensors())
    assert distance(sharded_weights, weights) < 0.1 * distance(sharded_weights, half)
    assert (tmp_path / "shards" / "checkpoint-2" / "pytorch_model_fsdp.bin").exists()

    shutil.rmtree(tmp_path / "shards" / "checkpoint-4")
    shutil.rmtree(tmp_path / "shards" / "final")
    _, resumed_losses, resumed_weights = run("shards", resume=True, **fsdp)
    assert resumed_losses == pytest.approx(sharded_losses, rel=1e-5)
    assert distance(resumed_weights, sharded_weights) < 0.01 * distance(sharded_weights, half)


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return sum(float((one[name] - other[name]).square().sum()) for name in one) ** 0.5


def test_curves_of_runs_are_read_and_plotted(tmp_path, tiny_target, data):
    from matplotlib.image import imread

    train(recipe(tiny_target, data, tmp_path / "a", steps=4))
    ((label, curves),) = read_curves([tmp_path / "a"], ["first"])
    assert label == "first"
    assert dict(curves["ce_1"]).keys() == {1, 2, 3, 4}
    history = json.loads((tmp_path / "a" / "final" / "trainer_state.json").read_text())["log_history"]
    measured = [entry["eval_acceptance_length"] for entry in history if "eval_acceptance_length" in entry]
    assert curves["eval_acceptance_length"] == [(2, measured[0]), (4, measured[-1])]

    flat = {"eval_acceptance_length": [(2, 1.0), (4, 2.0)], "ce_1": [(1, 1.0), (4, 1.0)]}
    steep = flat | {"ce_1": [(1, 3.0), (4, 1.0)]}
    plot_curves([("flat", flat)], tmp_path / "new" / "flat.png")
    plot_curves([("flat", flat), ("steep", steep)], tmp_path / "both.png")
    one, both = imread(tmp_path / "new" / "flat.png"), imread(tmp_path / "both.png")
    assert one.shape[:2] == both.shape[:2] == (540, 1320)
    coloured = [(image[..., :3].max(-1) - image[..., :3].min(-1) > 0.2) for image in (one, both)]
    assert all(half.any() for half in (coloured[0][:, :825], coloured[0][:, 825:]))
    assert coloured[1][:, 825:].sum() > 1.5 * coloured[0][:, 825:].sum()
    with pytest.raises(FigureError, match="2 labels for 1 runs"):
        read_curves([tmp_path / "a"], ["x", "y"])
    with pytest.raises(FigureError, match=r"trainer_state\.json: no state of a finished run"):
        read_curves([tmp_path], [])


def test_early_stopping_ends_a_run_that_no_longer_gains(tmp_path, tiny_target, data):
    # At this learning rate nothing changes, so the second measurement is no better than the first.
    train(recipe(tiny_target, data, tmp_path, steps=40, patience=1, learning_rate=1e-12))
    assert max(loss_curve(tmp_path)) == 4


@pytest.mark.engine
def test_a_drafter_of_a_reduced_vocabulary_and_eagle_1_are_served(tmp_path, tiny_target, data):
    train(recipe(tiny_target, data, tmp_path / "small", draft_vocab=48, steps=20, learning_rate=3e-3, save_every=20))
    train(recipe(tiny_target, data, tmp_path / "eagle", recipe="eagle", steps=20, learning_rate=3e-3, save_every=20))
    drafter = open_checkpoint(tmp_path / "small" / "final")
    d2t = dict(drafter.tensors())[D2T]
    allowed = (torch.arange(len(d2t)) + d2t).tolist()
    assert drafter.sizes.draft_vocab_size == 48
    assert allowed == sorted(set(allowed))
    cases = {
        "off": case(tiny_target),
        "small": case(tiny_target, {"method": "gumiho", "model": str(tmp_path / "small" / "final")}),
        "probabilistic": case(
            tiny_target,
            {"method": "gumiho", "model": str(tmp_path / "small" / "final"), "draft_sample_method": "probabilistic"},
        ),
        "eagle": case(
            tiny_target,
            {"method": "eagle", "model": str(tmp_path / "eagle" / "final"), "num_speculative_tokens": 4},
        ),
    }
    results = run_engines(tmp_path, "v1", cases)
    for name in ("small", "probabilistic", "eagle"):
        assert results[name]["tokens"] == results["off"]["tokens"], name
        assert results[name]["drafted"] > 0
    assert set(results["small"]["draft_tokens"]) <= set(allowed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"recipe": "best"},
            "recipe 'best' is not known; choose one of paper, unrolled, unrolled-layers, eagle, moa, moa-paper",
        ),
        ({"steps": 0}, "steps is 0; it must be above 0"),
        ({"own_tokens": 2.0}, "own_tokens is 2.0; it must lie between 0 and 1"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"recipe": "eagle", "draft_vocab": 5}, "recipe 'eagle' has one phase"),
        ({"further_steps": -1}, "further_steps is -1; it must not be below 0"),
        ({"recipe": "paper", "further_steps": 1}, "further_steps is 1; recipe 'paper', phase 'all' takes none"),
        ({"phase": "heads", "further_steps": 1}, "further_steps is 1; recipe 'unrolled', phase 'heads' takes none"),
        ({"target_layers": [1]}, "recipe 'unrolled' reads the target's last state alone"),
        ({"recipe": "moa", "phase": "serial"}, "recipe 'moa' has one phase, a random start"),
        ({"recipe": "moa", "init": "linear"}, "recipe 'moa' has one phase, a random start"),
        ({"recipe": "moa", "num_heads": 0, "num_serial_steps": 1}, "drafts num_serial_steps .* give 2 or more"),
        ({"recipe": "moa-paper", "own_tokens": 0.5}, "recipe 'moa-paper' takes none, recipe 'moa' does"),
        ({"recipe": "moa", "target_layers": [1, 3]}, "target_layers 3: the target has 2 layers; choose from 0"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path, tiny_target, data, changes, message):
    with pytest.raises(RecipeError, match=message):
        train(recipe(tiny_target, data, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_a_run_does_not_begin_where_another_has_checkpoints(tmp_path, tiny_target, data):
    """Killed before its first own checkpoint, it would be resumed from the other's."""
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "checkpoint-9" / "trainer_state.json").write_text("{}")
    with pytest.raises(RecipeError, match="has checkpoints of a run; go on with it by --resume, or give another --out"):
        train(recipe(tiny_target, data, tmp_path))


def test_one_process_trains_on_one_of_several_gpus(monkeypatch, tmp_path, caplog):
    """transformers would wrap the model into nn.DataParallel, whose threads share one target."""
    real = trainer.TrainingArguments

    def with_gpus(**settings):
        made = real(**settings)
        made._n_gpu = 4
        return made

    monkeypatch.setattr(trainer, "TrainingArguments", with_gpus)
    assert trainer._arguments(recipe(tmp_path, tmp_path, tmp_path)).n_gpu == 1
    assert "training on one of 4 GPUs; accelerate launch or torchrun takes all of them" in caplog.text


@pytest.mark.parametrize(
    ("minutes", "first", "saves"), [(1e9, 1, True), (0, 0, False), (1e9, None, False), (0, None, True)]
)
def test_the_clock_of_the_first_process_decides_for_all(monkeypatch, minutes, first, saves):
    """first: what that one says; None where there is no other."""
    monkeypatch.setattr(torch.distributed, "broadcast", lambda said, rank: said.fill_(first))
    clock, control = TimedCheckpoints(minutes), SimpleNamespace(should_save=False)
    args = SimpleNamespace(world_size=1 if first is None else 2, device=torch.device("cpu"))
    clock.on_step_end(args, None, control)
    assert control.should_save is saves


def test_resuming_needs_a_checkpoint(tmp_path, tiny_target, data):
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(RecipeError, match="no checkpoint to resume from"):
        train(recipe(tiny_target, data, tmp_path), resume=True)
