"""A cache folder of its own, and a checkpoint to tune."""

from __future__ import annotations

import pytest
from tiny import drafter_tensors, write_released

from vllm_gumiho.env import SCHEDULE


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    # What is put there meanwhile goes at the end.
    monkeypatch.setenv(SCHEDULE.name, "")
    monkeypatch.delenv(SCHEDULE.name)
    return tmp_path / "cache" / "gumiho" / "schedules"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_released(tmp_path_factory.mktemp("checkpoint"), drafter_tensors(), suffix="safetensors")
