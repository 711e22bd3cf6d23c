"""Target features: what the model gives for each sequence alone, and a store that several processes fill."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from runs import recipe
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from vllm_gumiho.cli import app
from vllm_gumiho.training.data import PackedRows, Sample, read_samples
from vllm_gumiho.training.store import FeatureStore, key_of
from vllm_gumiho.training.target import open_target
from vllm_gumiho.training.trainer import train


def samples(lengths: list[int]) -> list[Sample]:
    rng = random.Random(0)
    return [
        Sample(f"s{i}", (([rng.randrange(tiny.VOCAB) for _ in range(3)], [rng.randrange(160) for _ in range(n)]),))
        for i, n in enumerate(lengths)
    ]


@pytest.mark.parametrize(("alike", "passes"), [(0.7, 4), (0.2, 3)])
def test_features_are_those_of_each_sequence_alone(monkeypatch, tiny_target, alike, passes):
    # Passes of 140 tokens with their padding: of the seven sequences some are padded and some go alone.
    monkeypatch.setattr("vllm_gumiho.training.target.PASS_TOKENS", 140)
    monkeypatch.setattr("vllm_gumiho.training.target.ALIKE", alike)
    model = AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.float32)
    rows = PackedRows(samples([5, 30, 28, 7, 60, 20, 6]), 80)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    target, sizes = open_target(str(tiny_target)), []
    target.model.register_forward_pre_hook(
        lambda _, args, named: sizes.append(named["input_ids"].shape[0]), with_kwargs=True
    )
    found = target.features(batch)
    assert (len(sizes), sum(sizes)) == (passes, 7)
    for row, sequences in enumerate(rows.rows):
        start = 0
        for tokens, _ in sequences:
            with torch.no_grad():
                wanted = model.model(torch.tensor([tokens])).last_hidden_state[0]
            torch.testing.assert_close(found[row, start : start + len(tokens)], wanted, rtol=1e-4, atol=1e-5)
            start += len(tokens)
        assert not found[row, start:].any()


def fill(folder: str, first: int) -> None:
    store = FeatureStore(Path(folder), "t", 4)
    for i in range(first, first + 30):
        store.append([(key_of(np.array([i, n])), torch.full((n + 1, 4), 10.0 * i + n)) for n in range(3)])


def test_processes_fill_one_store_at_once(tmp_path):
    store = FeatureStore(tmp_path, "t", 4)
    fill(str(tmp_path), 500)
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=fill, args=(str(tmp_path), first)) for first in (0, 100)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(timeout=120)
        assert writer.exitcode == 0
    assert len(store) == 3 * 90
    for i in (0, 29, 100, 129, 500):
        for n in range(3):
            features = store.read(key_of(np.array([i, n])))
            assert torch.equal(features, torch.full((n + 1, 4), 10.0 * i + n).bfloat16())
    assert key_of(np.array([0, 3])) not in store
    with pytest.raises(KeyError):
        store.read(key_of(np.array([0, 3])))


def test_a_store_larger_than_memory_is_read(tmp_path):
    """The file has a hole, which takes no room on disk."""
    first, last, features = key_of(np.array([1])), key_of(np.array([2])), torch.arange(8.0).view(2, 4)
    store = FeatureStore(tmp_path, "t", 4)
    store.append([(first, features)])
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    os.truncate(tmp_path / "t.features", 8 * memory)
    store.append([(last, features + 9)])
    for key, wanted in ((first, features), (last, features + 9)):
        found = store.read(key)
        assert torch.equal(found, wanted.bfloat16())
        found.zero_()  # a copy
        assert torch.equal(store.read(key), wanted.bfloat16())


def test_features_of_a_target_that_was_tuned_are_others(tmp_path, tiny_target):
    """One layer's query projection, as a merged adapter changes it."""
    target = open_target(str(tiny_target), str(tmp_path), torch.device("cpu"))
    name = target._fingerprint()
    assert open_target(str(tiny_target), str(tmp_path), torch.device("cpu"))._fingerprint() == name
    with torch.no_grad():
        target.model.model.layers[0].self_attn.q_proj.weight.mul_(1.01)
    assert target._fingerprint() != name


def test_a_store_that_was_filled_ahead_is_all_that_training_needs(monkeypatch, tmp_path, tiny_target):
    rng = random.Random(0)
    lines = [
        {"id": f"s{i}", "prompt": [rng.randrange(160) for _ in range(4)], "answer": list(range(9, 20 + i))}
        for i in range(30)
    ]
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, lines)))
    target = ["--target", str(tiny_target)]
    asked = [
        *target,
        "--data",
        str(tmp_path),
        "--feature-cache",
        str(tmp_path / "f"),
        "--row-length",
        "32",
        "--no-bf16",
    ]
    tokens = sum(min(32, len(s)) for s in read_samples([tmp_path], 160))
    for computed in (tokens, 0):
        done = CliRunner().invoke(app, ["features", *asked])
        assert done.exit_code == 0, done.output
        assert f"{computed} tokens computed, 30 conversations there" in done.output.replace("\n", " ")

    def fails(*_):
        raise AssertionError("the target was run")

    monkeypatch.setattr("vllm_gumiho.training.target.FrozenTarget.compute_sequences", fails)
    # What a step would cost without the store is counted on a pass of its own.
    monkeypatch.setattr("vllm_gumiho.training.trainer.training_flops", lambda *_: (1, 1))
    train(recipe(tiny_target, tmp_path, tmp_path / "run", row_length=32, steps=2, feature_cache=str(tmp_path / "f")))
