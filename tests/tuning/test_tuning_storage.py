"""Schedules on disk: what is stored under which identity, and what a server makes of it."""

from __future__ import annotations

import json
import logging
import os

import pytest
from fakes import measurement
from schedules import fake_engine, identity, settle, spec_for, stored, target
from tiny import drafter_tensors, write_released

from vllm_gumiho.env import SCHEDULE
from vllm_gumiho.errors import StorageError
from vllm_gumiho.tuning import storage
from vllm_gumiho.tuning.measure import record_of
from vllm_gumiho.tuning.settings import Plan


def test_a_stored_schedule_becomes_the_config_and_one_line_of_the_log(checkpoint, cache, caplog):
    record = stored(checkpoint, most=7, schedule=[[1, 2, 5], [3, 4, 2], [5, 9, 0]])
    with caplog.at_level(logging.INFO, "vllm.vllm_gumiho"):
        spec = settle(checkpoint)
    assert spec == spec_for(checkpoint) | {
        "num_speculative_tokens": 5,
        "num_speculative_tokens_per_batch_size": record["schedule"],
    }
    assert [r.message for r in caplog.records if "K=5 at batch size 1 to 2" in r.message]
    assert os.listdir(cache) == [storage.path_of(record["key"]).name]


def test_a_stored_no_starts_without_speculation_and_says_why(checkpoint, cache, caplog):
    stored(checkpoint, schedule=None, single=0, reason="drafting pays at no batch size")
    with caplog.at_level(logging.INFO, "vllm.vllm_gumiho"):
        assert settle(checkpoint) is None
    assert [r.message for r in caplog.records] == [
        "Gumiho: the engine starts without speculation, by measurement on this machine (drafting pays at no batch size)"
    ]


@pytest.mark.parametrize(("single", "expected"), [(4, {"num_speculative_tokens": 4}), (0, None)])
def test_data_parallel_engines_get_one_length_or_none(checkpoint, cache, single, expected):
    stored(checkpoint, most=7, schedule=[[1, 2, 7], [3, 3, 0]], single=single)
    spec = settle(checkpoint, data_parallel=2)
    assert spec == (expected and spec_for(checkpoint) | expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"engine": {"enforce_eager": False}}, {"engine": {"tensor_parallel_size": 2}},
        {"engine": {"max_num_seqs": 1}}, {"engine": {"max_num_seqs": 16}}, {"engine": {"max_num_seqs": None}},
        {"target": {"model": "org/other"}},
        {"spec": {"draft_sample_method": "probabilistic"}},
        {"environment": "1"},
    ],
)  # fmt: skip
def test_another_setting_is_another_schedule(checkpoint, cache, monkeypatch, changes):
    record = stored(checkpoint)
    spec = spec_for(checkpoint, **changes.get("spec", {}))
    if "environment" in changes:
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", changes["environment"])
    key = identity(checkpoint, fake_engine(**changes.get("engine", {})), target(**changes.get("target", {})), spec)
    assert storage.path_of(key) != storage.path_of(record["key"])
    assert storage.load(key) is None


def test_servers_that_may_decode_more_than_is_measured_share_a_schedule():
    assert [storage.largest_batch(fake_engine(max_num_seqs=most)) for most in (1, 15, 16, 17, 256, None)] == [
        1,
        15,
        16,
        16,
        16,
        16,
    ]


@pytest.mark.parametrize(("max_num_seqs", "drafts"), [(16, True), (17, False), (None, False)])
def test_more_requests_than_measured_turn_off_a_drafter_that_is_dear_when_idle(
    checkpoint, cache, caplog, max_num_seqs, drafts
):
    """Twice as fast at 1 and 16, but 12 % behind where nothing is drafted, as above 16."""
    times = {"1": [10.0], "16": [10.0]}
    found = measurement() | {
        "off_ms": times,
        "on_ms": {"0": {"1": [11.4], "16": [11.4]}, "1": {"1": [11.5], "16": [11.5]}},
        "accepted": [200],
    }
    key = identity(checkpoint, fake_engine(max_num_seqs=16))
    record = record_of(key, found, 1, Plan(max_batch=16))
    assert record["schedule"] == [[1, 16, 1], [17, 17, 0]]
    storage.save(record)
    with caplog.at_level(logging.INFO, "vllm.vllm_gumiho"):
        assert (settle(checkpoint, max_num_seqs=max_num_seqs) is not None) is drafts
    assert ("more than 16 requests at once would be slower with it (0.88x expected with K=0 at 16" in caplog.text) is (
        not drafts
    )


def test_a_changed_checkpoint_is_another_schedule(tmp_path, cache):
    tensors = drafter_tensors()
    folder = write_released(tmp_path / "checkpoint", tensors, suffix="safetensors")
    before = identity(folder)
    assert identity(folder, spec={"model": str(folder)}) == before
    write_released(folder, tensors | {"fc.bias": tensors["fc.bias"] + 1}, suffix="safetensors")
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert identity(folder) != before


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "", lambda text: text[: len(text) // 2], lambda text: "[" * 100_000, lambda text: "[]",
        lambda text: text.replace('"format": 2', '"format": 1'), lambda text: text.replace('"most": 1', '"most": "x"'),
        lambda text: text.replace('"single": ', '"single": 9'),
        lambda text: text.replace('"schedule": [', '"schedule": [0,'),
        lambda text: text.replace('"above": null', '"above": 1'),
        lambda text: text.replace('"key"', '"yek"'), lambda text: text.replace('"dtype": "float32"', '"dtype": "half"'),
    ],
)  # fmt: skip
def test_a_damaged_file_is_ignored_with_a_warning(checkpoint, cache, caplog, damage):
    record = stored(checkpoint)
    file = storage.path_of(record["key"])
    text = file.read_text()
    assert storage.load(record["key"]) == record
    assert damage(text) != text
    file.write_text(damage(text))
    assert storage.load(record["key"]) is None
    assert [r.levelname for r in caplog.records if str(file) in r.message] == ["WARNING"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch, checkpoint):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "file"))
    with pytest.raises(StorageError, match=r"file/gumiho/schedules.*set VLLM_CACHE_ROOT") as refused:
        storage.writable_folder()
    with pytest.raises(StorageError, match="set VLLM_CACHE_ROOT"):
        stored(checkpoint)
    assert "\n" not in str(refused.value)


def test_a_record_handed_down_in_the_environment_serves_without_a_folder(checkpoint, cache, monkeypatch, caplog):
    record = stored(checkpoint)
    storage.path_of(record["key"]).unlink()
    monkeypatch.setenv(SCHEDULE.name, json.dumps(record))
    assert storage.load(record["key"]) == record
    assert storage.load(record["key"] | {"cores": -1}) is None
    monkeypatch.setenv(SCHEDULE.name, "{")
    assert storage.load(record["key"]) is None
    assert SCHEDULE.name in caplog.text


def test_an_unfinished_write_leaves_the_old_record(checkpoint, cache, monkeypatch):
    record = stored(checkpoint)
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StorageError, match="No space left on device"):
        storage.save(record | {"single": 1})
    assert storage.load(record["key"]) == record
    assert len(os.listdir(cache)) == 1
