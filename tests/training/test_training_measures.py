"""What a run logs of its losses and its speed, and where the target's features are kept meanwhile."""

from __future__ import annotations

import math

import pytest
import torch
from runs import logged as recipe
from runs import train_rows, write_answers

from vllm_gumiho.errors import RecipeError
from vllm_gumiho.training.data import segment_spans
from vllm_gumiho.training.recipe import Recipe
from vllm_gumiho.training.recipes import new_drafter, objective_of
from vllm_gumiho.training.trainer import train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_answers(tmp_path_factory.mktemp("data"))


def test_losses_and_speed_are_logged_to_tensorboard(tmp_path, tiny_target, data):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = recipe(tiny_target, data, tmp_path / "run", steps=4)
    settings.extra = {"disable_tqdm": True, "use_cpu": True, "logging_steps": 1}
    train(settings)
    # One file of the training, one of the measurement at the end.
    (folder,) = {file.parent for file in (tmp_path / "run").rglob("events.out.tfevents.*")}
    log = EventAccumulator(str(folder))
    log.Reload()
    logged = set(log.Tags()["scalars"])
    assert {f"train/{loss}_{i}" for loss in ("ce", "feature") for i in range(1, 8)} <= logged
    assert {f"eval/{metric}_{i}" for metric in ("accuracy", "accepted") for i in range(1, 8)} <= logged
    assert {"train/loss", "eval/acceptance_length"} <= logged
    for name in ("answer_tokens_per_s", "matmul_share"):
        values = log.Scalars(f"train/{name}")
        assert [value.step for value in values] == [1, 2, 3, 4]
        assert all(value.value > 0 for value in values)
    assert all(value.value < 1 for value in log.Scalars("train/matmul_share"))


def test_a_counter_that_does_not_know_an_operation_ends_no_run(monkeypatch, tmp_path, tiny_target, data, caplog):
    def unknown(self):
        raise AssertionError("shapes are incompatible")

    whole = train(recipe(tiny_target, data, tmp_path / "counted", steps=2))
    monkeypatch.setattr("torch.utils.flop_counter.FlopCounterMode.get_total_flops", unknown)
    with caplog.at_level("WARNING", logger="vllm_gumiho"):
        found = train(recipe(tiny_target, data, tmp_path / "run", steps=2))
    assert "operations of a training step are not counted: shapes are incompatible" in caplog.text
    assert {k: v for k, v in found.items() if "acc" in k} == {k: v for k, v in whole.items() if "acc" in k}


def test_operations_of_the_target_count_where_the_cache_has_no_features(tmp_path, tiny_target, data):
    from transformers import AutoModelForCausalLM

    from vllm_gumiho.training.model import TrainingModel
    from vllm_gumiho.training.speed import training_flops
    from vllm_gumiho.training.target import FrozenTarget

    settings = recipe(tiny_target, data, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.float32)
    rows = train_rows(settings)
    batch, other = ({name: value[None] for name, value in rows[i].items()} for i in (0, 1))
    drafter = new_drafter(settings, model.config)
    drafter.init_weights(1.0, 1.0)

    def training_model(cache):
        return TrainingModel(drafter, objective_of(settings), FrozenTarget(model, cache), torch.arange(4))

    plain, cached = training_model(None), training_model(tmp_path / "features")
    target, own = training_flops(plain, batch)
    # At least each weight's product; of the drafter its first layer's, forward and backward, but for the inputs' part.
    tokens = int((batch["segments"] > 0).sum())
    assert target >= 2 * tokens * sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    assert own >= 2 * 2 * tokens * sum(p.numel() for p in drafter.layers[0].parameters() if p.ndim == 2)
    assert training_flops(cached, batch) == training_flops(cached, batch) == (target, own)
    assert [cached.target_is_cached(b) for b in (batch, other)] == [True, False]
    assert not plain.target_is_cached(batch)


def test_steps_on_cached_features_are_counted_without_the_target(monkeypatch, tmp_path, tiny_target, data):
    counted = []
    monkeypatch.setattr("vllm_gumiho.training.speed.SpeedMeter.add", lambda self, tokens, flops: counted.append(flops))
    # A linear start would have filled the store before the first step.
    way = {"row_length": 256, "feature_cache": str(tmp_path / "features"), "init": "random"}
    settings = recipe(tiny_target, data, tmp_path / "run", **way)
    epoch = math.ceil(len(train_rows(settings)) / settings.rows)
    settings.steps = settings.save_every = 2 * epoch
    train(settings)
    assert len(counted) == 2 * epoch >= 4
    assert set(counted[epoch:]) == {min(counted)}
    assert max(counted[:epoch]) > min(counted)


def test_features_from_the_cache_are_the_targets(tmp_path, tiny_target, data):
    from transformers import AutoModelForCausalLM

    from vllm_gumiho.training.target import FrozenTarget

    model = AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.float32)
    batch = {name: value[None] for name, value in train_rows(recipe(tiny_target, data, tmp_path))[0].items()}
    plain = FrozenTarget(model).features(batch)
    cached = FrozenTarget(model, tmp_path / "features")
    first, second = cached.features(batch), cached.features(batch)
    torch.testing.assert_close(first.float(), plain, rtol=2**-8, atol=1e-6)
    assert torch.equal(first, second)
    # Another process, after a kill in the midst of writing: what was cut off is computed anew, the rest read.
    (file,), (index,) = ((tmp_path / "features").glob(f"*.{end}") for end in ("features", "index"))
    with file.open("rb+") as written:
        written.truncate(file.stat().st_size - 100)
    index.write_bytes(index.read_bytes() + b"half a record")
    again = FrozenTarget(model, tmp_path / "features")
    assert not again.is_cached(batch)
    torch.testing.assert_close(again.features(batch).float(), plain, rtol=2**-8, atol=1e-6)
    assert FrozenTarget(model, tmp_path / "features").is_cached(batch)


@pytest.mark.parametrize("kept", [2, 1, 0], ids=["all", "some", "none"])
def test_features_kept_in_memory_are_those_of_a_store(tmp_path, tiny_target, data, kept):
    from vllm_gumiho.training.target import open_target

    batch = {name: value[None] for name, value in train_rows(recipe(tiny_target, data, tmp_path))[0].items()}
    stored = open_target(str(tiny_target), tmp_path / "features").features(batch)
    target = open_target(str(tiny_target))
    longest = max(b - a for _, a, b in segment_spans(batch["segments"]))
    room = {2: 1 << 20, 1: 2 * longest * target.width, 0: 0}[kept]
    target.keep_features(room / 2**30)
    for _ in range(2):
        assert torch.equal(target.features(batch), stored)
    assert target.is_cached(batch) == (kept == 2)


def test_two_places_for_features_are_refused():
    with pytest.raises(RecipeError, match=r"feature_memory 2: feature_cache store keeps the features"):
        Recipe("TARGET", ["data"], "run", feature_memory=2, feature_cache="store").check()
